"""Prompts computed by one replica and answered by another, in processes of their own."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from muster.data.tokenizer import Tokenizer
from muster.errors import UsageError
from muster.model.folder import save_folder
from muster.serve.handover import VARIABLE

LENGTH = 400


@pytest.fixture(scope="module")
def long_folder(make_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "long"
    tokenizer = Tokenizer.byte()
    model = make_model(vocab=tokenizer.vocab, context=512)
    save_folder(
        dict(model.named_parameters()), model.spec, folder, dtype=model.head.weight.dtype,
        bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id,
    )  # fmt: skip
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def split(long_folder: Path, routing: Any) -> Iterator[Any]:
    with routing(long_folder, "--replicas", 1, "--prefill-replicas", 1, "--dtype", "fp32") as routed:
        routed.wait_ready(2)
        yield routed


def prompt(number: int) -> list[int]:
    return [(number * 7 + place * (number + 3)) % 250 + 1 for place in range(LENGTH)]


def ask(url: str, number: int, **fields: Any) -> Any:
    body = {"model": "long", "prompt": prompt(number), "max_tokens": 24, "ignore_eos": True, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body | fields, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def hits(url: str) -> int:
    text = httpx.get(f"{url}/metrics").text
    (line,) = [one for one in text.splitlines() if one.startswith("muster:prefix_cache_hits_total{")]
    return int(line.rpartition(" ")[2])


def role(routed: Any, *, for_prompts: bool) -> tuple[str, psutil.Process]:
    """(address, process) of the replica of a kind."""
    first, second = httpx.get(f"{routed.url}/health").json()["replicas"]
    url = (second if for_prompts else first)["url"]
    return url, routed.replicas()[url]


def test_answers_are_the_same_and_the_prompt_is_found(split: Any) -> None:
    answers, (computes, process) = role(split, for_prompts=False), role(split, for_prompts=True)
    before = hits(answers[0])
    routed = [ask(split.url, number) for number in range(4)]
    seeded = ask(split.url, 9, temperature=1.0, seed=3, logprobs=2)
    assert split.figure("handovers_total")[0] == 5
    assert split.figure("failed_handovers_total")[0] == 0
    assert hits(answers[0]) - before == 5 * (LENGTH // 16) * 16 - (LENGTH % 16 == 0) * 5
    assert [ask(computes, number) for number in range(4)] == routed  # where all of it was computed
    assert ask(computes, 9, temperature=1.0, seed=3, logprobs=2) == seeded
    chat = {"model": "long", "messages": [{"role": "user", "content": "x" * 300}], "max_tokens": 4}
    assert httpx.post(f"{split.url}/v1/chat/completions", json=chat).status_code == 200
    short = {"model": "long", "prompt": "short", "max_tokens": 4}
    assert httpx.post(f"{split.url}/v1/completions", json=short).status_code == 200
    ask(split.url, 0)  # known there by now
    assert split.figure("handovers_total")[0] <= 6
    folder = Path(process.environ()[VARIABLE].partition(":")[2])
    assert folder.stat().st_mode & 0o77 == 0
    assert not list(folder.iterdir())


def test_clients_cannot_move_blocks(split: Any) -> None:
    url, _ = role(split, for_prompts=False)
    for secret in ({}, {"x-muster-handover": "guess"}):
        sent = secret | {"x-muster-blocks": "0" * 32, "content-type": "application/json"}
        for where in (url, split.url):
            assert httpx.post(f"{where}/internal/blocks", content=b"{}", headers=sent).status_code == 404
            body = {"model": "long", "prompt": "short", "max_tokens": 4}
            assert "choices" in httpx.post(f"{where}/v1/completions", json=body, headers=sent).json()


def test_a_replica_for_prompts_dies_in_the_middle_of_one(split: Any) -> None:
    url, _ = role(split, for_prompts=False)
    expected = [ask(url, number) for number in (20, 21)]
    before = split.figure("failed_handovers_total")[0]
    _, process = role(split, for_prompts=True)
    process.send_signal(signal.SIGSTOP)  # it has the prompt, and says nothing
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(ask(split.url, 30)))
    thread.start()
    split.wait(lambda: split.figure("replica_running_requests")[1] == 1)
    process.kill()
    thread.join(60)
    assert got
    assert split.figure("failed_handovers_total")[0] == before + 1
    assert [ask(split.url, number) for number in (20, 21)] == expected
    assert got[0] == ask(url, 30)
    split.wait_ready(2)
    ask(split.url, 40)
    assert split.figure("handovers_total")[0] >= 1


def test_where_it_cannot_be(folder: Path) -> None:
    from muster.cli.serve import serve

    with pytest.raises(UsageError, match="give its PATH"):
        serve(upstream=["http://h:1"], prefill_replicas=1)
    with pytest.raises(UsageError, match="leave tensor and pipeline at 1"):
        serve(folder, prefill_replicas=1, tensor=2)
