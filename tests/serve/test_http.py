"""The official OpenAI client against a real server."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from muster.model.transformer import Transformer
from muster.serve.template import JinjaTemplate

PROMPT = "def f(x):"


def complete(client: openai.OpenAI, **changes: Any) -> Any:
    """A greedy completion of 20 tokens, whatever they are."""
    fields: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "temperature": 0} | changes
    extensions = {"ignore_eos": True} | fields.pop("extra_body", {})
    return client.completions.create(**fields, extra_body=extensions)


def expected_text(served: Any, reference: Any, model: Transformer, prompt: str, count: int) -> str:
    ids = reference(model, served.codec.encode(prompt), count)
    text: str = served.codec.decode(ids)
    return text


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def raw_post(path: str, fields: dict[str, Any]) -> bytes:
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def test_health_and_models(served: Any, client: openai.OpenAI) -> None:
    health = httpx.get(f"{served.url}/health").json()
    assert health == {"status": "ok", "model": "tiny", "relay": True}
    assert [card.id for card in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "muster"
    with pytest.raises(openai.NotFoundError, match="'other' is not served here; use 'tiny'"):
        client.models.retrieve("other")
    assert "/v1/chat/completions" in httpx.get(f"{served.url}/openapi.json").json()["paths"]


def test_a_completion_is_the_models_greedy_continuation(
    served: Any, client: openai.OpenAI, model: Transformer, reference: Any
) -> None:
    answer = complete(client)
    assert answer.choices[0].text == expected_text(served, reference, model, PROMPT, 20)
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 20)
    assert answer.usage.total_tokens == len(PROMPT) + 20


def test_prompts_as_lists_token_ids_and_n(served: Any, client: openai.OpenAI) -> None:
    one, two = (complete(client, prompt=prompt).choices[0].text for prompt in ("one", "two"))
    both = complete(client, prompt=["one", "two"], n=2)
    assert [choice.text for choice in both.choices] == [one, one, two, two]
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.usage.completion_tokens == 80
    ids = [list(served.codec.encode(prompt)) for prompt in ("one", "two")]
    assert complete(client, prompt=ids[0]).choices[0].text == one
    assert [choice.text for choice in complete(client, prompt=ids).choices] == [one, two]


def test_a_stream_adds_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    whole = complete(client, n=2, prompt=["a", "b"], logprobs=1)
    texts, reasons, tokens = [""] * 4, [None] * 4, [[] for _ in range(4)]
    chunks = list(
        complete(
            client, n=2, prompt=["a", "b"], logprobs=1, stream=True, stream_options={"include_usage": True}
        )
    )
    for chunk in chunks[:-1]:
        for choice in chunk.choices:
            assert choice.logprobs.text_offset[:1] in ([], [len(texts[choice.index])])
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert reasons == ["length"] * 4
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_ends_with_done(served: Any) -> None:
    fields = {"model": "tiny", "prompt": "a", "max_tokens": 3, "stream": True}
    answer = httpx.post(f"{served.url}/v1/completions", json=fields)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_first(client: openai.OpenAI, stream: bool) -> None:
    plain = complete(client).choices[0].text
    answer = complete(client, echo=True, stream=stream)
    parts = answer if stream else [answer]
    assert "".join(part.choices[0].text for part in parts) == PROMPT + plain


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_cut_the_text_before_them(client: openai.OpenAI, stream: bool) -> None:
    plain = complete(client, max_tokens=40).choices[0].text
    stop = plain[10:13]
    answer = complete(client, max_tokens=40, stop=[stop, "never"], stream=stream, logprobs=0)
    parts = list(answer) if stream else [answer]
    text = "".join(part.choices[0].text for part in parts)
    assert text == plain[: plain.index(stop)]
    assert parts[-1].choices[0].finish_reason == "stop"
    tokens = [token for part in parts for token in part.choices[0].logprobs.tokens]
    assert len("".join(tokens)) >= len(text)
    if not stream:
        assert answer.usage.completion_tokens < 40


def test_end_of_sequence_stops_and_is_no_text(
    served: Any, serving: Any, make_model: Any, connect: Any
) -> None:
    model = make_model()
    eos = served.codec.tokenizer.eos_id
    model.head.weight.data[eos] = 100 * model.norm.weight  # likely wherever the hidden state sums above 0
    with serving(model) as biased:
        client = connect(biased)
        prompts = [chr(code) for code in range(65, 91)]
        answers = complete(client, prompt=prompts, max_tokens=60, extra_body={"ignore_eos": False})
        ended = [choice for choice in answers.choices if choice.finish_reason == "stop"]
        assert ended
        assert all("<|endoftext|>" not in choice.text for choice in ended)
        assert answers.usage.completion_tokens < 26 * 60
        assert complete(client, prompt=prompts, max_tokens=60).usage.completion_tokens == 26 * 60


def test_a_seed_is_reproducible_alone_and_in_a_crowd(client: openai.OpenAI) -> None:
    def seeded(_: int = 0) -> list[str]:
        answer = complete(client, temperature=1.2, top_p=0.9, seed=11, n=3, extra_body={"top_k": 50})
        return [choice.text for choice in answer.choices]

    def noise(index: int) -> None:
        complete(client, prompt=str(index) * index, temperature=1, max_tokens=index + 1)

    alone = seeded()
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(12) as pool:
        crowd = pool.map(noise, range(1, 30))
        assert all(texts == alone for texts in pool.map(seeded, range(4)))
        list(crowd)
    assert complete(client, temperature=1.2, seed=12).choices[0].text not in alone


def test_completion_logprobs(client: openai.OpenAI) -> None:
    logprobs = complete(client, logprobs=3, max_tokens=5).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 5
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert logprob == pytest.approx(max(top.values()))  # greedy
        assert token in top
        assert sum(math.exp(value) for value in top.values()) <= 1.0001


def test_chat_with_the_plain_template(served: Any, client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
    ]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=12, temperature=0, logprobs=True, top_logprobs=2
    )
    prompt = "system: Be kind.\nuser: Hello\nassistant:"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == complete(client, prompt=prompt, max_tokens=12).choices[0].text
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    entry = answer.choices[0].logprobs.content[0]
    assert entry.top_logprobs[0].token == entry.token
    assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token

    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=messages, max_completion_tokens=12, temperature=0, stream=True
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_chat_without_max_tokens_runs_to_the_end_of_the_context(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], extra_body={"ignore_eos": True}, stop=[]
    )
    assert answer.usage is not None
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.total_tokens == 96 or answer.choices[0].finish_reason == "stop"


def test_chat_with_the_models_template(serving: Any, model: Transformer, connect: Any) -> None:
    template = JinjaTemplate(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>",
        {},
    )
    with serving(model, template=template) as served:
        client = connect(served)
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=5, temperature=0
        )
        prompt = "<user>Hi<assistant>"
        assert (
            answer.choices[0].message.content == complete(client, prompt=prompt, max_tokens=5).choices[0].text
        )
        with pytest.raises(openai.BadRequestError, match="no system here"):
            client.chat.completions.create(model="tiny", messages=[{"role": "system", "content": "x"}])


def test_overload_is_answered_429_with_retry_after(serving: Any, make_model: Any, connect: Any) -> None:
    with serving(make_model(context=20_000), streams=1, waiting_limit=2) as served:
        client = connect(served)
        running = [complete(client, max_tokens=19_000, stream=True) for _ in range(1)]
        next(iter(running[0]))
        with pytest.raises(openai.RateLimitError, match="waiting already") as failure:
            complete(client, n=4)
        assert failure.value.response.headers["retry-after"] == "1"
        assert failure.value.type == "rate_limit_error"
        for stream in running:
            stream.close()
        wait_until(lambda: served.engine.stats().running == 0)
        assert complete(client).choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(serving: Any, make_model: Any, stream: bool) -> None:
    """The request would run for minutes; only its cancellation can free the slot in time."""
    with serving(make_model(context=60_000)) as served:
        fields = {"model": "tiny", "prompt": "a", "max_tokens": 50_000, "stream": stream, "ignore_eos": True}
        with socket.create_connection(served.address, timeout=30) as sock:
            sock.sendall(raw_post("/v1/completions", fields | {"n": 2}))
            if stream:
                sock.recv(10)
            else:
                wait_until(lambda: served.engine.stats().running == 2)
        wait_until(lambda: served.engine.stats().running == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_ends_in_an_error(
    serving: Any, make_model: Any, connect: Any, stream: bool
) -> None:
    with serving(make_model(context=60_000), request_s=0.3) as served:
        client = connect(served)
        with pytest.raises(openai.APIError, match="longer than this server allows"):
            for _ in complete(client, max_tokens=50_000, stream=stream):
                pass
        wait_until(lambda: served.engine.stats().running == 0)
