"""How one model's text and token ids correspond: tokenizer, beginning of sequence, ends, chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muster.data.tokenizer import Tokenizer
from muster.errors import UsageError
from muster.serve.guide import Guides
from muster.serve.template import PLAIN, ChatTemplate, Message, Tools, read_json, template_of

_SHIELD = "\ufdd0"
"""A noncharacter (never used in text) that keeps what users write from reading as a special token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextCodec:
    """Encodes prompts and messages, decodes completions."""

    tokenizer: Tokenizer
    eos_ids: frozenset[int]
    """Tokens that end a completion."""
    begin: tuple[int, ...] = ()
    """Token ids that start every sequence, put in front of text prompts (not of token-id prompts)."""
    specials: Mapping[str, int] = field(default_factory=dict)
    """Special tokens that a chat template may write; elsewhere the same characters are plain text."""
    template: ChatTemplate = PLAIN
    guides: Guides = field(init=False)
    """What makes structured output of this tokenizer's tokens."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "guides", Guides(self.guided))

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt; an empty one is the beginning of a document."""
        return self.begin + tuple(self.tokenizer.encode(text)) or (self.tokenizer.bos_id,)

    def least_tokens(self, text: str) -> int:
        """Tokens that a text has at least, without encoding it."""
        longest = self.tokenizer.longest
        return 0 if longest is None else -(-len(text) // longest)

    def encode_chat(self, messages: Sequence[Message], tools: Tools = ()) -> tuple[int, ...]:
        """The prompt that asks for the assistant's next message; raises TemplateRefused."""
        ids: list[int] = []
        for part in self._split(self.template.render(self._shield(messages), self._shield(tools))):
            special = self.specials.get(part)
            ids += self.tokenizer.encode(part.replace(_SHIELD, "")) if special is None else [special]
        begun = self.begin and tuple(ids[: len(self.begin)]) == self.begin  # by the template itself
        whole = tuple(ids) if begun else self.begin + tuple(ids)
        return whole or (self.tokenizer.bos_id,)  # a template may write nothing

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def guided(self) -> tuple[str, int, frozenset[int]]:
        """What `Guides` read."""
        return self.tokenizer.to_json(), self.tokenizer.vocab, self.eos_ids

    def _shield(self, content: Any) -> Any:
        """Plain data whose texts hold no special token."""
        if isinstance(content, Mapping):
            return {self._shield(name): self._shield(value) for name, value in content.items()}
        if isinstance(content, (list, tuple)):
            return [self._shield(value) for value in content]
        if isinstance(content, str):
            for special in self.specials:
                content = content.replace(special, special[0] + _SHIELD + special[1:])
        return content

    def _split(self, text: str) -> list[str]:
        """Special tokens and the text between them."""
        if not self.specials:
            return [text]
        longest_first = sorted(self.specials, key=len, reverse=True)
        return [part for part in re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if part]

    @classmethod
    def from_folder(cls, folder: Path) -> TextCodec:
        """Read a folder in Hugging Face layout; raises UsageError when it has no tokenizer."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UsageError(
                f"{folder} has no tokenizer.json: export the model with `muster export`, or add one"
            )
        tokenizer = Tokenizer.from_file(file)
        content = read_json(file)
        specials = {
            token["content"]: int(token["id"])
            for token in content.get("added_tokens") or []
            if token.get("special") and token.get("content")
        }
        return cls(
            tokenizer=tokenizer,
            eos_ids=_eos_ids(folder) or frozenset({tokenizer.eos_id}),
            begin=(tokenizer.bos_id,) if _begins(folder, content, tokenizer.bos) else (),
            specials=specials,
            template=template_of(folder),
        )


def _eos_ids(folder: Path) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        ids: Any = read_json(folder / name).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        if ids and all(isinstance(id, int) for id in ids):
            return frozenset(ids)
    return frozenset()


def _begins(folder: Path, tokenizer: Mapping[str, Any], bos: str) -> bool:
    """Whether text starts with bos: tokenizer_config.json's word, else what the post-processor would do."""
    said = read_json(folder / "tokenizer_config.json").get("add_bos_token")
    if isinstance(said, bool):
        return said
    processor = tokenizer.get("post_processor") or {}
    for one in processor.get("processors", [processor]):
        first: Any = next(iter(one.get("single") or []), None)
        if isinstance(first, dict) and first.get("SpecialToken", {}).get("id") == bos:
            return True
    return False
