"""How the batch of a step is divided among replica groups: the same samples whoever is alive, each in one place.

A group is a copy of the layout without its replicate axis. The batch is so many turns, in each of which every data
part of a group takes a microbatch; turns are dealt as evenly as their number allows. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from muster.errors import ConfigError
from muster.parallel.schedules import schedule_problems
from muster.train.plan import Plan, Training


def one_group(plan: Plan) -> Plan:
    """The plan of one group, which may have to take the whole batch."""
    layout = plan.layout
    alone = replace(layout, replicate=1, accumulate=layout.accumulate * layout.replicate)
    return replace(plan, layout=alone)


def refuse_divisions(plan: Plan) -> None:
    """ConfigError where so many groups as may be alive could not divide the batch."""
    layout, turns = plan.layout, plan.layout.accumulate * plan.layout.replicate
    for groups in range(1, layout.replicate + 1):
        for count in sorted({turns // groups, -(-turns // groups)}):
            for problem in schedule_problems(
                layout.schedule,
                ranks=layout.pipeline,
                stages_per_rank=layout.virtual,
                microbatches=count,
                sequences=count * layout.microbatch,
                recompute=layout.recompute == "full",
            ):
                raise ConfigError(
                    [
                        f"layout.schedule: with {groups} of {layout.replicate} groups alive, one would have {count} of "
                        f"the {turns} microbatches: {problem}"
                    ]
                )


def turns_of(turns: int, groups: int, position: int) -> range:
    """Which of `turns` a group takes."""
    return range(position * turns // groups, (position + 1) * turns // groups)


def sample_ranges(group: Training, batch: int, part: int, turns: range) -> Iterator[range]:
    """The numbers of the samples in each microbatch of one data part of a group; `batch` is the batch's number."""
    size, parts = group.layout.microbatch, group.layout.data
    first = batch * group.sequences_per_batch
    for turn in turns:
        start = first + (turn * parts + part) * size
        yield range(start, start + size)
