"""Pipeline schedules by name: how each places stages on ranks, and what it asks of a run before it can start.

Pure; knows no torch. What each schedule asks was found by building and simulating torch 2.13's schedules over
ranks, stages and microbatches (`tests/parallel/test_schedules.py` repeats it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

_MOST_MICROBATCHES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A pipeline schedule's fixed properties."""

    torch_name: str
    """What `torch.distributed.pipelining.schedules.get_schedule_class` calls it."""
    stages_per_rank: int
    """The default, which `variable` schedules can change."""
    variable: bool = False
    v_shaped: bool = False
    """Stages go down the ranks and back up, so that the first and the last stage share a rank."""
    splits_backward: bool = False
    """The gradients of inputs and of weights are computed in two passes. Gathered weights must then stay gathered
    from forward to backward (FSDP2's reshard_after_forward=False): torch loses the gradients of others."""
    least_microbatches: Callable[[int], int] = lambda ranks: 1
    whole_rounds: bool = False
    """Microbatches come in rounds of about one for each rank, all of the same size."""


SCHEDULES = {
    # Huang et al. 2019.
    "gpipe": Schedule(torch_name="GPipe", stages_per_rank=1),
    # Narayanan et al. 2019.
    "1f1b": Schedule(torch_name="1F1B", stages_per_rank=1, least_microbatches=lambda ranks: ranks),
    # Narayanan et al. 2021.
    "interleaved": Schedule(
        torch_name="Interleaved1F1B", stages_per_rank=2, variable=True, whole_rounds=True
    ),
    # Qi et al. 2023, their ZB1P over several stages a rank.
    "interleaved-zero-bubble": Schedule(
        torch_name="InterleavedZeroBubble",
        stages_per_rank=2,
        variable=True,
        splits_backward=True,
        whole_rounds=True,
    ),
    # Qi et al. 2023, section 6.
    "zbv": Schedule(torch_name="ZBVZeroBubble", stages_per_rank=2, v_shaped=True, splits_backward=True),
    # DeepSeek-AI 2024, the variant that folds DualPipe's two copies of the weights into one.
    "dualpipev": Schedule(
        torch_name="DualPipeV",
        stages_per_rank=2,
        v_shaped=True,
        splits_backward=True,
        least_microbatches=lambda ranks: 2 * ranks,
    ),
}


def stages_of_rank(schedule: str, rank: int, ranks: int, stages_per_rank: int) -> list[int]:
    """The stages that a rank holds, in ascending order."""
    if SCHEDULES[schedule].v_shaped:
        return [rank, 2 * ranks - 1 - rank]
    return [rank + turn * ranks for turn in range(stages_per_rank)]


def rank_of_stage(schedule: str, stage: int, ranks: int) -> int:
    if SCHEDULES[schedule].v_shaped and stage >= ranks:
        return 2 * ranks - 1 - stage
    return stage % ranks


def schedule_problems(
    schedule: str,
    *,
    ranks: int,
    stages_per_rank: int,
    microbatches: int,
    sequences: int,
    recompute: bool = False,
) -> list[str]:
    """Why this schedule cannot run, one sentence each with the nearest legal values; empty where it can.

    `sequences`: those of one data rank's step, which its microbatches share out; `recompute`: whole blocks are run
    again in the backward pass.
    """
    kind = SCHEDULES[schedule]
    found = []
    if not kind.variable and stages_per_rank != kind.stages_per_rank:
        found.append(
            f"schedule {schedule} holds {kind.stages_per_rank} stages on each rank, not {stages_per_rank}: "
            f"leave the number of stages out, or use schedule interleaved"
        )
    if not _runs(kind, ranks, microbatches):
        found.append(
            f"schedule {schedule} on {ranks} pipeline ranks cannot run {microbatches} microbatches a step: "
            f"{_other_microbatches(kind, ranks, microbatches, sequences)}"
        )
    if recompute and kind.splits_backward:
        # Measured: the passes that follow the first each unpack, and so recompute, the block anew.
        found.append(
            f"schedule {schedule} splits the backward pass, and torch would then recompute a block once for each of "
            f"its weights: use recompute none, or schedule 1f1b or interleaved"
        )
    return found


def _runs(kind: Schedule, ranks: int, microbatches: int) -> bool:
    if microbatches < kind.least_microbatches(ranks):
        return False
    rounds = max(microbatches // ranks, 1)
    return not kind.whole_rounds or microbatches % rounds == 0


def _other_microbatches(kind: Schedule, ranks: int, microbatches: int, sequences: int) -> str:
    """How else to share out a rank's sequences, or how many of them can be."""
    legal = [n for n in range(1, sequences + 1) if sequences % n == 0 and _runs(kind, ranks, n)]
    near = [n for n in legal if n > microbatches][:1] + [n for n in legal if n < microbatches][-1:]
    if near:
        sizes = " or ".join(str(sequences // n) for n in near)
        return f"use layout.microbatch {sizes} for the {sequences} sequences of a rank"
    needed = next(n for n in range(sequences + 1, _MOST_MICROBATCHES) if _runs(kind, ranks, n))
    return (
        f"the {sequences} sequences of a rank are too few; use fewer replicate, shard or pipeline ranks, or a "
        f"train.batch_tokens that gives each rank {needed} sequences"
    )


def in_flight(
    schedule: str, rank: int, *, ranks: int, stages_per_rank: int, microbatches: int
) -> list[dict[int, int]]:
    """Of how many microbatches each stage of a rank keeps activations: the combinations among which the most is.

    Where the backward pass is split, a microbatch's are kept until the gradients of the weights are done. Never too
    few; too many for some schedules with fewer microbatches than they can use.
    """
    own = stages_of_rank(schedule, rank, ranks, stages_per_rank)
    kind = SCHEDULES[schedule]
    if schedule == "gpipe":
        found = [dict.fromkeys(own, microbatches)]
    elif schedule == "1f1b":
        found = [dict.fromkeys(own, ranks - rank)]
    elif kind.v_shaped:
        down = 2 * ranks - rank
        found = [dict(zip(own, counts, strict=True)) for counts in ((down, rank), (down - 1, rank + 1))]
        if schedule == "dualpipev":
            found = [dict(zip(own, (down, rank + 1), strict=True))]
    else:
        found = list(_interleaved(own, rank, ranks, microbatches, splits=kind.splits_backward))
    return [{stage: min(count, microbatches) for stage, count in counts.items()} for counts in found]


def _interleaved(
    own: list[int], rank: int, ranks: int, microbatches: int, *, splits: bool
) -> Iterator[dict[int, int]]:
    """After each forward pass. A round of microbatches goes forward on each stage in turn, and backward in reverse."""
    a_round = microbatches // max(microbatches // ranks, 1)
    ahead = (len(own) - 1) * a_round + (1 if splits else 2) * (ranks - 1 - rank)
    now = dict.fromkeys(own, 0)
    for passes in range(len(own) * microbatches):
        now[own[passes // a_round % len(own)]] += 1
        yield dict(now)
        done = passes - ahead - (rank if splits else 0)  # gradients of weights follow `rank` passes later
        if done >= 0:
            now[own[-1 - done // a_round % len(own)]] -= 1
