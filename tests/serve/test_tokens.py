"""Embeddings, and the ids of texts: against the model itself, and the official client."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import httpx
import openai
import pytest
import torch
import torch.nn.functional as F

from muster.model.transformer import Transformer
from muster.serve.failures import RequestError
from muster.serve.intake import read_completion, read_embedding
from muster.serve.keys import Client
from muster.serve.limits import Limits
from muster.serve.protocol import EngineError, Request, SamplingParams
from muster.serve.schema import CompletionRequest, EmbeddingRequest


def last_hidden(model: Transformer, ids: list[int]) -> torch.Tensor:
    """What the head sees at the last token, of length 1."""
    seen: list[torch.Tensor] = []
    handle = model.norm.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.inference_mode():
        model(torch.tensor([ids]))
    handle.remove()
    return F.normalize(seen[0][0, -1].float(), dim=-1)


def test_an_embedding_is_the_last_tokens_hidden_state(
    served: Any, client: openai.OpenAI, model: Transformer
) -> None:
    texts = ["one", "a longer text of several blocks, so that a part of it is found", "one"]
    for _ in range(2):  # the second time out of the prefix cache
        answer = client.embeddings.create(model="tiny", input=texts)
        for text, found in zip(texts, answer.data, strict=True):
            expected = last_hidden(model, list(served.codec.encode(text)))
            torch.testing.assert_close(torch.tensor(found.embedding), expected, atol=2e-4, rtol=1e-3)
            assert math.fsum(value**2 for value in found.embedding) == pytest.approx(1, abs=1e-4)
    assert answer.usage.prompt_tokens == sum(map(len, texts))
    plain = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    assert [one.index for one in plain.data] == [0, 1, 2]
    assert plain.data[0].embedding == pytest.approx(answer.data[0].embedding, abs=1e-6)


def test_embeddings_and_texts_in_one_batch(
    served: Any, client: openai.OpenAI, model: Transformer, reference: Any
) -> None:
    """Neither changes the other, and a prompt of the whole context has an embedding, too."""
    before = (
        client.completions.create(model="tiny", prompt="abc", max_tokens=30, temperature=0).choices[0].text
    )
    stream = client.completions.create(model="tiny", prompt="abc", max_tokens=30, temperature=0, stream=True)
    whole = client.embeddings.create(model="tiny", input=[list(b"x" * 96), list(b"yz")])
    assert "".join(chunk.choices[0].text for chunk in stream) == before
    for text, found in zip(("x" * 96, "yz"), whole.data, strict=True):
        expected = last_hidden(model, list(served.codec.encode(text)))
        torch.testing.assert_close(torch.tensor(found.embedding), expected, atol=2e-4, rtol=1e-3)
    assert served.engine.stats().used_blocks == 0


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"input": []}, "input", "none empty"),
        ({"input": "x" * 97}, "input", "context is 96 tokens, but the prompt has 97"),
        ({"input": ["x"] * 65}, "n", "65 sequences"),
        ({"input": [999]}, "input", "outside the vocabulary"),
        ({"dimensions": 8}, "dimensions", "None"),
        ({"encoding_format": "hex"}, "encoding_format", "'base64'"),
        ({"model": "other"}, "model", "not served here"),
    ],
)
def test_wrong_embeddings(served: Any, changes: dict[str, Any], param: str, message: str) -> None:
    answer = httpx.post(f"{served.url}/v1/embeddings", json={"model": "tiny", "input": "a"} | changes)
    error = answer.json()["error"]
    assert answer.status_code in (400, 404)
    assert error["param"] == param, error
    assert message in error["message"]


def test_a_model_that_is_damaged_has_no_embedding(running: Any, make_model: Any) -> None:
    model = make_model()
    model.embed.weight.data[65] = math.nan

    async def embedded(engine: Any, prompt: tuple[int, ...]) -> int:
        request = Request(id=str(prompt), prompt=prompt, params=SamplingParams(max_tokens=0), embed=True)
        return len((await anext(engine.submit(request))).embedding)

    with running(model) as engine:
        with pytest.raises(EngineError, match="not finite"):
            asyncio.run(embedded(engine, (65, 66)))
        assert asyncio.run(embedded(engine, (66, 67))) == 32


def test_tokens_there_and_back(served: Any) -> None:
    def post(path: str, **fields: Any) -> Any:
        answer = httpx.post(f"{served.url}/{path}", json=fields)
        return (
            answer.json()
            if answer.status_code == 200
            else (answer.status_code, answer.json()["error"]["message"])
        )

    text = "né <|endoftext|>"
    told = post("tokenize", prompt=text, return_token_strs=True)
    assert told["tokens"] == list(text.encode())
    assert (told["count"], told["max_model_len"]) == (len(text.encode()), 96)
    assert len(told["token_strs"]) == told["count"]
    assert post("detokenize", tokens=told["tokens"], model="tiny") == {"prompt": text}
    assert post("tokenize", messages=[{"role": "user", "content": "a"}])["count"] == len(
        "user: a\nassistant:"
    )
    assert post("tokenize", prompt="", add_special_tokens=False)["tokens"] == []
    assert post("detokenize", tokens=[]) == {"prompt": ""}
    assert post("detokenize", tokens=[300]) == (400, "token id 300 is outside the vocabulary of 257 tokens")
    assert post("tokenize", model="tiny")[1] == "prompt or messages should be given, one of them"
    assert post("tokenize", prompt="a", model="x")[0] == 404


def test_what_cannot_fit_is_refused_before_it_is_tokenised(served: Any, monkeypatch: Any) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(type(served.codec), "encode", never)
    limits = Limits(context_tokens=96)
    body = CompletionRequest.model_validate({"model": "tiny", "prompt": "x" * 1_000_000})
    with pytest.raises(RequestError, match="the prompt has at least 76924"):
        read_completion(body, served.codec, limits, Client())
    body = CompletionRequest.model_validate({"model": "tiny", "prompt": ["x"] * 100_000})
    with pytest.raises(RequestError, match="100000 sequences"):
        read_completion(body, served.codec, limits, Client())


def test_who_may_say_how_urgent_it_is(served: Any) -> None:
    limits = Limits(context_tokens=96)

    def standing(client: Client, **fields: Any) -> tuple[str, int]:
        body = EmbeddingRequest.model_validate({"model": "tiny", "input": "a"} | fields)
        request = read_embedding(body, served.codec, limits, client)[0]
        return request.client, request.priority

    assert standing(Client("app", trusted=True), user="u", priority=-5) == ("app/u", -5)
    assert standing(Client("app", trusted=False), user="u", priority=5) == ("app", 5)
    with pytest.raises(RequestError, match="priority -5 needs a key that is trusted") as refusal:
        standing(Client("app", trusted=False), priority=-5)
    assert refusal.value.status == 403
