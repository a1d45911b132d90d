from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
import torch

from muster.model.transformer import Transformer
from muster.serve.engine.core import Core
from muster.serve.engine.network import TransformerNetwork
from muster.serve.engine.speculation import Asked
from muster.serve.engine.thread import ThreadEngine
from muster.serve.protocol import EngineError, Guide, Overloaded, Request, SamplingParams, Token

Generate = Callable[..., Awaitable[list[Token]]]
_IDS = itertools.count()


def request(prompt: Sequence[int], **params: Any) -> Request:
    settings: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0} | params
    return Request(id=str(next(_IDS)), prompt=tuple(prompt), params=SamplingParams(**settings))


def ids(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]


def test_greedy_equals_the_plain_loop_for_sequences_of_all_lengths(
    model: Transformer, running: Any, generate: Generate, reference: Any
) -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(1, 60))] for _ in range(12)]
    counts = [rng.randint(1, 30) for _ in prompts]

    async def all_at_once() -> list[list[Token]]:
        with running(model, streams=5) as engine:
            requests = [request(p, max_tokens=n) for p, n in zip(prompts, counts, strict=True)]
            return await asyncio.gather(*(generate(engine, one) for one in requests))

    for prompt, count, tokens in zip(prompts, counts, asyncio.run(all_at_once()), strict=True):
        assert ids(tokens) == reference(model, prompt, count)
        assert [token.finish_reason for token in tokens] == [None] * (count - 1) + ["length"]


@pytest.mark.parametrize(
    "changes",
    [
        {
            "family": "gpt2",
            "norm": "layer",
            "positions": "learned",
            "mlp": "gelu",
            "kv_heads": 4,
            "tied": True,
        },
        {"family": "mistral", "window": 12},
    ],
)
def test_greedy_equals_the_plain_loop_for_other_families(
    make_model: Any, running: Any, generate: Generate, reference: Any, changes: dict[str, Any]
) -> None:
    model = make_model(**changes)
    prompts = [[1, 2, 3], list(range(40)), [250]]

    async def all_at_once() -> list[list[Token]]:
        with running(model) as engine:
            return await asyncio.gather(*(generate(engine, request(p, max_tokens=20)) for p in prompts))

    for prompt, tokens in zip(prompts, asyncio.run(all_at_once()), strict=True):
        assert ids(tokens) == reference(model, prompt, 20)


def test_a_long_prompt_in_chunks_changes_nothing(
    model: Transformer, running: Any, generate: Generate, reference: Any
) -> None:
    prompts = [list(range(60)), list(range(100, 130)), [5]]

    async def all_at_once() -> list[list[Token]]:
        with running(model, step_tokens=7) as engine:
            return await asyncio.gather(*(generate(engine, request(p, max_tokens=12)) for p in prompts))

    for prompt, tokens in zip(prompts, asyncio.run(all_at_once()), strict=True):
        assert ids(tokens) == reference(model, prompt, 12)


def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(
    model: Transformer, running: Any, generate: Generate
) -> None:
    def seeded() -> Request:
        return request([7, 8, 9], max_tokens=30, temperature=1.0, top_p=0.95, seed=42)

    def other() -> Request:
        return request([random.randrange(256) for _ in range(20)], max_tokens=20, temperature=1.0)

    async def run() -> tuple[list[int], list[int], list[int]]:
        with running(model) as engine:
            alone = await generate(engine, seeded())
            first, *_ = await asyncio.gather(
                generate(engine, seeded()), *(generate(engine, other()) for _ in range(9))
            )
            *_, last = await asyncio.gather(
                *(generate(engine, other()) for _ in range(9)), generate(engine, seeded())
            )
            return ids(alone), ids(first), ids(last)

    alone, first, last = asyncio.run(run())
    assert alone == first == last
    assert len(set(alone)) > 5


def test_requests_without_a_seed_differ(model: Transformer, running: Any, generate: Generate) -> None:
    async def run() -> list[list[Token]]:
        with running(model) as engine:
            same = [request([1], max_tokens=20, temperature=2.0) for _ in range(2)]
            return await asyncio.gather(*(generate(engine, one) for one in same))

    first, second = asyncio.run(run())
    assert ids(first) != ids(second)


def test_a_stop_id_ends_the_request_and_is_delivered(
    model: Transformer, running: Any, generate: Generate, reference: Any
) -> None:
    expected = reference(model, [1, 2, 3], 8)

    async def run() -> list[Token]:
        with running(model) as engine:
            return await generate(engine, request([1, 2, 3], stop_ids=frozenset({expected[2]})))

    tokens = asyncio.run(run())
    assert ids(tokens) == expected[: expected.index(expected[2]) + 1]
    assert tokens[-1].finish_reason == "stop"


