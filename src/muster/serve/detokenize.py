"""From a stream of token ids to a stream of text that never has to be taken back.

Two small machines: `Detokenizer` holds back a character whose bytes have not all arrived, and
`StopStrings` holds back what may turn out to be the beginning of a stop string. Both know
tokenizers only as a `decode` function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_PARTIAL = 3
"""Tokens that an incomplete UTF-8 character can span at most: it has at most 3 of its 4 bytes."""
_CONTEXT = 6
"""Tokens of the prompt that are decoded along with the first generated ones."""


class Detokenizer:
    """Incremental detokenisation of one sequence; the pieces concatenate to the text of all its tokens.

    `before` holds the token ids that precede the sequence: some tokenizers' spacing depends on them.
    """

    def __init__(self, decode: Decode, before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._context = list(before)[-_CONTEXT:]
        self._known = len(decode(self._context)) if self._context else 0
        """Characters of the context."""
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Add one token; returns the text that is now certain, possibly none."""
        self._pending.append(token)
        text = self._decode_pending(len(self._pending))
        if not text.endswith(_REPLACEMENT):
            return self._finish(len(self._pending), text)
        # The end may be an unfinished character, or bytes that never make one: find how far it is certain.
        for cut in range(len(self._pending) - 1, max(len(self._pending) - 1 - _LONGEST_PARTIAL, 0), -1):
            head = self._decode_pending(cut)
            if head + self._decode(self._pending[cut:]) == text:  # no character straddles the cut
                return self._finish(cut, head)
        return ""

    def flush(self) -> str:
        """The rest of the text when no token follows: unfinished characters as U+FFFD."""
        return self._finish(len(self._pending), self._decode_pending(len(self._pending)))

    def _decode_pending(self, count: int) -> str:
        return self._decode(self._context + self._pending[:count])[self._known :]

    def _finish(self, count: int, text: str) -> str:
        if count:
            self._context, self._pending = self._pending[:count], self._pending[count:]
            self._known = len(self._decode(self._context))
        return text


class StopStrings:
    """Passes text on up to the first of its stop strings, wherever the pieces are cut."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Add text; returns what can be shown. Sets `found` at a stop string, of which nothing is shown."""
        if not self._stops:
            return piece
        text = self._held + piece
        # The one that ends first, so that the outcome does not depend on how the text is cut into pieces.
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.found, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when no text follows."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, and is not all of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
