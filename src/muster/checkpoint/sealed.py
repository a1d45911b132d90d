"""JSON that carries its own checksum, so that a flipped bit anywhere in it is found. Knows no files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = "own_sha256"
"""The last key: SHA-256 of the canonical text of all the others."""


def seal(plain: Mapping[str, Any]) -> bytes:
    """The file's bytes; `plain` must be JSON as it reads back (text for keys, no tuples), and not empty."""
    text = json.dumps(plain, indent=1).encode()
    own = hashlib.sha256(text).hexdigest()
    return text.removesuffix(b"\n}") + f',\n "{SEAL}": "{own}"\n}}'.encode()


def unseal(content: bytes) -> dict[str, Any]:
    """What was sealed; ValueError where a single byte is not as it was written, layout and spaces included."""
    plain = json.loads(content)
    if not isinstance(plain, dict):
        raise ValueError("no JSON object")
    if plain.pop(SEAL, None) is None:
        raise ValueError("its own checksum is missing")
    if not plain or content != seal(plain):
        raise ValueError("it does not match its own SHA-256")
    return plain
