"""The verdict on recorded cases: beats and recorder tails as real ranks left them (`benchmarks/faults_hang.py`)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from muster.resilience.evidence import Collective, Failure, Witness, location, parse_recorder
from muster.resilience.verdict import expected_next, judge, waits

WORLD = "0"
STEP = [
    ("all_reduce", 3),
    ("all_gather", 500),
    ("all_reduce", 4000),
    ("all_reduce", 4000),
    ("all_reduce", 1000),
]
LOST = "RuntimeError: [pair.cc:537] Read error [127.0.0.1]:25516: Connection reset by peer."
LATE = "RuntimeError: [unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation to complete"


def calls(
    count: int, *, pending: bool = False, last: tuple[str, int] | None = None
) -> tuple[Collective, ...]:
    """The first `count` collectives of training; the last one may be another one, and not be done."""
    found = []
    for index in range(count):
        operation, size = STEP[index % len(STEP)]
        if index == count - 1 and last is not None:
            operation, size = last
        done = not pending or index < count - 1
        found.append(
            Collective(
                group=WORLD,
                number=index + 1,
                operation=operation,
                shapes=((size,),),
                dtypes=("Float",),
                done=done,
            )
        )
    return tuple(found)


def rank(
    number: int, count: int, *, ranks: int = 3, last: tuple[str, int] | None = None, **changes: object
) -> Witness:
    """A rank that waits in its `count`-th collective."""
    witness = Witness(
        rank=number,
        step=3,
        phase="backward",
        in_phase_s=60,
        waiting=True,
        collectives=calls(count, pending=True, last=last),
        groups={WORLD: tuple(range(ranks))},
    )
    return replace(witness, **changes)  # type: ignore[arg-type]


def busy(number: int, count: int, **changes: object) -> Witness:
    """A rank that has finished `count` collectives and waits for nobody."""
    given: dict[str, object] = {"waiting": False, "collectives": calls(count)}
    return rank(number, count, **(given | changes))


def test_a_stopped_rank() -> None:
    verdict = judge([rank(0, 13), busy(1, 12, process="T", collectives=None), rank(2, 13)])
    assert (verdict.ranks, verdict.cause) == ((1,), "stopped")
    assert "state T" in verdict.sentence
    assert "ranks 0 and 2 wait for it in all_reduce(4000 float) #13" in verdict.sentence


def test_a_rank_whose_data_does_not_come() -> None:
    stack = 'Thread 0x1 (most recent call first):\n  File "/a/loader.py", line 7 in read\n  File "/x.py", line 1 in f\n'
    verdict = judge([rank(0, 11), rank(1, 11), busy(2, 10, phase="data", stack=stack)])
    assert (verdict.ranks, verdict.cause) == ((2,), "absent")
    assert "data of step 3 for 60 s, in loader.py:7 in read" in verdict.sentence


def test_a_rank_whose_interpreter_is_held() -> None:
    verdict = judge([rank(0, 11), busy(1, 10, collectives=None), rank(2, 11)])
    assert verdict.ranks == (1,)
    assert "does not answer" in verdict.sentence


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_skipped_collective(culprit: int) -> None:
    """The one that skipped #12 calls what comes after it."""
    world = [rank(number, 12, last=STEP[2] if number == culprit else None) for number in range(3)]
    verdict = judge(world)
    assert (verdict.ranks, verdict.cause) == ((culprit,), "mismatch")
    assert "called all_reduce(4000 float) as collective #12" in verdict.sentence
    assert "as if it had skipped that one" in verdict.sentence


@pytest.mark.parametrize("culprit", [0, 1])
def test_of_two_ranks_the_one_that_does_the_unusual(culprit: int) -> None:
    world = [rank(n, 12, ranks=2, last=("all_reduce", 500) if n == culprit else None) for n in range(2)]
    assert judge(world).ranks == (culprit,)


def test_two_ranks_that_disagree_from_the_start_are_both_named() -> None:
    verdict = judge([rank(0, 1, ranks=2), rank(1, 1, ranks=2, last=("broadcast", 3))])
    assert (verdict.ranks, verdict.cause) == ((0, 1), "mismatch")
    assert "rank 0 called all_reduce(3 float), rank 1 called broadcast(3 float)" in verdict.sentence


def test_a_wrong_shape_that_aborts_everyone() -> None:
    crash = Failure(crash="Fatal Python error: Aborted\n")
    world = [rank(n, 13, last=("all_reduce", 4001) if n == 2 else None, failure=crash) for n in range(3)]
    verdict = judge(world)
    assert (verdict.ranks, verdict.cause) == ((2,), "mismatch")
    assert "all_reduce(4001 float)" in verdict.sentence


def test_uneven_all_to_alls_are_no_mismatch() -> None:
    world = [rank(n, 12, last=("all_to_all", 10 + n)) for n in range(2)] + [busy(2, 11, phase="optimizer")]
    assert judge(world).ranks == (2,)


def test_a_chain_of_waits_ends_at_its_cause() -> None:
    """Rank 0 waits for 1 in one group, 1 for 2 in another, and 2 is in its optimizer."""
    pair = Collective(group="p", number=4, operation="all_reduce", shapes=((9,),), dtypes=("Float",))
    groups = {WORLD: (0, 1, 2), "p": (1, 2), "q": (0, 1)}
    first = rank(0, 1, collectives=(replace(pair, group="q"),), groups=groups)
    second = rank(1, 1, collectives=(replace(pair, number=3, done=True), pair), groups=groups)
    third = busy(2, 1, collectives=(replace(pair, number=3, done=True),), groups=groups, phase="optimizer")
    assert judge([first, second, third]).ranks == (2,)
    assert [(wait.rank, wait.on) for wait in waits([first, second, third])] == [(0, (1,)), (1, (2,))]


