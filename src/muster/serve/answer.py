"""From a job to an HTTP response, whole or streamed as server-sent events.

Either way the engine stops working for a client that has gone: Starlette cancels only some streaming
responses by itself, so both kinds race their work against the connection's end here. A stream's pieces go straight to
its connection.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from functools import partial

import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from muster.serve.connection import event, while_connected
from muster.serve.detokenize import Decode
from muster.serve.failures import describe
from muster.serve.generation import Generation, Piece
from muster.serve.intake import Job
from muster.serve.metrics import Metrics
from muster.serve.outlet import Outlet
from muster.serve.protocol import Engine
from muster.serve.relay import LOST, Progress, mark
from muster.serve.responses import Json, Outcome, usage
from muster.serve.visit import Visit

_LOG = logging.getLogger(__name__)


class Answer:
    """The answer to one job: its sequences are queued on creation, all or none (raises Overloaded)."""

    def __init__(
        self, job: Job, engine: Engine, decode: Decode, model_id: str, visit: Visit, metrics: Metrics
    ) -> None:
        self._job, self._visit, self._metrics = job, visit, metrics
        prefix = "chatcmpl" if job.object == "chat.completion" else "cmpl"
        relay = job.relay
        self._head = {
            "id": relay.id if relay else f"{prefix}-{uuid.uuid4().hex}",
            "created": relay.created if relay else int(time.time()),
            "model": model_id,
        }
        self._before = [relay.of(index) if relay else None for index in range(len(job.requests))]
        self._kind = "chat.completion.chunk" if job.object == "chat.completion" else job.object
        self._prefix = event({**self._head, "object": self._kind, "choices": []}).rstrip()[:-2]
        self._outcomes = [Outcome() for _ in job.requests]
        self._characters = [0 for _ in job.requests]
        """Of text, that each choice has delivered."""
        self._generations: list[Generation] = []
        self._indices: list[int] = []
        """The choice of each generation."""
        try:
            for index, (request, before) in enumerate(zip(job.requests, self._before, strict=True)):
                if before is not None and before.finished:
                    self._outcomes[index].generated_tokens = before.generated
                    continue
                delivered = before.characters if before else 0
                generation = Generation(engine, decode, request, job.stop, delivered)
                self._characters[index] = len(generation.delivered)
                if before is not None:  # shapes may read the text as it comes
                    self._job.shape.delta(index, Outcome(text=generation.delivered), 0)
                self._generations.append(generation)
                self._indices.append(index)
        except BaseException:
            self.close()
            raise
        self._came_s: list[float | None] = [None for _ in job.requests]
        """When the latest piece of each choice came."""

    def close(self) -> None:
        for generation in self._generations:
            generation.close()

    def settle(self) -> None:
        """Close, and say what it has come to."""
        self.close()
        self._visit.output_tokens = sum(outcome.generated_tokens for outcome in self._outcomes)
        for outcome in self._outcomes:
            self._metrics.finished[outcome.finish_reason or "abort"] += 1
        if self._outcomes and all(outcome.finish_reason for outcome in self._outcomes):
            self._metrics.e2e.observe(time.perf_counter() - self._visit.began_s)

    async def whole(self, receive: Receive, timeout_s: float) -> Response:
        """Wait for all choices; raises TimeoutError, EngineError, or ClientDisconnect."""
        texts: list[list[str]] = [[] for _ in self._outcomes]

        def gather(index: int, generation: Generation) -> None:
            for piece in generation.take():
                self._count(index, piece)
                texts[index].append(piece.text)
                self._outcomes[index].tokens.extend(piece.tokens)

        try:
            await self._ended(gather, receive, timeout_s)
        finally:
            self.settle()
        for outcome, parts in zip(self._outcomes, texts, strict=True):
            outcome.text = "".join(parts)
        choices = [self._job.shape.choice(index, outcome) for index, outcome in enumerate(self._outcomes)]
        return JSONResponse(
            {**self._head, "object": self._job.object, "choices": choices, "usage": self._usage()}
        )

    async def stream(self, outlet: Outlet, receive: Receive, timeout_s: float) -> None:
        """Write the answer as server-sent events as it comes, usage and [DONE] included; a failure becomes an error
        event. Raises ClientDisconnect."""

        alone = len(self._generations) == 1  # or a step's choices go out together
        send = outlet.push if alone else outlet.write

        def write(index: int, generation: Generation) -> None:
            if outlet.paused:
                return  # the client is behind: what comes meanwhile goes out at once when there is room
            if events := [self._event(index, piece) for piece in generation.take()]:
                send(b"".join(events))

        for index in self._indices:
            opening = self._job.shape.opening(index) if self._before[index] is None else None
            if opening is not None:
                outlet.write(self._mark(index) + self._chunk(opening))
        try:
            await self._ended(write, receive, timeout_s, outlet)
        except ClientDisconnect:
            raise
        except TimeoutError as error:
            outlet.write(event(describe(error)))
            return
        except Exception as error:
            _LOG.error("a stream failed", exc_info=error)
            outlet.write((LOST + b"\n" if self._job.relay else b"") + event(describe(error)))
            return
        if self._job.include_usage:
            outlet.write(event({**self._head, "object": self._kind, "choices": [], "usage": self._usage()}))
        outlet.write(b"data: [DONE]\n\n")

    async def _ended(
        self,
        advance: Callable[[int, Generation], None],
        receive: Receive,
        timeout_s: float,
        outlet: Outlet | None = None,
    ) -> None:
        """Have each generation advanced whenever there is something of it, or room in the outlet, until all have ended.

        That happens in the one wake-up of the loop that a step costs: a task for each stream would double its price.
        """
        ended = asyncio.get_running_loop().create_future()

        def told(index: int, generation: Generation) -> None:
            if ended.done():
                return
            try:
                advance(index, generation)
            except Exception as error:
                ended.set_exception(error)
            else:
                if generation.finished and all(one.finished for one in self._generations):
                    ended.set_result(None)

        def all_told() -> None:
            for index, generation in zip(self._indices, self._generations, strict=True):
                told(index, generation)

        if not self._generations:
            return
        for index, generation in zip(self._indices, self._generations, strict=True):
            generation.listen(partial(told, index, generation))
        if outlet is not None:
            outlet.on_room = all_told
        all_told()  # what has come before
        try:
            async with asyncio.timeout(timeout_s):
                await while_connected(receive, ended)
        finally:
            if outlet is not None:
                outlet.on_room = _nothing

    def _event(self, index: int, piece: Piece) -> bytes:
        offset = self._characters[index]
        self._count(index, piece)
        part = Outcome(text=piece.text, tokens=piece.tokens, finish_reason=piece.finish_reason)
        chunk = self._chunk(self._job.shape.delta(index, part, offset))
        return chunk if self._job.relay is None else self._mark(index, part) + chunk

    def _count(self, index: int, piece: Piece) -> None:
        now_s, before_s = time.perf_counter(), self._came_s[index]
        self._came_s[index] = now_s
        if before_s is not None:
            self._metrics.itl.observe(now_s - before_s)
        else:
            self._metrics.ttft.observe(now_s - self._visit.began_s)
            if self._visit.first_s is None:
                self._visit.first_s = now_s
        outcome = self._outcomes[index]
        self._characters[index] += len(piece.text)
        outcome.generated_tokens, outcome.finish_reason = piece.generated_tokens, piece.finish_reason

    def _mark(self, index: int, part: Outcome | None = None) -> bytes:
        """In front of an event, for a router that would have another replica go on from there."""
        if self._job.relay is None:
            return b""
        so_far = self._outcomes[index]
        return mark(
            Progress.model_construct(
                index=index,
                ids=[token.id for token in part.tokens] if part else [],
                characters=self._characters[index],
                generated=so_far.generated_tokens,
                finished=so_far.finish_reason is not None,
            )
        )

    def _chunk(self, choice: Json) -> bytes:
        """The event of one choice; all but that is the same in all of them."""
        return self._prefix + orjson.dumps(choice) + b"]}\n\n"

    def _usage(self) -> Json:
        return usage(self._job.prompt_tokens, sum(outcome.generated_tokens for outcome in self._outcomes))


def _nothing() -> None:
    pass


class StreamedAnswer(Response):
    """Sends an answer's events as they come, until the client leaves or the time is up."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, timeout_s: float) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})
        self._answer = answer
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._answer.stream(Outlet.of(scope), receive, self._timeout_s)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientDisconnect:
            pass
        finally:
            self._answer.settle()
