"""An answer that goes on elsewhere from what was delivered, at the engine and over HTTP, cut anywhere."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest

from muster.model.transformer import Transformer
from muster.serve.generation import Generation, Piece
from muster.serve.protocol import EngineError, Guide, Request, SamplingParams, Token
from muster.serve.router.trail import Trail

PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"seed": 5, "logprobs": 2},
    "filtered": {"seed": -1, "top_p": 0.9, "top_k": 40},
    "penalized": {"seed": 7, "repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "guided": {"seed": 3, "guide": Guide("regex", "[ab]{3}-[0-9]{40}")},
}


@pytest.mark.parametrize("kind", PARAMETERS)
def test_an_engine_goes_on_where_another_was(
    served: Any, model: Transformer, running: Any, generate: Any, kind: str
) -> None:
    params = SamplingParams(max_tokens=24, **PARAMETERS[kind])
    prompt = tuple(range(30, 50))
    codec = served.codec

    async def run() -> None:
        options = {"vocab": codec.tokenizer.vocab, "guides": codec.guides, "streams": 8, "step_tokens": 16}
        with running(model, **options) as engine:
            whole: list[Token] = await generate(engine, Request(id="whole", prompt=prompt, params=params))
            ids = [token.id for token in whole]
            cuts = range(1, len(ids), 3)
            rests = await asyncio.gather(
                *(
                    generate(
                        engine, Request(id=str(k), prompt=prompt, params=params, generated=tuple(ids[:k]))
                    )
                    for k in cuts
                )
            )
            for k, rest in zip(cuts, rests, strict=True):
                assert [token.id for token in rest] == ids[k:]
                assert [token.finish_reason for token in rest] == [token.finish_reason for token in whole[k:]]
                if kind == "sampled":
                    assert [t.logprob for t in rest] == pytest.approx(
                        [t.logprob for t in whole[k:]], abs=1e-4
                    )

    asyncio.run(run())


def test_nothing_left_to_generate_is_an_error(model: Transformer, running: Any, generate: Any) -> None:
    async def run() -> None:
        with running(model) as engine:
            params = SamplingParams(max_tokens=2, temperature=0.0)
            with pytest.raises(EngineError, match="2 of 2 tokens"):
                await generate(engine, Request(id="a", prompt=(1,), params=params, generated=(2, 3)))

    asyncio.run(run())


BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("completions", {"prompt": "once", "temperature": 0}),
    # Random weights speak bytes that are rarely text, so characters and stop strings straddle tokens by chance.
    "several": ("completions", {"prompt": ["a", "b"], "n": 2, "seed": 11, "echo": True}),
    "stop": ("completions", {"prompt": "x", "seed": 2, "stop": ["\ufffd\ufffd\ufffd\ufffd", "zz"]}),
    "logprobs": ("completions", {"prompt": "x", "seed": 2, "logprobs": 3}),
    "chat": (
        "chat/completions",
        {"messages": [{"role": "user", "content": "hi"}], "seed": 4, "logprobs": True, "n": 2},
    ),
    "guided": (
        "completions",
        {"prompt": "x", "seed": 3, "guided_choice": ["été à Nîmes", "étroit — à côté"]},
    ),
}


def stream(url: str, path: str, body: dict[str, Any], relay: dict[str, Any] | None) -> list[bytes]:
    """The events of a stream."""
    fields = {"model": "tiny", "max_tokens": 30, "stream": True, "stream_options": {"include_usage": True}}
    sent = fields | body | ({} if relay is None else {"relay": relay})
    answer = httpx.post(f"{url}/v1/{path}", json=sent, timeout=60)
    assert answer.status_code == 200, answer.text
    *events, rest = answer.content.split(b"\n\n")
    assert rest == b""
    return [event + b"\n\n" for event in events]


def said(events: bytes) -> Any:
    """All that a stream says, whatever its pieces: by choice, with the usage."""
    texts: dict[int, str] = {}
    reasons: dict[int, list[str]] = {}
    logprobs: dict[int, list[Any]] = {}
    usage = None
    *parts, last = [event.removeprefix(b"data: ") for event in events.strip().split(b"\n\n")]
    assert last == b"[DONE]"
    heads = set()
    for part in map(json.loads, parts):
        heads.add((part["id"], part["created"], part["object"]))
        usage = part.get("usage") or usage
        for choice in part["choices"]:
            index = choice["index"]
            texts[index] = texts.get(index, "") + (
                choice.get("text") or choice.get("delta", {}).get("content", "")
            )
            reasons.setdefault(index, []).extend(filter(None, [choice["finish_reason"]]))
            given = choice["logprobs"] or {}
            logprobs.setdefault(index, []).extend(
                given.get("text_offset") or [one["token"] for one in given.get("content") or []]
            )
    assert len(heads) == 1
    assert usage is not None
    return texts, reasons, logprobs, usage


@pytest.mark.parametrize("kind", BODIES)
def test_a_stream_goes_on_from_its_marks_cut_anywhere(served: Any, kind: str) -> None:
    path, body = BODIES[kind]
    plain = stream(served.url, path, body, None)
    assert not any(b": relay" in event for event in plain)
    head = {"id": "cmpl-1", "created": 17}
    marked = stream(served.url, path, body, head)
    whole = Trail("cmpl-1", 17)
    undisturbed = said(whole.feed(b"".join(marked)))
    expected = said(b"".join(plain))
    assert undisturbed == expected
    assert all(one["finished"] for one in whole.relay["choices"])
    cuts = sorted({*range(1, len(marked), max(1, len(marked) // 6)), len(marked) - 2, len(marked) - 1})
    for cut in cuts:
        trail = Trail("cmpl-1", 17)
        passed = trail.feed(b"".join(marked[:cut]) + marked[cut][:7])
        trail.restart()
        passed += trail.feed(b"".join(stream(served.url, path, body, trail.relay)))
        assert said(passed) == expected, cut


def test_a_stream_may_be_cut_many_times(served: Any) -> None:
    path, body = BODIES["chat"]
    expected = said(b"".join(stream(served.url, path, body, None)))
    trail, passed, rounds = Trail("a", 1), b"", 0
    while True:
        events = stream(served.url, path, body, trail.relay)
        trail.restart()
        passed += trail.feed(b"".join(events[:2]))
        if len(events) <= 2:
            break
        rounds += 1
    assert rounds > 5
    assert said(passed) == expected


class Scripted:
    """An engine that says what it is told, whatever the request."""

    def __init__(self, script: Sequence[int]) -> None:
        self._script = script

    async def submit(self, request: Request) -> AsyncIterator[Token]:
        for place, id in enumerate(self._script):
            if place >= len(request.generated):
                yield Token(id=id, finish_reason="length" if place == len(self._script) - 1 else None)

    def cancel(self, request_id: str) -> None: ...


def test_text_goes_on_exactly_wherever_tokens_characters_and_stop_strings_straddle() -> None:
    chance = random.Random(0)
    # Bytes of tokens: letters, pairs, and parts of characters.
    vocabulary = [
        b"a",
        b"b",
        b"ab",
        b"bb",
        b"abc",
        b"",
        "é".encode()[:1],
        "é".encode()[1:],
        "€".encode()[:2],
        b"\xac",
    ]

    def decode(ids: Sequence[int]) -> str:
        return b"".join(vocabulary[id] for id in ids).decode(errors="replace")

    async def pieces(script: list[int], stop: list[str], progress: tuple[list[int], int]) -> list[Piece]:
        ids, characters = progress
        params = SamplingParams(max_tokens=len(script))
        request = Request(id="a", prompt=(0,), params=params, generated=tuple(ids))
        generation = Generation(Scripted(script), decode, request, stop, characters)  # type: ignore[arg-type]
        return [piece async for piece in generation.pieces()]

    resumed = ahead = 0
    for _ in range(400):
        script = [chance.randrange(len(vocabulary)) for _ in range(chance.randint(1, 12))]
        stop = ["".join(chance.choices("abc", k=chance.randint(1, 4))) for _ in range(chance.randint(0, 2))]
        whole = asyncio.run(pieces(script, stop, ([], 0)))
        for cut in range(1, len(whole)):
            ids = [token.id for piece in whole[:cut] for token in piece.tokens]
            text = "".join(piece.text for piece in whole[:cut])
            rest = asyncio.run(pieces(script, stop, (ids, len(text))))
            assert text + "".join(piece.text for piece in rest) == "".join(piece.text for piece in whole)
            for one in ("finish_reason", "generated_tokens"):
                assert getattr(rest[-1], one) == getattr(whole[-1], one)
            assert [t for p in rest for t in p.tokens] == [t for p in whole[cut:] for t in p.tokens]
            resumed, ahead = resumed + 1, ahead + (decode(ids) != text)
    assert resumed > 500
    assert ahead > 20


@pytest.mark.parametrize(
    ("choice", "stream", "message"),
    [
        ({"ids": [400]}, True, "token id 400 is outside the vocabulary"),
        ({"ids": [65] * 4}, True, "4 tokens are delivered already, of max_tokens 4"),
        ({"ids": [256]}, True, "the end of sequence is delivered already"),
        ({"ids": [65]}, False, "only a stream can be continued"),
        ({"ids": [-1]}, True, "greater than or equal to 0"),
    ],
)
def test_impossible_progress_is_refused(served: Any, choice: Any, stream: bool, message: str) -> None:
    progress = {"index": 0, "characters": 0, "generated": 1, "finished": False} | choice
    body = {
        "model": "tiny",
        "prompt": "x",
        "max_tokens": 4,
        "stream": stream,
        "relay": {"id": "a", "created": 1, "choices": [progress]},
    }
    answer = httpx.post(f"{served.url}/v1/completions", json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
