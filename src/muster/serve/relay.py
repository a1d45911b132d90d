"""What lets another replica go on with an answer: the `relay` field of a body, and marks in its stream.

A body with `relay` (an extension, made for `serve/router`) gets, in front of each event of its stream, a line that
says which token ids the event delivers:

    : relay [index, [ids], characters, generated, finished]

characters and generated count from the choice's beginning. Such lines are comments of server-sent events, which
clients skip. When the replica dies, the same body goes to another with what the marks have said in `relay.choices`
(seed included: draws depend on seed and position alone), and its stream begins where the other was cut. A stream that
fails says `: lost` in front of its error. Only choices of which an event was delivered are listed.
"""

from __future__ import annotations

from typing import Annotated

import orjson
from pydantic import BaseModel, ConfigDict, Field

MARK, LOST = b": relay ", b": lost"

Count = Annotated[int, Field(ge=0, le=2**31)]


class Progress(BaseModel):
    """What has been delivered of one choice."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    index: Count
    ids: list[Count]
    characters: Count
    """Of text; the last of `ids` may reach beyond, where a stop string may begin."""
    generated: Count
    """Tokens, those included that delivered nothing."""
    finished: bool


class Relay(BaseModel):
    """The `relay` field."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,80}$")]
    """Of the answer,"""
    created: Annotated[int, Field(ge=0, lt=2**53)]
    """and its time, as further replicas are to repeat them."""
    choices: list[Progress] = []

    def of(self, index: int) -> Progress | None:
        """What has been delivered of a choice; None where nothing has."""
        return next((one for one in self.choices if one.index == index), None)


def mark(progress: Progress) -> bytes:
    """The line in front of an event that delivers `progress.ids`."""
    line = [progress.index, progress.ids, progress.characters, progress.generated, progress.finished]
    return MARK + orjson.dumps(line) + b"\n"


def read_mark(line: bytes) -> Progress:
    """What a mark says, from its line."""
    index, ids, characters, generated, finished = orjson.loads(line[len(MARK) :])
    return Progress.model_construct(
        index=index, ids=ids, characters=characters, generated=generated, finished=finished
    )
