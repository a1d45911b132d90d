"""Structured output: which tokens may come next for the text to become what a request asks for.

llguidance does it (about 50 us a token for a vocabulary of 128k); here it meets our tokenizer and our logits.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from muster.errors import MissingExtra, UsageError
from muster.serve.protocol import Guide

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from torch import Tensor


class Matcher:
    """One sequence on its way through a guide."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def ended(self) -> bool:
        """Whether the text is complete and nothing may follow."""
        return bool(self._matcher.is_stopped())

    def forbid(self, row: Tensor) -> None:
        """Set the logits (V,) of tokens that may not come next to -inf; raises ValueError where the library fails."""
        import torch  # the server's process checks guides without it

        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise ValueError(_first_line(self._matcher.get_error()))
        allowed = np.unpackbits(bits, bitorder="little", count=len(row))
        row.masked_fill_(torch.from_numpy(allowed == 0).to(row.device), -torch.inf)

    def push(self, token: int) -> None:
        """A token has been drawn."""
        self._matcher.consume_token(token)


class Guides:
    """Makes matchers for one tokenizer. `read` gives the text of its tokenizer.json, its tokens and the ids that end
    a text, when they are needed first."""

    def __init__(self, read: Callable[[], tuple[str, int, Iterable[int]]]) -> None:
        self._read = read
        self._made: LLTokenizer | None = None
        self._making = threading.Lock()

    def _tokenizer(self) -> LLTokenizer:
        with self._making:
            if self._made is None:
                try:
                    from llguidance import LLTokenizer
                except ModuleNotFoundError:
                    raise MissingExtra("structured output", "serve") from None
                text, vocab, ends = self._read()
                self._made = LLTokenizer(text, n_vocab=vocab, eos_token=sorted(ends))
            return self._made

    def start(self, guide: Guide) -> Matcher:
        """The beginning of a guide; raises UsageError for one that makes no sense, and MissingExtra."""
        tokenizer = self._tokenizer()
        from llguidance import LLMatcher

        try:
            grammar = _grammar(guide)
        except ValueError as error:  # llguidance's, of broken JSON
            raise UsageError(f"the {guide.kind} guide is not valid: {error}") from None
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        matcher.compute_bitmask()  # says of some only now that no text can ever match, as of {"$ref": "#"}
        if matcher.is_error():
            raise UsageError(f"the {guide.kind} guide is not valid: {_first_line(matcher.get_error())}")
        return Matcher(matcher)


def guides_of(folder: Path) -> Guides:
    """Structured output of a folder's tokenizer."""

    def read() -> tuple[str, int, Iterable[int]]:
        from muster.serve.codec import TextCodec  # a tenth of a second

        return TextCodec.from_folder(folder).guided()

    return Guides(read)


def _grammar(guide: Guide) -> str:
    from llguidance import LLMatcher

    if guide.kind == "json":
        # Without the library's default of any white space between tokens, in which a small model may get lost.
        made: str = LLMatcher.grammar_from_json_schema(guide.text, defaults={"whitespace_flexible": False})
    elif guide.kind == "regex":
        made = LLMatcher.grammar_from_regex(guide.text)
    else:
        choices = json.loads(guide.text)
        made = LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in choices))
    return made


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0][:300] if message.strip() else "no reason given"
