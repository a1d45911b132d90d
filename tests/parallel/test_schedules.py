"""What the schedules ask for is what torch's classes ask for, and each order can be carried out."""

from __future__ import annotations

import pytest

from muster.parallel.orders import orders
from muster.parallel.schedules import SCHEDULES, rank_of_stage, schedule_problems, stages_of_rank
from muster.parallel.simulate import simulate


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_what_is_not_refused_runs_and_torch_refuses_the_rest(schedule: str, ranks: int) -> None:
    kind = SCHEDULES[schedule]
    for stages_per_rank in (1, 2, 3) if kind.variable else (kind.stages_per_rank,):
        for microbatches in range(1, 19):
            problems = schedule_problems(
                schedule,
                ranks=ranks,
                stages_per_rank=stages_per_rank,
                microbatches=microbatches,
                sequences=18,
            )
            shape = {"ranks": ranks, "stages_per_rank": stages_per_rank, "microbatches": microbatches}
            if problems:
                assert len(problems) == 1
                if schedule != "1f1b":  # whose order does not come from torch
                    with pytest.raises(ValueError, match="microbatches"):
                        orders(schedule, **shape)
                continue
            done = simulate(orders(schedule, **shape), lambda action: 1.0)
            work = sorted((o.stage, o.microbatch) for o in done if o.kind == "F")
            stages = ranks * stages_per_rank
            assert work == [(stage, n) for stage in range(stages) for n in range(microbatches)]
            assert all(o.rank == rank_of_stage(schedule, o.stage, ranks) for o in done)
            backward = sum({"B": 2, "I": 1, "W": 1}.get(o.kind, 0) for o in done)
            assert backward == 2 * stages * microbatches


def test_placement() -> None:
    assert stages_of_rank("1f1b", 2, 4, 1) == [2]
    assert stages_of_rank("interleaved", 1, 4, 3) == [1, 5, 9]
    assert [stages_of_rank("zbv", rank, 3, 2) for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]


@pytest.mark.parametrize(
    ("schedule", "microbatches", "sequences", "advice"),
    [
        ("1f1b", 3, 12, "use layout.microbatch 3 for the 12 sequences of a rank"),
        ("dualpipev", 5, 40, "use layout.microbatch 5 for the 40 sequences of a rank"),
        ("interleaved", 9, 18, "use layout.microbatch 3 for the 18 sequences of a rank"),
        ("1f1b", 2, 2, "a train.batch_tokens that gives each rank 4 sequences"),
        ("interleaved", 11, 11, "use layout.microbatch 11 for the 11 sequences of a rank"),
    ],
)
def test_advice_on_microbatches(schedule: str, microbatches: int, sequences: int, advice: str) -> None:
    per_rank = SCHEDULES[schedule].stages_per_rank
    (problem,) = schedule_problems(
        schedule, ranks=4, stages_per_rank=per_rank, microbatches=microbatches, sequences=sequences
    )
    assert problem.endswith(advice)


def test_recompute_and_stages_per_rank() -> None:
    def problems(schedule: str, stages_per_rank: int, *, recompute: bool) -> list[str]:
        return schedule_problems(
            schedule,
            ranks=2,
            stages_per_rank=stages_per_rank,
            microbatches=4,
            sequences=4,
            recompute=recompute,
        )

    assert problems("interleaved", 3, recompute=True) == []
    assert "splits the backward pass" in problems("zbv", 2, recompute=True)[0]
    assert "holds 1 stages on each rank, not 2" in problems("1f1b", 2, recompute=False)[0]
