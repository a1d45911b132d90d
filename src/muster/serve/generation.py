"""One request as text: the engine's tokens, detokenised, cut at stop strings, cancelled when nobody listens.

Everything that shows generated text (HTTP, `muster chat`) reads it from here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from muster.serve.detokenize import Decode, Detokenizer, StopStrings
from muster.serve.protocol import Engine, FinishReason, Request, Token


@dataclass(kw_only=True, slots=True)
class Piece:
    """Text that has become certain, with the tokens whose text begins in it."""

    text: str
    tokens: list[Token] = field(default_factory=list)
    generated_tokens: int
    """Tokens generated for this request so far, end of sequence included."""
    finish_reason: FinishReason | None = None


class Generation:
    """An accepted request: iterate over `pieces()`; `close()` in any case."""

    def __init__(
        self,
        engine: Engine,
        decode: Decode,
        request: Request,
        stop: Sequence[str] = (),
        delivered_characters: int = 0,
    ) -> None:
        """Queue the request; raises Overloaded without queueing it. `delivered_characters` is how much of the text
        of `request.generated` has been shown elsewhere."""
        self.request = request
        self._engine = engine
        self._tokens = engine.submit(request)
        self._text = Detokenizer(decode, before=request.prompt)
        self._stop = StopStrings(stop)
        known = "".join(map(self._text.push, request.generated))
        certain = len(self._stop.push(known))
        self.delivered = known[: max(delivered_characters, certain)]
        """Text that pieces go on from."""
        self._known = len(known)
        """Characters of detokenised text,"""
        self._shown = len(self.delivered)
        """and those of them that have been passed on."""
        self._held: deque[tuple[int, Token]] = deque()
        """Tokens not passed on, by the position where their text begins."""
        self._generated = len(request.generated)
        self.finished = False
        self._repeated = (
            len(self.delivered) - certain
        )  # delivered, as what followed showed that no stop begins

    def close(self) -> None:
        """Cancel whatever is still being generated."""
        self._engine.cancel(self.request.id)

    def listen(self, told: Callable[[], None]) -> None:
        """Have `told` called on the event loop whenever there is something to `take`."""
        self._tokens.told = told

    def take(self) -> Iterator[Piece]:
        """Text that has become certain since; the last piece has a finish reason. Raises EngineError."""
        for token in self._tokens.take():
            if not self.finished and (piece := self._push(token)) is not None:
                yield piece
        self.finished |= self._tokens.ended

    async def pieces(self) -> AsyncGenerator[Piece]:
        """Text as it becomes certain; the last piece has a finish reason. Raises EngineError."""
        async for token in self._tokens:
            if (piece := self._push(token)) is not None:
                yield piece
            if self.finished:
                return

    def _push(self, token: Token) -> Piece | None:
        self._generated += 1
        ended = token.finish_reason
        text = ""
        if token.id not in self.request.params.stop_ids:  # the end-of-sequence token is no text
            self._held.append((self._known, token))
            text = self._text.push(token.id)
        if ended is not None:
            text += self._text.flush()
        self._known += len(text)
        text = self._stop.push(text)
        if ended is not None and not self._stop.found:
            text += self._stop.flush()
        if self._repeated:
            text, self._repeated = text[self._repeated :], max(0, self._repeated - len(text))
        if self._stop.found:
            ended = "stop"
            self.close()
            shown = self._shown + len(text)
            self._held = deque((start, token) for start, token in self._held if start < shown)
        self._shown += len(text)
        self.finished = ended is not None
        if not text and ended is None:
            return None
        ready = []
        while self._held and (ended is not None or self._held[0][0] < self._shown):
            ready.append(self._held.popleft()[1])
        return Piece(text=text, tokens=ready, generated_tokens=self._generated, finish_reason=ended)