def test_logprobs_are_the_models(model: Transformer, running: Any, generate: Generate) -> None:
    async def run() -> list[Token]:
        with running(model) as engine:
            return await generate(engine, request([1, 2, 3], logprobs=4, temperature=1.0, seed=1))

    tokens = asyncio.run(run())
    whole = [1, 2, 3, *ids(tokens)]
    with torch.inference_mode():
        expected = model(torch.tensor([whole]))[0].log_softmax(-1)
    for position, token in enumerate(tokens, start=2):
        assert token.logprob == pytest.approx(float(expected[position, token.id]), abs=1e-4)
        best = expected[position].topk(4)
        assert [id for id, _ in token.top_logprobs] == best.indices.tolist()
        assert [value for _, value in token.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_cancelling_frees_the_slot_and_the_next_request_takes_it(
    model: Transformer, running: Any, generate: Generate, reference: Any
) -> None:
    async def run() -> tuple[list[Token], list[Token]]:
        with running(model, streams=1) as engine:
            endless = request([1], max_tokens=90)
            stream = engine.submit(endless)
            await anext(stream)
            waiting = request([2], max_tokens=90)
            never_started = engine.submit(waiting)
            engine.cancel(waiting.id)
            engine.cancel(endless.id)
            engine.cancel("unknown")
            rest = [token async for token in stream] + [token async for token in never_started]
            return rest, await generate(engine, request([1, 2, 3]))

    rest, after = asyncio.run(run())
    assert len(rest) < 80
    assert ids(after) == reference(model, [1, 2, 3], 8)


def test_a_full_queue_refuses_at_once_and_recovers(
    model: Transformer, running: Any, generate: Generate
) -> None:
    async def run() -> None:
        with running(model, streams=1, waiting_limit=2) as engine:
            requests = [request([1], max_tokens=90) for _ in range(4)]
            accepted = []

            def submit_all() -> None:
                for one in requests:
                    engine.submit(one)
                    accepted.append(one)

            with pytest.raises(Overloaded, match="waiting already"):
                submit_all()
            assert len(accepted) in (2, 3)
            for one in accepted:
                engine.cancel(one.id)
            assert len(await generate(engine, request([1]))) == 8

    asyncio.run(run())


def test_a_damaged_sequence_fails_alone(
    make_model: Any, running: Any, generate: Generate, reference: Any
) -> None:
    """nan in one token's embedding: requests with that token fail, others beside and after them do not."""
    model = make_model()
    expected = reference(model, [1, 2, 3], 30)
    poison = next(id for id in range(256) if id not in expected)
    with torch.no_grad():
        model.embed.weight[poison] = torch.nan

    async def run() -> None:
        with running(model, streams=2) as engine:
            for _ in range(3):
                healthy = asyncio.create_task(generate(engine, request([1, 2, 3], max_tokens=30)))
                with pytest.raises(EngineError, match="not finite"):
                    await generate(engine, request([poison] * 40))
                assert ids(await healthy) == expected
                # Both slots again: the damaged one's with a shorter sequence than its neighbour's.
                short, _ = await asyncio.gather(
                    generate(engine, request([1, 2, 3], max_tokens=30)),
                    generate(engine, request([1, 2, 3] * 20, max_tokens=30)),
                )
                assert ids(short) == expected

    asyncio.run(run())


def test_an_exception_in_a_step_fails_its_requests_and_the_engine_lives_on(
    model: Transformer, running: Any, generate: Generate, reference: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> list[Token]:
        with running(model) as engine:
            with pytest.raises(EngineError, match="generation failed"):
                await generate(engine, request([10_000]))  # beyond the embedding: the HTTP layer refuses it
            return await generate(engine, request([1, 2, 3]))

    assert ids(asyncio.run(run())) == reference(model, [1, 2, 3], 8)
    assert "a step of 1 sequences failed" in caplog.text


def test_closing_ends_running_and_waiting_requests_and_the_thread(model: Transformer, running: Any) -> None:
    async def drain(stream: AsyncIterator[Token]) -> None:
        async for _ in stream:
            pass

    async def run() -> None:
        with running(model, streams=1) as engine:
            streams = [engine.submit(request([1], max_tokens=90)) for _ in range(3)]
            await anext(streams[0])
            engine.close()
            for stream in streams:
                with pytest.raises(EngineError, match="stopping"):
                    await asyncio.wait_for(drain(stream), 10)
            with pytest.raises(EngineError, match="stopping"):
                engine.submit(request([1]))

    before = threading.active_count()
    asyncio.run(run())
    assert threading.active_count() == before


def test_waiting_prompts_are_bounded_by_their_tokens(make_core: Any, model: Transformer) -> None:
    async def run() -> None:
        engine = ThreadEngine(make_core(model, streams=1), waiting_tokens=30, threads=1)
        try:
            first = engine.submit(request([1], max_tokens=90))
            await anext(first)
            engine.submit(request([1] * 40))  # alone it may wait, however long it is
            with pytest.raises(Overloaded, match="1 sequences with 40 prompt tokens are waiting"):
                engine.submit(request([1]))
        finally:
            engine.close()

    asyncio.run(run())


def test_an_impossible_request_fails_alone(model: Transformer, running: Any, generate: Generate) -> None:
    async def run() -> list[Token]:
        with running(model) as engine:
            with pytest.raises(
                EngineError, match="90 tokens of prompt and 8 to generate exceed the context of 96"
            ):
                await generate(engine, request([1] * 90))
            with pytest.raises(EngineError, match="no structured output"):
                await generate(engine, request([1], guide=Guide("regex", "a")))
            return await generate(engine, request([1, 2, 3]))

    assert len(asyncio.run(run())) == 8


def test_cancelling_frees_every_block_within_a_step(model: Transformer, make_core: Any) -> None:
    core = make_core(model, streams=3, step_tokens=16)
    requests = [request(range(60), max_tokens=30) for _ in range(5)]
    with torch.inference_mode():
        for one in requests:
            core.add(one)
        for _ in range(3):
            core.step()
        assert core.stats().used_blocks > 0
        for one in requests:
            core.cancel(one.id)
        stats = core.step().stats
    assert (stats.running, stats.waiting, stats.used_blocks) == (0, 0, 0)


def test_penalties_do_not_depend_on_the_batch_and_bans_hold(
    model: Transformer, running: Any, generate: Generate
) -> None:
    banned = tuple((id, -1e4) for id in range(0, 256, 2))

    def odd() -> Request:
        return request([3, 5], max_tokens=20, repetition_penalty=1.3, presence_penalty=0.5, logit_bias=banned)

    async def run() -> tuple[list[int], list[int], list[int]]:
        with running(model) as engine:
            plain = await generate(engine, request([3, 5], max_tokens=20))
            alone = await generate(engine, odd())
            crowd = await asyncio.gather(
                *(generate(engine, request([n], max_tokens=20)) for n in range(3)), generate(engine, odd())
            )
            return ids(plain), ids(alone), ids(crowd[-1])

    plain, alone, crowd = asyncio.run(run())
    assert plain != alone == crowd
    assert all(id % 2 for id in alone if id < 256)


class Poisonous:
    """Guesses a token that makes the model's output nan, as any guess may."""

    def __init__(self, poison: int) -> None:
        self.poison = poison

    def propose(self, asked: Sequence[Asked]) -> dict[str, list[int]]:
        return {one.sequence.id: [self.poison] * min(one.room, 3) for one in asked}

    def forget(self, id: str) -> None:
        pass


def test_a_wrong_guess_does_no_harm(make_model: Any, make_core: Any, reference: Any) -> None:
    model = make_model()
    expected = reference(model, [1, 2, 3], 30)
    poison = next(id for id in range(256) if id not in expected)
    with torch.no_grad():
        model.embed.weight[poison] = torch.nan
    core = make_core(model, drafter=Poisonous(poison), always_draft=True)
    core.add(request([1, 2, 3], max_tokens=30))
    found = []
    with torch.inference_mode():
        while core.busy:
            found += [item for _, item in core.step().items]
    assert ids(found) == expected
    assert core.stats().steps == 31, "one of them for nothing"


def test_new_weights_go_on_from_what_has_been_said(
    model: Transformer, make_model: Callable[..., Transformer], make_core: Callable[..., Core]
) -> None:
    """Sequences that run go on as if the new weights had been given what they have so far; nothing cached is kept."""
    newer = make_model(spread=6.0)
    prompts = [[1, 2, 3], list(range(30)), list(range(33)), [7] * 20]
    core = make_core(model, streams=3)

    def go(core: Core, requests: Sequence[Request], steps: int | None = None) -> list[list[int]]:
        found: dict[str, list[int]] = {one.id: [] for one in requests}
        with torch.inference_mode():
            while core.busy and steps != 0:
                for id, item in core.step().items:
                    assert isinstance(item, Token)
                    found[id].append(item.id)
                steps = None if steps is None else steps - 1
        return list(found.values())

    requests = [request(prompt, max_tokens=20) for prompt in prompts]
    for one in requests:
        core.add(one)
    before = go(core, requests, 6)
    core.renew(TransformerNetwork.of(newer, "fp32")[0], salt="newer", weights_step=9)
    assert core.stats().used_blocks == 0
    after = go(core, requests)
    assert (core.stats().weights_step, core.stats().used_blocks) == (9, 0)
    assert [len(tokens) for tokens in before] == [6, 6, 0, 6], "one still waits"
    fresh = make_core(newer, streams=3)
    going_on = [
        request([*prompt, *tokens], max_tokens=20 - len(tokens))
        for prompt, tokens in zip(prompts, before, strict=True)
    ]
    for one in going_on:
        fresh.add(one)
    assert after == go(fresh, going_on)
    again = [request(prompt, max_tokens=20) for prompt in prompts]
    for one in again:
        core.add(one)
    found = go(core, again)
    assert found[2] == after[2]
    assert found[0][:6] != before[0]
