"""One request as text: the engine's tokens, detokenised, cut at stop strings, cancelled when nobody listens.

Everything that shows generated text (HTTP, `muster chat`) reads it from here.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from muster.serve.detokenize import Decode, Detokenizer, StopStrings
from muster.serve.protocol import Engine, FinishReason, Request, Token


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Text that has become certain, with the tokens whose text begins in it."""

    text: str
    tokens: tuple[Token, ...] = ()
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
        self._repeated = (
            len(self.delivered) - certain
        )  # delivered, as what followed showed that no stop begins

    def close(self) -> None:
        """Cancel whatever is still being generated."""
        self._engine.cancel(self.request.id)

    async def pieces(self) -> AsyncGenerator[Piece]:
        """Text as it becomes certain; the last piece has a finish reason. Raises EngineError."""
        known = self._known  # characters of detokenised text
        shown = len(self.delivered)  # characters of it that have been passed on
        held: list[tuple[int, Token]] = []  # tokens not passed on, by the position where their text begins
        generated = len(self.request.generated)
        async for token in self._tokens:
            generated += 1
            ended = token.finish_reason
            piece = ""
            if token.id not in self.request.params.stop_ids:  # the end-of-sequence token is no text
                held.append((known, token))
                piece = self._text.push(token.id)
            if ended is not None:
                piece += self._text.flush()
            known += len(piece)
            text = self._stop.push(piece)
            if ended is not None and not self._stop.found:
                text += self._stop.flush()
            text, self._repeated = text[self._repeated :], max(0, self._repeated - len(text))
            if self._stop.found:
                ended = "stop"
                self.close()
                held = [(start, token) for start, token in held if start < shown + len(text)]
            shown += len(text)
            ready = tuple(token for start, token in held if start < shown or ended is not None)
            if text or ended is not None:
                held = [(start, token) for start, token in held if start >= shown]
                yield Piece(text=text, tokens=ready, generated_tokens=generated, finish_reason=ended)
            if ended is not None:
                return
