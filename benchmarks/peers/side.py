"""What all sides of the comparison have in common: being started, asked for exactly so many tokens, and timed.

A side is asked over HTTP by the client of `muster bench serve`, or, where its wheel has no server, by lines of JSON
to a process that calls its library: the times are then of its own clock, and no HTTP is in them.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import create_server
from typing import Any, Protocol

import psutil

from muster.serve.load.client import Outcome, Server
from muster.serve.load.drive import closed_loop
from muster.serve.load.workload import Sent

START_S = 300.0
END_S = 20.0
Prompt = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How a side is started."""

    format: str
    """bf16, int8 or int4: of the weights."""
    streams: int
    """Requests at a time, at most."""
    context: int
    """Tokens of a request at most, prompt and answer."""
    prefix_cache: bool = False
    """Whether what prompts begin with alike may be computed once."""
    threads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What became of one request; times are of one clock."""

    sent_s: float
    arrived_s: tuple[float, ...]
    """Of each piece of text: one token each, if the tokenizer is `models.words`."""
    ended_s: float
    prompt_tokens: int
    output_tokens: int


class Running(Protocol):
    """A side that is ready."""

    ready_s: float
    """From the start of its process until then."""
    pid: int

    def ask(self, prompts: Sequence[Prompt], output_tokens: int, concurrency: int) -> list[Answer]:
        """Greedy answers of exactly `output_tokens` tokens, of as many requests at a time as stated."""
        ...


class Side(Protocol):
    """One contestant."""

    name: str
    formats: tuple[str, ...]
    over_http: bool
    prefix_caches: tuple[bool, ...]
    """Whether it can be measured with a cache of what prompts begin with alike, and without."""

    def install(self) -> None:
        """Make it usable, from a package index, where it is not yet."""
        ...

    def convert(self, model: Path, format: str) -> Path:
        """The model of a folder in Hugging Face layout as the side reads it; kept for the next time."""
        ...

    def start(self, model: Path, setting: Setting) -> Any:
        """A context in which it runs (`Running`); `model` is what `convert` returned."""
        ...


class Failed(Exception):
    """A side did not start, or did not answer as asked."""


def converted(command: Sequence[str], draft: Path, wanted: Path) -> Path:
    """What a peer's own converter writes to `draft`, kept as `wanted` once it is whole. Raises Failed."""
    done = subprocess.run(
        command,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Failed(f"the conversion failed: {done.stderr[-2000:]}")
    draft.replace(wanted)
    return wanted


@dataclass(slots=True)
class HttpRunning:
    """An OpenAI-compatible server."""

    url: str
    ready_s: float
    pid: int

    def ask(self, prompts: Sequence[Prompt], output_tokens: int, concurrency: int) -> list[Answer]:
        sent = [Sent(number, prompt, output_tokens) for number, prompt in enumerate(prompts)]
        server = Server(self.url)

        async def all_of_it() -> list[Outcome]:
            model = await server.model()
            return await closed_loop(server, model, sent, concurrency=concurrency, tell=lambda outcome: None)

        return [
            _answer(outcome, request) for outcome, request in zip(asyncio.run(all_of_it()), sent, strict=True)
        ]


def _answer(outcome: Outcome, sent: Sent) -> Answer:
    if not outcome.succeeded:
        raise Failed(f"a request failed: {outcome.status} {outcome.error}")
    if (outcome.prompt_tokens, outcome.output_tokens) != (len(sent.prompt), sent.output_tokens):
        raise Failed(
            f"asked for {sent.output_tokens} tokens after {len(sent.prompt)}, "
            f"got {outcome.output_tokens} after {outcome.prompt_tokens}"
        )
    return Answer(
        sent_s=outcome.due_s, arrived_s=tuple(outcome.arrived_s[: outcome.output_tokens]), ended_s=outcome.ended_s,
        prompt_tokens=outcome.prompt_tokens, output_tokens=outcome.output_tokens,
    )  # fmt: skip


@contextmanager
def http_side(
    command: Sequence[str], port: int, log: Path, more: Mapping[str, str] | None = None
) -> Iterator[HttpRunning]:
    """A server's process, from its start until it says that it is ready, ended with the context."""
    url = f"http://127.0.0.1:{port}"
    with _process(command, log, more, piped=False) as (process, begun_s):
        while not _is_ready(url):
            if process.poll() is not None or time.perf_counter() - begun_s > START_S:
                raise Failed(f"{command[0]} did not start: see {log}")
            time.sleep(0.01)
        yield HttpRunning(url, time.perf_counter() - begun_s, process.pid)


def _is_ready(url: str) -> bool:
    """Asks for readiness where a server tells it apart from being alive."""
    for path in ("/health/ready", "/health"):
        try:
            with urllib.request.urlopen(url + path, timeout=START_S):
                return True
        except urllib.error.HTTPError as refusal:
            if refusal.code != 404:
                return False
        except (urllib.error.URLError, OSError):
            return False
    return False


@dataclass(slots=True)
class WorkerRunning:
    """A process that reads one JSON line a load, and writes one with the answers."""

    process: subprocess.Popen[str]
    ready_s: float
    pid: int

    def ask(self, prompts: Sequence[Prompt], output_tokens: int, concurrency: int) -> list[Answer]:
        load = {"prompts": prompts, "output_tokens": output_tokens, "concurrency": concurrency}
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(load) + "\n")
        self.process.stdin.flush()
        reply = _reply(self.process)
        answers = [
            Answer(**answer | {"arrived_s": tuple(answer["arrived_s"])}) for answer in reply["answers"]
        ]
        counts = [(answer.prompt_tokens, answer.output_tokens) for answer in answers]
        if counts != [(len(prompt), output_tokens) for prompt in prompts]:
            raise Failed(f"asked for {output_tokens} tokens of each, got {counts}")
        return answers


