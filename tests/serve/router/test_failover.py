"""Replicas killed and stopped under load: no request fails, and every answer is what it is undisturbed."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest

CONTEXT = 96
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["é", "y"]}},
    "required": ["a", "b"],
}


def requests(count: int) -> list[tuple[str, dict[str, Any]]]:
    """Requests of all kinds, each different."""
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("completions", {"temperature": 0}),
        ("completions", {"seed": 1}),
        ("completions", {"seed": 2, "top_p": 0.9, "logprobs": 2, "frequency_penalty": 0.3}),
        ("completions", {"seed": 3, "n": 2, "max_tokens": 40}),
        ("completions", {"seed": 4, "stop": ["zz", "\ufffd\ufffd\ufffd\ufffd\ufffd"]}),
        ("chat/completions", {"seed": 5, "logprobs": True, "top_logprobs": 1}),
        (
            "chat/completions",
            {"seed": 6, "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        ),
    ]
    made = []
    for number in range(count):
        path, fields = kinds[number % len(kinds)]
        said = f"request {number}"
        prompt = (
            {"prompt": said} if path == "completions" else {"messages": [{"role": "user", "content": said}]}
        )
        stream = {"stream": True, "stream_options": {"include_usage": True}} if number % 3 else {}
        made.append((path, {"model": "small-run", "max_tokens": 60, **prompt, **fields, **stream}))
    return made


def plain(content: bytes, stream: bool) -> Any:
    """An answer, without what differs from time to time: ids, times, and how a stream was cut into pieces."""
    if not stream:
        answer = json.loads(content)
        return answer["choices"], answer["usage"]
    *parts, done = [event.removeprefix(b"data: ") for event in content.strip().split(b"\n\n")]
    assert done == b"[DONE]", content
    chunks = [json.loads(part) for part in parts]
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    choices: dict[int, tuple[list[str], list[Any], list[Any]]] = {}
    for chunk in chunks:
        for one in chunk["choices"]:
            texts, reasons, logprobs = choices.setdefault(one["index"], ([], [], []))
            texts.append(one["text"] if "text" in one else one["delta"].get("content", ""))
            reasons.append(one["finish_reason"])
            for values in (one["logprobs"] or {}).values():
                logprobs += values or ()
    return (
        {index: ("".join(one[0]), list(filter(None, one[1])), len(one[2])) for index, one in choices.items()},
        chunks[-1]["usage"],
    )


def ask(
    url: str, sent: list[tuple[str, dict[str, Any]]], disturb: Callable[[int], None] = lambda done: None
) -> list[Any]:
    """All answers, 12 requests at a time; `disturb` is told how many are there."""

    async def run() -> list[Any]:
        answers: dict[int, Any] = {}
        waiting = iter(enumerate(sent))
        async with httpx.AsyncClient(timeout=90) as client:

            async def one() -> None:
                for number, (path, body) in waiting:
                    answer = await client.post(f"{url}/v1/{path}", json=body)
                    assert answer.status_code == 200, answer.text
                    answers[number] = plain(answer.content, "stream" in body)
                    await asyncio.to_thread(disturb, len(answers))

            await asyncio.gather(*(one() for _ in range(12)))
        return [answers[number] for number in range(len(sent))]

    return asyncio.run(run())


def stopped_at_work(routed: Any, victim: str) -> psutil.Process:
    """A replica, or its engine, stopped with requests under way: they are certain to be lost when it is killed."""
    replicas = httpx.get(f"{routed.url}/health").json()["replicas"]
    process: psutil.Process = routed.replicas()[replicas[0]["url"]]
    if victim == "engine":
        (process,) = process.children()
    process.suspend()
    routed.wait(lambda: routed.figure("replica_running_requests")[0] > 0)
    return process


@pytest.mark.parametrize("victim", ["replica", pytest.param("engine", marks=pytest.mark.long)])
def test_a_kill_under_load_fails_nothing_and_changes_nothing(routed: Any, victim: str) -> None:
    routed.wait_ready(3)
    sent = requests(84)
    undisturbed = ask(routed.url, sent)
    before, killed = routed.figure("failovers_total")[0] + routed.figure("retries_total")[0], []

    def disturb(done: int) -> None:
        if done == 30:
            killed.append(stopped_at_work(routed, victim))
            killed[0].kill()

    assert ask(routed.url, sent, disturb) == undisturbed
    assert killed
    assert routed.figure("failovers_total")[0] + routed.figure("retries_total")[0] > before


@pytest.mark.long
def test_a_replica_that_hangs_is_left_and_started_again(routed: Any) -> None:
    """SIGSTOP: connections stay, nothing answers any more."""
    routed.wait_ready(3)
    sent = requests(42)
    undisturbed = ask(routed.url, sent)
    stopped: list[psutil.Process] = []

    def disturb(done: int) -> None:
        if done == 12 and not stopped:
            stopped.append(next(iter(routed.replicas().values())))
            stopped[0].send_signal(signal.SIGSTOP)

    assert ask(routed.url, sent, disturb) == undisturbed
    routed.wait(lambda: not stopped[0].is_running())


def test_a_client_that_leaves_frees_its_replica(routed: Any) -> None:
    body = {"model": "small-run", "prompt": "x", "max_tokens": 90, "ignore_eos": True, "temperature": 0}
    with httpx.stream("POST", f"{routed.url}/v1/completions", json=body | {"stream": True}) as answer:
        next(answer.iter_raw())
    routed.wait(lambda: sum(routed.figure("replica_running_requests")) == 0)
    assert sum(routed.figure("replica_outstanding_tokens")) == pytest.approx(0, abs=1e-6)


def test_requests_without_a_seed_differ_and_refusals_are_passed_on(routed: Any) -> None:
    body = {"model": "small-run", "prompt": "x", "max_tokens": 20}
    texts = {
        httpx.post(f"{routed.url}/v1/completions", json=body).json()["choices"][0]["text"] for _ in range(4)
    }
    assert len(texts) > 1
    refused = httpx.post(f"{routed.url}/v1/completions", json=body | {"max_tokens": 1000})
    assert refused.status_code == 400
    assert "context is 96 tokens" in refused.json()["error"]["message"]
    broken = httpx.post(
        f"{routed.url}/v1/completions", content=b'{"model"', headers={"Content-Type": "application/json"}
    )
    assert broken.status_code == 400
    assert httpx.get(f"{routed.url}/v1/models").json()["data"][0]["id"] == "small-run"
    assert httpx.get(f"{routed.url}/health/ready").status_code == 200
