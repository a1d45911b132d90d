"""What the router has to know of a request: whether it streams, about how long it is, and how its prompt begins.

Bodies are passed on byte for byte; what the router adds is put before their last brace.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from muster.serve.router.policy import PROMPT_SHARE

GENERATING = ("/v1/completions", "/v1/chat/completions")
MODEL = "/v1/models/"
"""A model's own path."""
BLOCK_TOKENS, BLOCK_CHARACTERS = 16, 64
"""What one key of a prompt's beginning stands for."""
MOST_BLOCKS = 256
CHARACTERS_PER_TOKEN = 4
"""Roughly; prompts are not tokenised here."""
DEFAULT_TOKENS = {"/v1/completions": 16, "/v1/chat/completions": 256}
"""Guess at the length of an answer that says no max_tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A request as the router sees it."""

    body: bytes
    """As the client sent it."""
    model: str | None = None
    """What it is to be answered by, if it says so."""
    generates: bool = False
    """Whether it is a valid request for text, and `body` an object."""
    streams: bool = False
    prompt_cost: float = 1.0
    output_tokens: int = 0
    keys: Sequence[int] = ()
    """Of the blocks that the prompt begins with."""
    seed: int | None = None
    """To be added, as the client has given none: without it, a second replica would say something else."""

    @property
    def cost(self) -> float:
        return self.prompt_cost + self.output_tokens

    def with_fields(self, **fields: Any) -> bytes:
        """The body with a seed, if it needs one, and with `fields`."""
        added = fields if self.seed is None else {"seed": self.seed, **fields}
        if not added:
            return self.body
        head = self.body.rstrip()[:-1].rstrip()
        comma = b"" if head.endswith(b"{") else b","
        return head + comma + orjson.dumps(added)[1:]


def read(path: str, body: bytes) -> Asked:
    """A request's body; what cannot be read is for the replica to refuse."""
    if path not in GENERATING:
        return Asked(body=body, model=path.removeprefix(MODEL) if path.startswith(MODEL) else None)
    try:
        fields = orjson.loads(body)
    except ValueError:
        return Asked(body=body)
    if not isinstance(fields, dict) or "relay" in fields:
        return Asked(body=body)
    asked = fields.get("max_completion_tokens") or fields.get("max_tokens")
    choices = fields.get("n") if isinstance(fields.get("n"), int) else 1
    length, keys = _prompt(fields)
    output = asked if isinstance(asked, int) and 0 < asked < 1 << 20 else DEFAULT_TOKENS[path]
    return Asked(
        body=body,
        model=fields.get("model") if isinstance(fields.get("model"), str) else None,
        generates=True,
        streams=fields.get("stream") is True,
        prompt_cost=PROMPT_SHARE * length,
        output_tokens=output * max(1, min(choices or 1, 128)),
        keys=keys,
        seed=secrets.randbits(62) if fields.get("seed") is None else None,
    )


def _prompt(fields: dict[str, Any]) -> tuple[int, list[int]]:
    """(about how many tokens, keys of its beginning) of a body's prompt or messages."""
    prompt = fields.get("prompt", fields.get("messages"))
    model = hash(str(fields.get("model")))
    if isinstance(prompt, list) and prompt:
        if isinstance(prompt[0], int):
            return len(prompt), _keys(model, prompt, BLOCK_TOKENS)
        if isinstance(prompt[0], list):
            return sum(len(one) for one in prompt if isinstance(one, list)), _keys(
                model, prompt[0], BLOCK_TOKENS
            )
        if isinstance(prompt[0], dict):
            prompt = "\n".join(
                f"{one.get('role')} {one.get('content')}" for one in prompt if isinstance(one, dict)
            )
        else:
            prompt = str(prompt[0])
    text = prompt if isinstance(prompt, str) else ""
    return len(text) // CHARACTERS_PER_TOKEN + 1, _keys(model, text, BLOCK_CHARACTERS)


def _keys(parent: int, prompt: str | list[Any], size: int) -> list[int]:
    """A key for each whole block, each of which stands for all before it."""
    keys = []
    for start in range(0, min(len(prompt) - size + 1, MOST_BLOCKS * size), size):
        block = prompt[start : start + size]
        try:
            parent = hash((parent, block if isinstance(block, str) else tuple(block)))
        except TypeError:  # no token ids: for the replica to refuse
            break
        keys.append(parent)
    return keys
