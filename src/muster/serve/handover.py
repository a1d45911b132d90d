"""The replicas' side of disaggregated prefill: one computes a prompt and leaves its blocks in a file for another.

Between a router and replicas that it has started itself (`router/handover.py`), on one machine: the file is in a
folder of the router's, in memory, and whoever asks shows a secret that only they know. Clients cannot reach any of it.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from muster.serve.protocol import Engine, Request, SamplingParams

VARIABLE = "MUSTER_HANDOVER"
"""In a replica's environment: SECRET:FOLDER."""
SECRET, FILE = "x-muster-handover", "x-muster-blocks"
"""Headers: the secret, and the name of a file in the folder."""
TAKE = "/internal/blocks"

_NAME = re.compile(r"[0-9a-f]{32}")


@runtime_checkable
class Mover(Protocol):
    """An engine whose blocks can be moved."""

    async def move_blocks(self, path: Path, prompt: tuple[int, ...] = ()) -> int:
        """Give a prompt's blocks or, without one, take those of a file; how many. 0 where that fails."""
        ...


@dataclass(frozen=True, slots=True)
class Handover:
    """Where blocks lie, and who may have them moved."""

    secret: str
    folder: Path

    @classmethod
    def given(cls, environment: Mapping[str, str]) -> Handover | None:
        secret, _, folder = environment.get(VARIABLE, "").partition(":")
        return cls(secret, Path(folder)) if secret and folder else None

    @property
    def told(self) -> str:
        """The environment variable's value."""
        return f"{self.secret}:{self.folder}"

    def file_of(self, request: HttpRequest) -> Path | None:
        """The file that a request is about; None for a client's."""
        given = request.headers.get(SECRET, "").encode("latin-1")
        name = request.headers.get(FILE, "")
        if not hmac.compare_digest(given, self.secret.encode()) or not _NAME.fullmatch(name):
            return None
        return self.folder / name


async def give(engine: Engine, request: Request, path: Path) -> Response:
    """Compute a request's prompt, and leave its blocks in a file."""
    params = SamplingParams(max_tokens=1, temperature=0.0)
    only = replace(request, id=secrets.token_hex(16), params=params, generated=())
    assert isinstance(engine, Mover)
    try:
        async for _ in engine.submit(only):
            pass
    finally:
        engine.cancel(only.id)
    return JSONResponse({"blocks": await engine.move_blocks(path, only.prompt)})


async def take(engine: Engine, path: Path) -> Response:
    """Take up the blocks of a file."""
    assert isinstance(engine, Mover)
    return JSONResponse({"blocks": await engine.move_blocks(path)})