@contextmanager
def worker_side(
    command: Sequence[str], log: Path, more: Mapping[str, str] | None = None
) -> Iterator[WorkerRunning]:
    """A worker's process, from its start until it says that it is ready, ended with the context."""
    with _process(command, log, more, piped=True) as (process, begun_s):
        _reply(process)
        yield WorkerRunning(process, time.perf_counter() - begun_s, process.pid)
        assert process.stdin
        process.stdin.close()  # its end


def _reply(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The worker's next line that is an answer: libraries may write lines of their own."""
    assert process.stdout
    for line in process.stdout:
        if line.startswith("{"):
            said: dict[str, Any] = json.loads(line)
            if "failed" in said:
                raise Failed(str(said["failed"]))
            return said
    raise Failed("the worker ended: see its log")


@contextmanager
def _process(
    command: Sequence[str], log: Path, more: Mapping[str, str] | None, *, piped: bool
) -> Iterator[tuple[subprocess.Popen[str], float]]:
    log.parent.mkdir(parents=True, exist_ok=True)
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "w") as errors:
        begun_s = time.perf_counter()
        process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
            stdout=subprocess.PIPE if piped else errors, stderr=errors, text=True,
            env=os.environ | offline | dict(more or {}),
        )  # fmt: skip
    try:
        yield process, begun_s
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


def free_port() -> int:
    with create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def memory_bytes(pid: int) -> int:
    """Resident now, of a process and those that it started."""
    process = psutil.Process(pid)
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))


def figures(answers: Sequence[Answer]) -> dict[str, float]:
    """Rates of one load whose requests all began together.

    prefill: tokens of all prompts, over the time until every answer had begun.
    decode: the sum of the answers' own rates, each between its first and last piece while all were being generated.
    end to end: all generated tokens, over the time until the last answer ended.
    """
    sent_s = min(answer.sent_s for answer in answers)
    all_begun_s = max(answer.arrived_s[0] for answer in answers)
    first_end_s = min(answer.arrived_s[-1] for answer in answers)
    decode = sum(_rate(answer, all_begun_s, first_end_s) for answer in answers)
    total_s = max(answer.ended_s for answer in answers) - sent_s
    return {
        "prefill_tokens_per_s": sum(answer.prompt_tokens for answer in answers) / (all_begun_s - sent_s),
        "decode_tokens_per_s": decode,
        "output_tokens_per_s": sum(answer.output_tokens for answer in answers) / total_s,
        "wall_s": total_s,
    }


def _rate(answer: Answer, from_s: float, to_s: float) -> float:
    """Tokens/s of an answer between two times, or of all of it where that is too short. What one step generates
    arrives piece by piece: half a step of grace at both ends keeps the same number of steps for every answer."""
    arrived_s = answer.arrived_s
    step_s = (arrived_s[-1] - arrived_s[0]) / max(len(arrived_s) - 1, 1)
    inside = [at for at in arrived_s if from_s - step_s / 2 <= at <= to_s + step_s / 2]
    if not inside or inside[0] == inside[-1]:
        inside = list(arrived_s)
    if len(inside) < 2:
        raise Failed(f"{answer.output_tokens} tokens came in one piece: ask for more")
    # Pieces that were read at once have one time; where all were, the answer's rate is at least this.
    span_s = inside[-1] - inside[0] or inside[-1] - answer.sent_s
    return answer.output_tokens / len(arrived_s) * (len(inside) - 1) / span_s