def test_two_groups_in_another_order() -> None:
    groups = {"a": (0, 1), "b": (0, 1)}
    entry = Collective(group="a", number=1, operation="all_reduce", shapes=((9,),), dtypes=("Float",))
    first = rank(0, 1, collectives=(entry,), groups=groups)
    second = rank(1, 1, collectives=(replace(entry, group="b"),), groups=groups)
    verdict = judge([first, second])
    assert (verdict.ranks, verdict.cause) == ((0, 1), "deadlock")


def mixed(me: int, peer: int, *, last: str) -> tuple[Collective, ...]:
    """Steps of an all_reduce and a message each way, of which the last call is not done."""
    found: list[Collective] = []
    for step in range(1, 5):
        kinds = ["sum", f"{me}>{peer}", f"{peer}>{me}"] if step < 4 else [last]
        for kind in kinds:
            is_sum = kind == "sum"
            number = step if is_sum or kind != last else step - (last != "sum" and step == 4) + 1
            found.append(
                Collective(
                    group=WORLD if is_sum else f"{WORLD}:{kind}",
                    number=number,
                    operation="all_reduce" if is_sum else "message",
                    shapes=((3,) if is_sum else (500,),),
                    dtypes=("float32",),
                    done=step < 4,
                    awaited=step == 4 and not is_sum,
                    time_ns=len(found),
                )
            )
    return tuple(found)


def test_a_skipped_collective_before_messages() -> None:
    """Rank 1 left out the sum and waits for rank 0's message, which waits in the sum for rank 1."""
    first = rank(0, 1, ranks=2, collectives=mixed(0, 1, last="sum"))
    second = rank(1, 1, ranks=2, collectives=mixed(1, 0, last="0>1"))
    verdict = judge([first, second])
    assert (verdict.ranks, verdict.cause) == ((1,), "mismatch")
    assert "rank 1 in message(500 float32) from 0 to 1" in verdict.sentence


def test_without_a_recorder_the_one_that_does_not_wait_is_named() -> None:
    waiting = [rank(n, 1, collectives=()) for n in (0, 2)]
    assert judge([waiting[0], busy(1, 1, collectives=(), phase="forward"), waiting[1]]).ranks == (1,)


def test_ranks_of_other_nodes_are_not_known_here() -> None:
    verdict = judge([rank(n, 12, ranks=4) for n in range(2)])
    assert (verdict.ranks, verdict.cause) == ((), "elsewhere")
    assert "ranks 0 and 1 wait in all_gather(500 float) #12, for ranks 2 and 3" in verdict.sentence


def test_a_network_that_does_not_move_accuses_nobody() -> None:
    verdict = judge([rank(n, 12) for n in range(3)])
    assert (verdict.ranks, verdict.cause) == ((), "unknown")
    assert "network" in verdict.sentence


@pytest.mark.parametrize("follow", [LOST, LATE])
def test_the_cause_is_said_and_not_what_follows_from_it(follow: str) -> None:
    lost = [rank(n, 12, failure=Failure(message=f"Traceback ...\n{follow}")) for n in (0, 2)]
    own = busy(1, 11, failure=Failure(message="Traceback ...\nKeyError: 'x'"))
    assert judge([lost[0], own, lost[1]]).sentence == "rank 1: Traceback ...\nKeyError: 'x'"
    killed = busy(1, 11, failure=Failure(exit_code=-9))
    assert judge([lost[0], killed, lost[1]]).sentence.startswith(
        "rank 1 was killed by SIGKILL in backward of step 3"
    )
    late = busy(1, 11, phase="data")
    assert judge([lost[0], late, lost[1]]).ranks == (1,)


def test_an_errors_exit_code_is_the_verdicts() -> None:
    does_not_fit = busy(1, 11, failure=Failure(message="rank 1 ran out of memory", exit_code=3))
    verdict = judge([rank(0, 12), does_not_fit])
    assert (verdict.sentence, verdict.exit_code) == ("rank 1 ran out of memory", 3)


def test_what_comes_next_is_what_came_before() -> None:
    assert expected_next([1, 2, 3, 1, 2, 3, 1]) == 2
    assert expected_next([2, 2, 3, 2, 2]) == 3
    assert expected_next([1, 2, 3]) is None


def test_torchs_recorder_is_read() -> None:
    entry = (
        '{"time_created_ns": 5, "record_id": %d, "process_group": ["0", "default_pg"], "collective_seq_id": %d, '
        '"is_p2p": %s, "profiling_name": "gloo:all_reduce", "input_sizes": [[2, 3]], '
        '"input_dtypes": ["Float"], "retired": %s}'
    )
    entries = [
        entry % (1, 2, "false", "false"),
        entry % (0, 1, "false", "true"),
        entry % (2, 0, "true", "false"),
    ]
    first, second = parse_recorder('{"entries": [' + ",".join(entries) + "]}")
    assert (first.number, first.done, second.number, second.done) == (1, True, 2, False)
    assert str(second) == "all_reduce(2x3 float)"


def test_where_the_main_thread_is() -> None:
    stack = """Current thread 0x2 (most recent call first):
  File "/a/helper.py", line 1 in run

Thread 0x1 (most recent call first):
  File "/v/site-packages/torch/distributed/distributed_c10d.py", line 3252 in all_reduce
  File "/w/muster/parallel/world.py", line 40 in sum
  File "/w/muster/train/loop.py", line 41 in train
"""
    assert location(stack) == "world.py:40 in sum"
    assert location("") == ""
