"""From a job to an HTTP response, whole or streamed as server-sent events.

Either way the engine stops working for a client that has gone: Starlette cancels only some streaming
responses by itself, so both kinds race their work against the connection's end here.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from muster.serve.connection import event, while_connected
from muster.serve.detokenize import Decode
from muster.serve.failures import describe
from muster.serve.generation import Generation, Piece
from muster.serve.intake import Job
from muster.serve.metrics import Metrics
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
        self._outcomes = [Outcome() for _ in job.requests]
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
                self._outcomes[index].text = generation.delivered
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
        try:
            await while_connected(receive, self._collect(timeout_s))
        finally:
            self.settle()
        choices = [self._job.shape.choice(index, outcome) for index, outcome in enumerate(self._outcomes)]
        return JSONResponse(
            {**self._head, "object": self._job.object, "choices": choices, "usage": self._usage()}
        )

    async def _collect(self, timeout_s: float) -> None:
        async with asyncio.timeout(timeout_s):
            async with aclosing(merge(self._generations)) as pieces:
                async for number, piece in pieces:
                    self._extend(self._indices[number], piece)

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as server-sent events, usage and [DONE] included; a failure becomes an error event."""
        for index in self._indices:
            opening = self._job.shape.opening(index) if self._before[index] is None else None
            if opening is not None:
                yield self._mark(index) + self._chunk([opening])
        try:
            async with aclosing(merge(self._generations)) as pieces:
                async for number, piece in pieces:
                    index = self._indices[number]
                    offset = len(self._outcomes[index].text)
                    part = self._extend(index, piece)
                    chunk = self._chunk([self._job.shape.delta(index, part, offset)])
                    yield self._mark(index, part) + chunk
        except Exception as error:
            _LOG.error("a stream failed", exc_info=error)
            yield (LOST + b"\n" if self._job.relay else b"") + event(describe(error))
            return
        if self._job.include_usage:
            yield self._chunk([], usage=self._usage())
        yield b"data: [DONE]\n\n"

    def _extend(self, index: int, piece: Piece) -> Outcome:
        now_s, before_s = time.perf_counter(), self._came_s[index]
        self._came_s[index] = now_s
        if before_s is not None:
            self._metrics.itl.observe(now_s - before_s)
        else:
            self._metrics.ttft.observe(now_s - self._visit.began_s)
            if self._visit.first_s is None:
                self._visit.first_s = now_s
        outcome = self._outcomes[index]
        outcome.text += piece.text
        outcome.tokens.extend(piece.tokens)
        outcome.generated_tokens = piece.generated_tokens
        outcome.finish_reason = piece.finish_reason
        return Outcome(text=piece.text, tokens=list(piece.tokens), finish_reason=piece.finish_reason)

    def _mark(self, index: int, part: Outcome | None = None) -> bytes:
        """In front of an event, for a router that would have another replica go on from there."""
        if self._job.relay is None:
            return b""
        so_far = self._outcomes[index]
        return mark(
            Progress.model_construct(
                index=index,
                ids=[token.id for token in part.tokens] if part else [],
                characters=len(so_far.text),
                generated=so_far.generated_tokens,
                finished=so_far.finish_reason is not None,
            )
        )

    def _chunk(self, choices: Sequence[Json], **more: Any) -> bytes:
        kind = self._job.object
        kind = f"{kind}.chunk" if kind == "chat.completion" else kind
        return event({**self._head, "object": kind, "choices": choices, **more})

    def _usage(self) -> Json:
        return usage(self._job.prompt_tokens, sum(outcome.generated_tokens for outcome in self._outcomes))


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
            await while_connected(receive, self._send(send))
        except ClientDisconnect:
            pass
        finally:
            self._answer.settle()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with asyncio.timeout(self._timeout_s):
                async with aclosing(self._answer.events()) as events:
                    async for data in events:
                        await send({"type": "http.response.body", "body": data, "more_body": True})
        except TimeoutError as error:
            await send({"type": "http.response.body", "body": event(describe(error)), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def merge(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Piece]]:
    """Pieces of all generations as they come, each with its index."""
    if len(generations) == 1:
        async with aclosing(generations[0].pieces()) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    arrived: asyncio.Queue[tuple[int, Piece] | Exception] = asyncio.Queue()

    async def pump(index: int, generation: Generation) -> None:
        try:
            async with aclosing(generation.pieces()) as pieces:
                async for piece in pieces:
                    arrived.put_nowait((index, piece))
        except Exception as error:
            arrived.put_nowait(error)

    pumps = [asyncio.create_task(pump(index, generation)) for index, generation in enumerate(generations)]
    unfinished = len(pumps)
    try:
        while unfinished:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            unfinished -= item[1].finish_reason is not None
            yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
