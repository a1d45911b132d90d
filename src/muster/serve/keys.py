"""Who may ask: API keys from a file or the environment, of which only hashes are kept.

One `key` or `name: key` a line, and `trusted` behind it where that client may say how urgent its requests are
(`priority` below 0) and for whom they are (`user`). Names go to logs and metrics; keys go nowhere.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from muster.errors import UsageError

VARIABLE = "MUSTER_KEYS"
SHORTEST = 16
"""Characters of a key that cannot be guessed."""

_LINE = re.compile(r"(?:(?P<name>[A-Za-z0-9._-]{1,64}):\s+)?(?P<key>[!-~]+)(?P<trusted>\s+trusted)?")


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks."""

    name: str = ""
    trusted: bool = True
    """May say the priority of its requests, and whom they are for."""


ANYONE = Client()
"""Whoever asks a server without keys, which only this machine can reach."""


class Keys:
    """The keys that a server accepts; without any, everyone is `ANYONE`."""

    def __init__(self, clients: Iterable[tuple[str, Client]] = ()) -> None:
        self._clients = [(_digest(key.encode()), client) for key, client in clients]

    def __bool__(self) -> bool:
        return bool(self._clients)

    def client_of(self, authorization: bytes | None) -> Client | None:
        """Whose key an Authorization header carries; None for none of them. Takes as long whichever it is."""
        if not self._clients:
            return ANYONE
        scheme, _, key = (authorization or b"").strip().partition(b" ")
        digest = _digest(key.strip())
        found: Client | None = None
        for known, client in self._clients:
            if hmac.compare_digest(known, digest):
                found = client
        return found if scheme.lower() == b"bearer" else None


def read_keys(file: Path | None, environment: Mapping[str, str]) -> Keys:
    """Keys of a file and of MUSTER_KEYS (there, commas part lines, too); raises UsageError, which shows no key."""
    sources: list[tuple[str, list[str]]] = []
    if file is not None:
        try:
            sources.append((str(file), file.read_text("utf-8").splitlines()))
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise UsageError(f"the keys in {file} cannot be read: {reason}") from None
    if environment.get(VARIABLE):
        sources.append((VARIABLE, environment[VARIABLE].replace(",", "\n").splitlines()))
    clients: dict[str, Client] = {}
    for source, lines in sources:
        for number, line in enumerate(lines, start=1):
            if line.strip() and not line.lstrip().startswith("#"):
                key, client = _parsed(line.strip(), f"{source}, line {number}", len(clients) + 1)
                if key in clients or any(client.name == other.name for other in clients.values()):
                    raise UsageError(f"{source}, line {number}: this key or its name is there twice")
                clients[key] = client
    if sources and not clients:
        raise UsageError(f"{' and '.join(name for name, _ in sources)} hold no key: write one a line")
    return Keys(clients.items())


def _parsed(line: str, where: str, number: int) -> tuple[str, Client]:
    found = _LINE.fullmatch(line)
    if found is None:
        raise UsageError(f"{where}: write `key`, `name: key` or `name: key trusted`")
    if len(found["key"]) < SHORTEST:
        raise UsageError(
            f"{where}: a key of {len(found['key'])} characters can be guessed; use at least {SHORTEST}, "
            f"such as those of `openssl rand -hex 32`"
        )
    return found["key"], Client(found["name"] or f"key-{number}", trusted=bool(found["trusted"]))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
