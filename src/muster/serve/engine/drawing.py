"""From a step's logits to the tokens of its requests: what each asks to change about them, the draw, what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from muster.serve.adjust import Adjustment, adjust
from muster.serve.engine.scheduler import Work
from muster.serve.engine.sequence import Sequence as Scheduled
from muster.serve.guide import Matcher
from muster.serve.protocol import EngineError, FinishReason, Request, Token
from muster.serve.sampler import sample, top_logprobs

Logprob = tuple[float | None, tuple[tuple[int, float], ...]]


@dataclass(slots=True, eq=False)
class Live:
    """An accepted request."""

    request: Request
    sequence: Scheduled
    seed: int
    adjustment: Adjustment | None
    matcher: Matcher | None
    guessed: bool
    """Whether its next tokens may be guessed."""

    @property
    def generated(self) -> int:
        return len(self.sequence.tokens) - self.sequence.prompt_tokens


@dataclass(frozen=True, slots=True)
class Drawn:
    """What came of each row of logits."""

    ids: Sequence[int]
    sound: Sequence[bool]
    """Whether the row was finite."""
    logprobs: dict[int, Logprob]
    """By row, where they are asked for: as they were before anything changed them."""
    lost: dict[Live, EngineError]
    """Requests whose guide has failed."""


def draw(owners: Sequence[Live], positions: Sequence[int], logits: Tensor) -> Drawn:
    """A token for each row of logits (W, V), which are changed in place. `owners` are the rows' requests, `positions`
    how many tokens each has generated before it."""
    asked = [row for row, live in enumerate(owners) if live.request.params.logprobs is not None]
    raw = logits[asked] if asked else None
    lost = _changed(owners, logits)
    params, seeds = [live.request.params for live in owners], [live.seed for live in owners]
    ids, sound = sample(logits, params, seeds, positions)
    logprobs: dict[int, Logprob] = {}
    if raw is not None:
        counts = [params[row].logprobs or 0 for row in asked]
        logprobs = dict(zip(asked, top_logprobs(raw, [ids[row] for row in asked], counts), strict=True))
    return Drawn(ids, sound, logprobs, lost)


def accepted(live: Live, work: Work, rows: Sequence[int], drawn: Drawn) -> list[Token]:
    """A work's new tokens: as long as what was drawn is what had been guessed, the next row counts too."""
    params = live.request.params
    left = params.max_tokens - live.generated
    tokens: list[Token] = []
    for row in rows:
        id, left = drawn.ids[row], left - 1
        reason: FinishReason | None = "length" if left == 0 else None
        if live.matcher is not None:
            live.matcher.push(id)
        if id in params.stop_ids or (live.matcher is not None and live.matcher.ended):
            reason = "stop"
        logprob, top = drawn.logprobs.get(row, (None, ()))
        tokens.append(Token(id=id, logprob=logprob, top_logprobs=top, finish_reason=reason))
        if reason is not None or len(tokens) > len(work.draft) or id != work.draft[len(tokens) - 1]:
            break
    return tokens


def _changed(owners: Sequence[Live], logits: Tensor) -> dict[Live, EngineError]:
    """What the requests change about logits (W, V), in place; and those whose guide has failed."""
    adjusted = [(row, live.adjustment) for row, live in enumerate(owners) if live.adjustment is not None]
    if adjusted:
        adjust(logits, [row for row, _ in adjusted], [one for _, one in adjusted])
    lost = {}
    for row, live in enumerate(owners):
        if live.matcher is not None:
            try:
                live.matcher.forbid(logits[row])
            except ValueError as error:
                lost[live] = EngineError(f"the text cannot be continued as asked for: {error}")
    return lost
