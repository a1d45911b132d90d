"""JSON that carries its own checksum, so that a flipped bit anywhere in it is found. Knows no files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = "own_sha256"
"""The last key: SHA-256 of the canonical text of all the others."""


def seal(plain: Mapping[str, Any]) -> bytes:
    """The file's bytes; `plain` must be JSON as it reads back (text for keys, no tuples)."""
    return _text({**plain, SEAL: _sum(plain)})


def unseal(content: bytes) -> dict[str, Any]:
    """What was sealed; ValueError where a single byte is not as it was written, layout and spaces included."""
    plain = json.loads(content)
    if not isinstance(plain, dict):
        raise ValueError("no JSON object")
    said = plain.pop(SEAL, None)
    if said is None:
        raise ValueError("its own checksum is missing")
    if said != _sum(plain) or content != _text({**plain, SEAL: said}):
        raise ValueError("it does not match its own SHA-256")
    return plain


def _sum(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(plain)).hexdigest()


def _text(plain: Mapping[str, Any]) -> bytes:
    return json.dumps(plain, indent=1).encode()
