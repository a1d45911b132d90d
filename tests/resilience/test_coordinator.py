"""The coordinator on virtual time: what it orders, and that it orders no nonsense under a thousand seeds of faults."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

import pytest

from muster.resilience.budget import Budget, Failure
from muster.resilience.coordinator import (
    CAUSE_WAIT_S,
    JOIN_WAIT_S,
    SETTLE_S,
    Action,
    Coordinator,
    End,
    Fitted,
    Outcome,
    Say,
    Start,
    Stop,
)
from muster.resilience.rendezvous import SILENCE_S


def coordinator(
    *, nodes: tuple[int, int] = (1, 2), wanted: int = 4, unit: int = 1, restarts: int = 10
) -> Coordinator:
    """Any multiple of `unit` ranks can train, `wanted` at most."""

    def fit(ranks: int) -> Fitted | None:
        world = min(ranks, wanted) // unit * unit
        return Fitted(world, {"replicate": world // unit}, wanted=world == wanted) if world else None

    return Coordinator(
        minimum=nodes[0],
        maximum=nodes[1],
        fit=fit,
        needs=f"this layout needs {unit} at least",
        committed=lambda: 0,
        budget=Budget(restarts=restarts),
    )


def started(actions: list[Action]) -> Start:
    (start,) = [action for action in actions if isinstance(action, Start)]
    return start


def kinds(actions: list[Action]) -> list[str]:
    return [action.kind for action in actions if isinstance(action, Say)]


def failed(node: str, text: str = "x", *, consequence: bool = False, step: int = -1) -> Outcome:
    failure = Failure(sentence=f"rank on {node}: {text}", node=node, consequence=consequence, step=step)
    return Outcome(kind="failed", failure=failure)


def test_all_nodes_start_at_once_and_some_only_after_a_while() -> None:
    both = coordinator()
    assert not [action for action in both.joined("a", 2, 0.0) if isinstance(action, Start)]
    assert started(both.joined("b", 2, 1.0)).places == {"a": (0, 2), "b": (2, 2)}
    one = coordinator()
    one.joined("a", 2, 0.0)
    assert not one.tick(JOIN_WAIT_S - 0.1)
    assert started(one.tick(JOIN_WAIT_S)).places == {"a": (0, 2)}


def test_what_is_missing_is_said_once() -> None:
    machine = coordinator(nodes=(1, 4), wanted=8, unit=4)
    _, waiting = machine.joined("a", 3, 0.0)
    assert isinstance(waiting, Say)
    assert waiting.sentence == "waiting for more ranks: this layout needs 4 at least, and 3 are here"
    assert not machine.tick(100.0)
    few = coordinator(nodes=(3, 3))
    assert "waiting for 2 more nodes (--nodes)" in [
        action.sentence for action in few.joined("a", 3, 0.0) if isinstance(action, Say)
    ]


def test_a_failure_ends_the_others_and_then_starts_all_again() -> None:
    machine = coordinator()
    machine.joined("a", 2, 0.0)
    machine.joined("b", 2, 0.0)
    assert machine.ended("a", failed("a"), 5.0) == [Stop(("b",), "kill")]
    actions = machine.ended("b", Outcome(kind="stopped"), 5.1)
    assert kinds(actions) == ["restart", "placed"]
    assert started(actions).attempt == 2


def test_the_cause_is_told_from_its_consequence() -> None:
    machine = coordinator(restarts=0)
    machine.joined("a", 2, 0.0)
    machine.joined("b", 2, 0.0)
    assert machine.ended("a", failed("a", consequence=True), 5.0) == []  # b may say why
    end = machine.ended("b", failed("b", "boom"), 5.1)[-1]
    assert isinstance(end, End)
    assert end.sentence.splitlines()[-1] == "rank on b: boom"


def test_only_ranks_that_are_done_end_the_run_in_peace() -> None:
    machine = coordinator()
    machine.joined("a", 4, 0.0)
    machine.joined("b", 4, 0.0)
    assert machine.alive == {"a"}
    assert kinds(machine.ended("a", Outcome(kind="stopped"), 5.0))[0] == "restart"
    assert machine.ended("a", Outcome(kind="done"), 6.0) == [End(0, "")]


def test_a_consequence_without_a_cause_does_not_wait_for_ever() -> None:
    machine = coordinator()
    machine.joined("a", 2, 0.0)
    machine.joined("b", 2, 0.0)
    machine.ended("a", failed("a", consequence=True), 5.0)
    assert machine.tick(5.0 + CAUSE_WAIT_S) == [Stop(("b",), "kill")]


def test_a_lost_node_is_done_without_and_taken_in_again() -> None:
    machine = coordinator()
    machine.joined("a", 2, 0.0)
    machine.joined("b", 2, 0.0)
    assert Stop(("a",), "kill") in machine.lost("b", 5.0)
    smaller = started(machine.ended("a", Outcome(kind="stopped"), 5.1))
    assert (smaller.world, smaller.sizes) == (2, {"replicate": 2})
    machine.joined("b", 2, 20.0)
    assert not machine.tick(20.0 + SETTLE_S - 0.1)
    assert Stop(("a",), "checkpoint") in machine.tick(20.0 + SETTLE_S)
    saved = machine.ended("a", Outcome(kind="preempted", sentence="saved"), 24.0)
    assert started(saved).places == {"a": (0, 2), "b": (2, 2)}


def test_a_spare_is_left_alone_until_it_is_needed() -> None:
    machine = coordinator(nodes=(2, 3))
    for name in "abc":
        actions = machine.joined(name, 2, 0.0)
    assert machine.alive == {"a", "b"}
    assert not [action for action in machine.tick(1000.0) if isinstance(action, Stop)]
    machine.lost("a", 1001.0)
    actions = machine.ended("b", Outcome(kind="stopped"), 1001.1)
    assert started(actions).places == {"b": (0, 2), "c": (2, 2)}


def test_a_node_that_failed_twice_in_a_row_becomes_the_spare() -> None:
    machine = coordinator(nodes=(2, 3))
    for name in "abc":
        machine.joined(name, 2, 0.0)
    places = []
    for attempt in range(2):
        now = 100.0 * (attempt + 1)
        machine.ended("a", failed("a", step=attempt), now)
        machine.ended("b", Outcome(kind="stopped"), now)
        machine.tick(now + 90.0)
        places.append(set(machine.alive))
    assert places == [{"a", "b"}, {"b", "c"}]


def test_one_that_is_stopped_stops_all_and_one_that_leaves_only_itself() -> None:
    for leaving in (False, True):
        machine = coordinator()
        machine.joined("a", 2, 0.0)
        machine.joined("b", 2, 0.0)
        told = machine.ended("b", Outcome(kind="preempted", sentence="saved", leaving=leaving), 5.0)
        assert told == [Stop(("a",), "checkpoint")]
        actions = machine.ended("a", Outcome(kind="preempted", sentence="saved"), 5.1)
        if leaving:
            assert started(actions).places == {"a": (0, 2)}
        else:
            assert actions == [End(75, "saved")]


def test_a_watcher_has_all_restarted() -> None:
    machine = coordinator()
    machine.joined("a", 2, 0.0)
    machine.joined("b", 2, 0.0)
    assert machine.complain("rank 3 hangs in reduce", 9.0) == [Stop(("a", "b"), "kill")]
    assert machine.complain("rank 3 hangs in reduce", 9.1) == []
    machine.ended("a", Outcome(kind="stopped"), 9.2)
    actions = machine.ended("b", Outcome(kind="stopped"), 9.2)
    assert "rank 3 hangs in reduce" in next(a.sentence for a in actions if isinstance(a, Say))
    assert started(actions).attempt == 2


def test_a_watcher_explains_a_failure() -> None:
    machine = coordinator(restarts=0)
    machine.explain = lambda failure: Failure(sentence=f"rank 1 skipped a reduce ({failure.sentence})")
    machine.joined("a", 4, 0.0)
    machine.joined("b", 4, 0.0)
    end = machine.ended("a", failed("a", consequence=True), 1.0)[-1]
    assert isinstance(end, End)
    assert end.sentence.splitlines()[-1] == "rank 1 skipped a reduce (rank on a: x)"


@dataclass
class World:
    """Nodes that obey with some delay, fail, vanish, are cut off and come back, on virtual time.

    The link of one that is cut off swallows what is sent. Healed in time, it delivers it late; else both ends take it
    for closed after SILENCE_S. The node's ranks may train on for a while then; others have a term of their own.
    """

    seed: int
    chance: random.Random = field(init=False)
    step: float = 0.0
    committed: float = 0.0

    def run(self) -> None:
        self.chance = chance = random.Random(self.seed)
        unit = chance.choice([1, 2, 4])
        names = [f"n{number}" for number in range(chance.randint(1, 5))]
        slots = {name: chance.randint(1, 4) for name in names}
        total = sum(slots.values())
        wanted = max(chance.randint(1, total) // unit * unit, unit)
        machine = coordinator(nodes=(1, len(names)), wanted=wanted, unit=unit, restarts=5)
        machine.committed = lambda: int(self.committed)
        queue: list[tuple[float, int, str, str]] = []
        order = 0

        def later(after: float, what: str, name: str = "") -> None:
            nonlocal order
            order += 1
            heapq.heappush(queue, (now + after, order, what, name))

        now, here, running, end = 0.0, set[str](), dict[str, str](), None
        begun: float | None = None
        term = 0
        cut: dict[str, list[str]] = {}
        happened = set[str]()
        for name in names:
            later(chance.expovariate(0.3), "join", name)
        later(0.1, "tick")
        for _ in range(chance.randint(0, 6)):
            later(chance.uniform(1.0, 100.0), chance.choice(["fail", "vanish", "stop", "hang", "cut"]))
        later(120.0, "finish")
        while queue and end is None and now < 1_500.0:
            now, _, what, name = heapq.heappop(queue)
            happened.add(what)
            actions: list[Action] = []
            reached = sorted(running.keys() - cut.keys())
            some = chance.choice(reached) if reached else ""
            if what == "join" and name not in here:
                here.add(name)
                actions = machine.joined(name, slots[name], now)
            elif what == "tick":
                later(0.5 if now < 120.0 else 2.0, "tick")
                actions = machine.tick(now)
            elif what == "fail" and some:
                running.pop(some)
                actions = machine.ended(
                    some, failed(some, consequence=chance.random() < 0.3, step=int(now)), now
                )
            elif what == "cut" and some:
                cut[some] = []
                heals_after = chance.uniform(1.0, 2 * SILENCE_S)
                later(min(heals_after, SILENCE_S), "heal" if heals_after < SILENCE_S else "silence", some)
                if heals_after >= SILENCE_S:
                    later(heals_after + chance.uniform(0.0, 5.0), "join", some)
            elif what == "heal":
                for order_kept in cut.pop(name):
                    later(chance.uniform(0.0, 0.1), order_kept, name)
            elif what == "silence":
                del cut[name]
                here.discard(name)
                running.pop(name, None)  # they may train on for a while, under a term that is soon over
                actions = machine.lost(name, now)
            elif what == "vanish" and here - cut.keys():
                lost = chance.choice(sorted(here - cut.keys()))
                here.discard(lost)
                running.pop(lost, None)
                actions = machine.lost(lost, now)
                later(chance.uniform(0.0, 60.0), "join", lost)
            elif what == "hang" and running:
                actions = machine.complain("hangs", now)
            elif what == "stop" and some and chance.random() < 0.3:
                running.pop(some)
                actions = machine.ended(some, Outcome(kind="preempted", sentence="saved"), now)
            elif what in ("kill", "checkpoint") and running.get(name) == what:
                running.pop(name)
                kind = "stopped" if what == "kill" else "preempted"
                actions = machine.ended(name, Outcome(kind=kind, sentence="saved"), now)  # type: ignore[arg-type]
            elif what == "finish":
                if running and not set(running.values()) - {""} and not cut:
                    for name in sorted(running):
                        actions += machine.ended(name, Outcome(kind="done"), now)
                    running.clear()
                else:
                    later(10.0, "finish")
            for action in actions:
                if isinstance(action, Start):
                    assert not running, "the last attempt still runs"
                    assert set(action.places) <= here
                    spans = sorted(action.places.values())
                    assert [first for first, _ in spans] == [
                        sum(ranks for _, ranks in spans[:number]) for number in range(len(spans))
                    ]
                    assert sum(ranks for _, ranks in spans) == action.world <= wanted
                    assert all(0 < ranks <= slots[node] for node, (_, ranks) in action.places.items())
                    running = dict.fromkeys(action.places, "")
                    assert action.attempt > term, "a term is never granted twice"
                    begun, term = now, action.attempt
                elif isinstance(action, Stop):
                    for node in action.nodes:
                        if node in running and running[node] != "kill":
                            running[node] = action.how
                            if node in cut:
                                cut[node].append(action.how)
                                continue
                            later(chance.uniform(0.01, 5.0), action.how, node)
                elif isinstance(action, End):
                    assert end is None
                    end = action

            if begun is not None and running and chance.random() < 0.3:
                self.committed = now
        asked_to_stop = "stop" in happened
        assert end is None or end.exit_code != 75 or asked_to_stop
        able = max(sum(slots[name] for name in here), 0) >= unit
        assert end is not None or not able, f"seed {self.seed}: nobody trains, though {sorted(here)} could"
        assert end is None or not running


@pytest.mark.parametrize("block", range(4))
def test_a_thousand_seeds(block: int) -> None:
    for seed in range(block * 250, (block + 1) * 250):
        try:
            World(seed).run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
