"""One HTTP request on its way through the server: who it is, what it costs, and what is known in the end."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import orjson
from starlette.types import Scope

from muster.errors import UsageError
from muster.serve.keys import ANYONE, Client

_LONGEST_PATH = 200
_KEY = "visit"


@dataclass(slots=True)
class Visit:
    """A request and its answer. Times are those of `time.perf_counter`."""

    id: str
    method: str
    path: str
    peer: str
    client: Client = ANYONE
    began_s: float = field(default_factory=time.perf_counter)
    status: int = 0
    """Of the answer; 0 when the client left before there was one."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_s: float | None = None
    """When the first text came."""

    def enter(self, scope: Scope) -> None:
        """Make it known to whoever sees the request."""
        scope.setdefault("state", {})[_KEY] = self

    @classmethod
    def of(cls, scope: Scope) -> Visit:
        visit: Visit = scope["state"][_KEY]
        return visit

    def facts(self) -> dict[str, Any]:
        """A line of the access log."""
        facts: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": self.id,
            "client": self.client.name,
            "peer": self.peer,
            "method": self.method,
            "path": self.path[:_LONGEST_PATH],
            "status": self.status,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "seconds": round(time.perf_counter() - self.began_s, 6),
        }
        if self.first_s is not None:
            facts["ttft_seconds"] = round(self.first_s - self.began_s, 6)
        return facts


class AccessLog:
    """A JSON line for each answered request: no prompt, no answer, no key. A full disk costs lines, not requests."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, visit: Visit) -> None:
        with contextlib.suppress(OSError):
            self._file.write(orjson.dumps(visit.facts(), option=orjson.OPT_APPEND_NEWLINE))
            self._file.flush()


@contextlib.contextmanager
def open_log(path: Path | None) -> Iterator[AccessLog | None]:
    """A log that appends to a file, or writes to standard output for `-`; raises UsageError where it cannot."""
    if path is None:
        yield None
    elif str(path) == "-":
        yield AccessLog(sys.stdout.buffer)
    else:
        try:
            file = path.open("ab")
        except OSError as error:
            raise UsageError(f"the access log {path} cannot be written: {error.strerror}") from None
        with file:
            yield AccessLog(file)
