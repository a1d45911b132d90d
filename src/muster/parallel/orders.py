"""What each rank of a pipeline schedule does, in order, as plain data: for simulation before anything runs.

The orders of the schedules with several stages a rank are read from torch's classes, which execute these lists.
GPipe and 1F1B are loops in torch and executed from no list, so theirs are written out here.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.distributed.pipelining.schedules import get_schedule_class

from muster.parallel.schedules import SCHEDULES, stages_of_rank
from muster.parallel.simulate import Action, Kind

_KINDS: dict[str, Kind] = {"F": "F", "B": "B", "I": "I", "W": "W"}


def orders(schedule: str, *, ranks: int, stages_per_rank: int, microbatches: int) -> list[list[Action]]:
    """The actions of each rank; there must be no `schedule_problems`."""
    if schedule == "gpipe":
        return [_gpipe(rank, microbatches) for rank in range(ranks)]
    if schedule == "1f1b":
        return [_1f1b(rank, ranks, microbatches) for rank in range(ranks)]
    # The lists depend on these figures only, so stand-ins for the stages of rank 0 do.
    stages = [
        SimpleNamespace(
            stage_index=stage,
            num_stages=ranks * stages_per_rank,
            group_size=ranks,
            group_rank=0,
            submod=nn.Identity(),
        )
        for stage in stages_of_rank(schedule, 0, ranks, stages_per_rank)
    ]
    built: Any = get_schedule_class(SCHEDULES[schedule].torch_name)(stages, microbatches)
    return [_flat(built.pipeline_order[rank]) for rank in range(ranks)]


def _gpipe(rank: int, microbatches: int) -> list[Action]:
    forward = [Action(rank, "F", index) for index in range(microbatches)]
    return forward + [Action(rank, "B", index) for index in range(microbatches)]


def _1f1b(rank: int, ranks: int, microbatches: int) -> list[Action]:
    ahead = ranks - 1 - rank
    forward = [Action(rank, "F", index) for index in range(microbatches)]
    backward = [Action(rank, "B", index) for index in range(microbatches)]
    pairs = zip(forward[ahead:], backward, strict=False)
    return [
        *forward[:ahead],
        *(action for pair in pairs for action in pair),
        *backward[microbatches - ahead :],
    ]


def _flat(actions: list[Any]) -> list[Action]:
    """Idle slots left out, and a forward and a backward that torch runs as one action (DualPipeV) as two."""
    found = []
    for action in actions:
        if action is None:
            continue
        for part in action.sub_actions or (action,):
            found.append(Action(part.stage_index, _KINDS[part.computation_type.value], part.microbatch_index))
    return found
