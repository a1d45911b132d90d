"""The scheduler and its blocks on virtual steps: a shadow of the cache remembers which token each slot holds."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from muster.serve.engine.blocks import BlockPool, Copy, root
from muster.serve.engine.scheduler import Plan, Scheduler, Work
from muster.serve.engine.sequence import Sequence


def sequence(
    tokens: list[int], arrival: int = 0, *, priority: int = 0, client: str = "", salt: str = ""
) -> Sequence:
    return Sequence(
        id=str(arrival),
        arrival=arrival,
        tokens=list(tokens),
        prompt_tokens=len(tokens),
        root=root(salt),
        priority=priority,
        client=client,
    )


@dataclass
class World:
    """Plays engine and network: 'computes' each work into a shadow of the cache, and checks what it relies on."""

    scheduler: Scheduler
    step_tokens: int
    slots: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    """(block, offset) -> all tokens up to and with the one whose key and value it holds."""
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def step(self, drafts: dict[str, list[int]] | None = None) -> Plan:
        pool = self.scheduler.pool
        plan = self.scheduler.plan(drafts)
        for chore in plan.chores:
            for offset in range(pool.block_tokens):
                self.slots.pop((chore.target, offset), None)
                if isinstance(chore, Copy) and (chore.source, offset) in self.slots:
                    self.slots[chore.target, offset] = self.slots[chore.source, offset]
        assert plan.rows <= self.step_tokens
        assert len({work.sequence.id for work in plan.works}) == len(plan.works)
        written = Counter(
            work.sequence.blocks[position // pool.block_tokens]
            for work in plan.works
            for position in range(work.start, work.stop + len(work.draft))
        )
        assert all(pool.holders(block) == 1 for block in written), "a shared block would be written"
        for work in plan.works:
            self._compute(work)
        return plan

    def _compute(self, work: Work) -> None:
        one, size = work.sequence, self.scheduler.pool.block_tokens
        assert one.running
        assert one.computed == work.start < work.stop <= len(one.tokens)
        for position in range(work.start):
            held = self.slots.get((one.blocks[position // size], position % size))
            assert held == tuple(one.tokens[: position + 1]), "the cache holds something else"
        whole = [*one.tokens, *work.draft]
        for position in range(work.start, work.stop + len(work.draft)):
            self.slots[one.blocks[position // size], position % size] = tuple(whole[: position + 1])

    def advance(self, plan: Plan) -> None:
        for work in plan.works:
            accepted = self.rng.randint(0, len(work.draft))
            one = work.sequence
            drawn = [*work.draft[:accepted], self.rng.randrange(4)] if work.draws else []
            one.sound |= work.draws
            self.scheduler.advance(work, drawn)

    def check(self) -> None:
        """Reference counts are exact, and every block is free or held."""
        pool = self.scheduler.pool
        held = Counter(block for one in self.scheduler.running for block in one.blocks)
        assert [pool.holders(block) for block in range(pool.blocks)] == [
            held[block] for block in range(pool.blocks)
        ]
        assert pool.used == len(held)
        assert not any(len(one.blocks) for one in self.scheduler.waiting)


def world(*, blocks: int = 20, size: int = 4, streams: int = 4, step_tokens: int = 16) -> World:
    return World(Scheduler(BlockPool(blocks, size), streams=streams, step_tokens=step_tokens), step_tokens)


@pytest.mark.parametrize("hundred", range(10))
def test_simulations(hundred: int) -> None:
    """A thousand seeds: every request ends, no block is lost, no budget exceeded, and every hit is a true one."""
    preempted = hits = drafted = 0
    for seed in range(100 * hundred, 100 * hundred + 100):
        rng = random.Random(seed)
        size = rng.choice([1, 2, 4, 8])
        context = rng.randint(8, 48)
        blocks = -(-context // size) + rng.choice([1, 2, 8, 40])
        streams = rng.randint(1, 6)
        step_tokens = streams + rng.randint(0, 24)
        pool = BlockPool(blocks, size, prefix_cache=rng.random() < 0.85)
        scheduler = Scheduler(pool, streams=streams, step_tokens=step_tokens)
        here = World(scheduler, step_tokens, rng=rng)
        beginnings = [[rng.randrange(4) for _ in range(context - 2)] for _ in range(3)]
        ends: dict[str, int] = {}
        coming = rng.randint(1, 16)
        arrivals, steps = 0, 0
        while coming or scheduler.waiting or scheduler.running:
            steps += 1
            assert steps < 4000, "somebody starves"
            while coming and (rng.random() < 0.4 or not (scheduler.waiting or scheduler.running)):
                prompt = rng.choice(beginnings)[: rng.randint(1, context - 2)]
                prompt = prompt + [rng.randrange(4) for _ in range(rng.randint(0, context - 2 - len(prompt)))]
                for _ in range(rng.choice([1, 1, 1, 3])):  # n choices of one prompt
                    one = sequence(
                        prompt,
                        arrivals,
                        priority=rng.choice([0, 0, 1]),
                        client=rng.choice("ab"),
                        salt=rng.choice(["", "adapter"]),
                    )
                    ends[one.id] = rng.randint(len(prompt) + 1, context)
                    scheduler.add(one)
                    arrivals += 1
                coming -= 1
            for one in [*scheduler.waiting, *scheduler.running]:
                if rng.random() < 0.01:
                    scheduler.remove(one)
                    here.check()
            drafts = {}
            for one in scheduler.running:
                room = ends[one.id] - len(one.tokens) - 1
                drafts[one.id] = [rng.randrange(4) for _ in range(max(0, min(room, rng.randint(0, 4))))]
            first = min(scheduler.running, key=lambda one: one.rank, default=None)
            progress = first.computed if first else 0
            plan = here.step(drafts)
            drafted += sum(len(work.draft) for work in plan.works)
            here.advance(plan)
            if first:
                assert first.running, "the first in rank was preempted"
            if first and any(work.sequence is first for work in plan.works):
                assert first.computed > progress
            assert plan.works or not (scheduler.running or scheduler.waiting)
            for one in list(scheduler.running):
                if len(one.tokens) >= ends[one.id]:
                    scheduler.remove(one)
            here.check()
        assert pool.free == pool.blocks
        assert not scheduler._pending
        assert not scheduler._served
        preempted += scheduler.counts.preemptions
        hits += scheduler.counts.prefix_hit_tokens
    assert preempted > 10
    assert hits > 1000
    assert drafted > 1000


def test_a_step_mixes_tokens_and_chunks_within_its_budget() -> None:
    here = world(step_tokens=8)
    old, new = sequence([1, 2, 3], 0), sequence(list(range(20)), 1)
    here.scheduler.add(old)
    here.scheduler.add(new)
    first = here.step()
    assert [(work.start, work.stop) for work in first.works] == [(0, 3), (0, 5)]
    here.advance(first)
    second = here.step()
    assert [(work.start, work.stop) for work in second.works] == [(3, 4), (5, 12)]


def test_choices_of_one_prompt_share_it_and_compute_one_token_each() -> None:
    here = world(streams=3)
    for arrival in range(3):
        here.scheduler.add(sequence([5, 6, 7, 8, 9, 10], arrival))
    first = here.step()
    assert [work.rows for work in first.works] == [6], "the others wait for what the first computes"
    here.advance(first)
    second = here.step()
    assert [(work.start, work.stop) for work in second.works] == [(6, 7), (5, 6), (5, 6)]
    shared = {one.blocks[0] for one in here.scheduler.running}
    assert len(shared) == 1
    assert here.scheduler.pool.holders(shared.pop()) == 3
    assert len({one.blocks[1] for one in here.scheduler.running}) == 3, "each writes a block of its own"


def test_another_salt_shares_nothing() -> None:
    here = world()
    here.scheduler.add(sequence([1, 2, 3, 4, 5], 0, salt="version 1"))
    here.advance(here.step())
    here.scheduler.add(sequence([1, 2, 3, 4, 5], 1, salt="version 2"))
    here.step()
    assert here.scheduler.counts.prefix_hit_tokens == 0


def test_priority_then_the_client_served_least_then_arrival() -> None:
    here = world(streams=1, step_tokens=64, blocks=40)
    greedy = [sequence([arrival] * 9, arrival, client="many") for arrival in range(3)]
    modest = sequence([7] * 3, 3, client="one")
    urgent = sequence([8] * 3, 4, client="many", priority=-1)
    order = []
    for one in [*greedy, modest, urgent]:
        here.scheduler.add(one)
    while here.scheduler.waiting:
        plan = here.step()
        here.advance(plan)
        for one in list(here.scheduler.running):
            order.append(one)
            here.scheduler.remove(one)
    assert order == [urgent, modest, *greedy]


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    here = world(blocks=6, size=2, streams=1)
    old, young, big = ([n, n, n, n] for n in (1, 2, 3))
    for arrival, prompt in enumerate((old, young)):
        one = sequence(prompt, arrival)
        here.scheduler.add(one)
        here.advance(here.step())
        here.scheduler.remove(one)
    third = sequence([*big, 4], 2)
    here.scheduler.add(third)
    here.advance(here.step())
    here.scheduler.remove(third)
    pool = here.scheduler.pool
    assert pool.find(sequence(young).full_keys(2)[1]) is not None
    assert pool.find(sequence(old).full_keys(2)[1]) is None, "its end went first"


def test_what_a_damaged_sequence_held_is_neither_found_nor_reused_unwiped() -> None:
    here = world(blocks=3, streams=1)
    bad = sequence([1, 2, 3, 4, 5], 0)
    here.scheduler.add(bad)
    here.advance(here.step())
    here.scheduler.remove(bad, damaged=True)
    again = sequence([1, 2, 3, 4, 5], 1)
    here.scheduler.add(again)
    plan = here.step()
    assert here.scheduler.counts.prefix_hit_tokens == 0
    assert {chore.target for chore in plan.chores} == set(again.blocks)


def test_a_budget_below_the_streams_is_refused() -> None:
    with pytest.raises(ValueError, match="a step of 3 tokens is too small for 4 streams"):
        Scheduler(BlockPool(4, 4), streams=4, step_tokens=3)
