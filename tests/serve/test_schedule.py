from __future__ import annotations

import random

from muster.serve.schedule import Prefill, Progress, Step, admissions, next_step


def test_waiting_sequences_take_the_lowest_free_slots() -> None:
    busy = Progress(0, 4, 4)
    assert admissions(5, [None, busy, None]) == (0, 2)
    assert admissions(1, [None, busy, None]) == (0,)
    assert admissions(3, [busy]) == ()


def test_prompts_are_prefilled_in_order_of_arrival_within_the_budget() -> None:
    slots = [Progress(7, 10, 0), Progress(5, 100, 96), None, Progress(6, 50, 50)]
    assert next_step(slots, 8) == Step((Prefill(1, 96, 100), Prefill(0, 0, 4)), decode=(3,))


def test_nothing_to_do() -> None:
    assert next_step([None, None], 8) == Step((), ())


def test_every_sequence_advances_and_none_is_fed_twice() -> None:
    """Simulation with seeds: all prompts finish, decoding never waits, every prompt token is fed once."""
    for seed in range(50):
        rng = random.Random(seed)
        slots: list[Progress | None] = [None] * rng.randint(1, 6)
        lengths = [rng.randint(1, 60) for _ in range(20)]
        waiting = list(enumerate(lengths))
        fed = [0] * len(lengths)
        left = {arrival: rng.randint(1, 9) for arrival in range(len(lengths))}
        steps = 0
        while waiting or any(slots):
            steps += 1
            assert steps < 2000
            for slot in admissions(len(waiting), slots):
                arrival, length = waiting.pop(0)
                slots[slot] = Progress(arrival, length, 0)
            step = next_step(slots, 16)
            done = {s for s, progress in enumerate(slots) if progress is not None and progress.prefilled}
            assert set(step.decode) == done
            assert sum(prefill.stop - prefill.start for prefill in step.prefills) <= 16
            for slot in step.decode:
                progress = slots[slot]
                assert progress is not None
                left[progress.arrival] -= 1
                if left[progress.arrival] == 0:
                    slots[slot] = None
            for prefill in step.prefills:
                progress = slots[prefill.slot]
                assert progress is not None
                assert progress.cached_tokens == prefill.start < prefill.stop <= progress.prompt_tokens
                fed[progress.arrival] += prefill.stop - prefill.start
                slots[prefill.slot] = Progress(progress.arrival, progress.prompt_tokens, prefill.stop)
        assert fed == lengths
