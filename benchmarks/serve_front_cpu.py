"""What stands in front of the engine: its cost, and what a crowd, a slow or a rude one, does to everybody else.

    python benchmarks/serve_front_cpu.py [--short] [--only NAME ...] [--json FILE]

A server of a tiny model, so that nearly all that is measured is ours: HTTP, scheduler, sampler, sockets. The clients
run on the same cores and are counted against it. Bars, where there is one, are printed beside the figure.

overhead     a step of 32 streams through HTTP, beside a pass of the same network alone
idle         memory of 500 streams
overload     5 times as many requests as the server can answer
slowloris    1,000 connections that send their headers byte by byte, beside good traffic
disconnects  10,000 clients that leave at any moment
soak         mixed traffic, and whether memory grows
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import random
import re
import resource
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from cells import machine

from muster.data.tokenizer import Tokenizer
from muster.model.folder import load_folder, save_folder
from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer
from muster.serve.engine.network import TransformerNetwork
from muster.serve.engine.runner import make_batch
from muster.serve.engine.scheduler import Work
from muster.serve.engine.sequence import Sequence as Scheduled
from muster.serve.load.client import Outcome, Server
from muster.serve.load.drive import closed_loop, open_loop
from muster.serve.load.figures import Objective, summarize
from muster.serve.load.workload import Workload, requests

CONTEXT = 2048
STEP_BAR_MS, IDLE_BAR_MB, GOODPUT_BAR, SLOWLORIS_BAR, FREED_BAR_S = 0.5, 100, 0.9, 1.1, 1.0


class Running:
    """A server's process, the engine's beside it, and what it says about itself."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self.http = psutil.Process(process.pid)
        self.engine = self.http.children()[0]

    def metrics(self) -> dict[str, float]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        return {
            line.split("{")[0].removeprefix("muster:"): float(line.rsplit(" ", 1)[1])
            for line in lines
            if not line.startswith("#") and "_bucket" not in line
        }

    def cpu_s(self) -> tuple[float, float]:
        """Of HTTP and of the engine."""
        return tuple(sum(one.cpu_times()[:2]) for one in (self.http, self.engine))  # type: ignore[return-value]

    def rss_mb(self) -> tuple[float, float]:
        return self.http.memory_info().rss / 1e6, self.engine.memory_info().rss / 1e6

    def freed_s(self, limit_s: float = 30.0) -> float:
        """Time until nothing runs, waits or holds a block."""
        began = time.perf_counter()
        while time.perf_counter() - began < limit_s:
            now = self.metrics()
            names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            if not any(now[name] for name in names) and now["http_requests_in_progress"] <= 1:
                return time.perf_counter() - began
        return float("inf")


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[Running]:
    command = [
        sys.executable,
        "-m",
        "muster",
        "serve",
        str(folder),
        "--port",
        "0",
        "--dtype",
        "fp32",
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = ""
        while not (found := re.search(r"serving \S+ on http://127\.0\.0\.1:(\d+)", said)):
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"the server did not start: {said}")
            said += line
        yield Running(process, int(found[1]))
    finally:
        process.terminate()
        process.wait(60)


def tiny(folder: Path, layers: int = 1, width: int = 16) -> Path:
    tokenizer = Tokenizer.byte()
    spec = TransformerSpec(
        family="llama", layers=layers, width=width, heads=2, kv_heads=1, head_dim=width // 2, ffn=2 * width,
        vocab=tokenizer.vocab, context=CONTEXT, tied=False,
    )  # fmt: skip
    model = Transformer(spec)
    model.init_weights(0)
    parameters = dict(model.named_parameters())
    save_folder(
        parameters, spec, folder, dtype=torch.float32, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id
    )
    tokenizer.save(folder)
    return folder


def body(**changes: Any) -> bytes:
    fields = {"model": "tiny", "prompt": "hello", "max_tokens": 100, "temperature": 0, "ignore_eos": True}
    return json.dumps(fields | changes).encode()


def post(content: bytes) -> bytes:
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n"
    )
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + content


def read_all(port: int, contents: Sequence[bytes], on_open: Callable[[], None] = lambda: None) -> int:
    """Send requests all at once and read whatever comes, as cheaply as a client can; returns answers with [DONE]."""
    ends: dict[socket.socket, bytes] = {}
    done = 0
    with selectors.DefaultSelector() as selector:
        for content in contents:
            sock = socket.create_connection(("127.0.0.1", port))
            sock.sendall(post(content))
            selector.register(sock, selectors.EVENT_READ)
            ends[sock] = b""
            on_open()
        while ends:
            for key, _ in selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if data := sock.recv(1 << 16):
                    ends[sock] = (ends[sock] + data)[-40:]
                else:
                    done += b"[DONE]" in ends.pop(sock)
                    selector.unregister(sock)
                    sock.close()
    return done


def measure_overhead(folder: Path, short: bool) -> dict[str, Any]:
    streams, tokens, repeats = 32, 100 if short else 1000, 1 if short else 5
    found: list[dict[str, float]] = []
    with serving(folder, "--streams", str(streams)) as server:
        for repeat in range(repeats + 1):
            cpu, steps, began = server.cpu_s(), server.metrics()["engine_steps_total"], time.perf_counter()
            contents = [
                body(prompt=f"stream {one}", max_tokens=tokens, stream=True) for one in range(streams)
            ]
            assert read_all(server.port, contents) == streams
            wall_s = time.perf_counter() - began
            steps = server.metrics()["engine_steps_total"] - steps
            after = server.cpu_s()
            if repeat:  # the first one warms up
                found.append(
                    {
                        "wall": wall_s / steps * 1e3,
                        "http_cpu": (after[0] - cpu[0]) / steps * 1e3,
                        "engine_cpu": (after[1] - cpu[1]) / steps * 1e3,
                    }
                )
    alone_ms = network_alone_ms(folder, streams, 50 if short else 500)
    best = {f"{name}_ms_per_step": min(one[name] for one in found) for name in found[0]}
    return best | {
        "streams": streams,
        "network_alone_ms_per_step": alone_ms,
        # What a step waits for on a machine with a core for each process: HTTP works on the last step meanwhile.
        "engine_overhead_cpu_ms_per_step": best["engine_cpu_ms_per_step"] - alone_ms,
        "overhead_ms_per_step": best["wall_ms_per_step"] - alone_ms,
        "bar_ms": STEP_BAR_MS,
    }


def network_alone_ms(folder: Path, streams: int, steps: int) -> float:
    """The same passes without anything around them."""
    torch.set_num_threads(1)
    network, _ = TransformerNetwork.of(load_folder(folder), "fp32")
    cache = network.new_cache(streams * 4 + 1, 16)
    works = []
    for one in range(streams):
        sequence = Scheduled(id=str(one), arrival=one, tokens=list(range(40)), prompt_tokens=40, root=b"")
        sequence.blocks.extend(range(1 + 3 * one, 4 + 3 * one))
        works.append(Work(sequence, 39, 40))
    times = []
    with torch.inference_mode():
        for _ in range(steps):
            began = time.perf_counter()
            network.logits(make_batch(works, 16), cache)
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def measure_idle(folder: Path, short: bool) -> dict[str, Any]:
    """500 streams that are open and get a token now and then."""
    streams = 100 if short else 500
    with serving(folder, "--streams", str(streams)) as server:
        read_all(server.port, [body(stream=True) for _ in range(4)])
        before = server.rss_mb()
        socks = []
        for number in range(streams):
            sock = socket.create_connection(("127.0.0.1", server.port))
            sock.sendall(post(body(prompt=f"{number}", stream=True, max_tokens=1900)))
            sock.recv(1 << 12)  # it has begun, so it does not wait
            socks.append(sock)
        after = server.rss_mb()
        for sock in socks:
            sock.close()
        freed_s = server.freed_s()
    return {
        "streams": streams,
        "http_mb": after[0] - before[0],
        "engine_mb": after[1] - before[1],
        "sum_mb": sum(after) - sum(before),
        "freed_s": freed_s,
        "bar_mb": IDLE_BAR_MB,
    }


def measure_overload(folder: Path, short: bool) -> dict[str, Any]:
    objective = Objective(ttft_s=2.0)
    seconds = 4 if short else 60
    with serving(folder, "--streams", "8", "--max-wait", "1") as server:
        client = Server(server.url)

        def sent(count: int, seed: int) -> list[Any]:
            return list(requests(Workload(requests=count, prompt_tokens=64, output_tokens=64, seed=seed)))

        async def peak() -> list[Outcome]:
            model = await client.model()
            return await closed_loop(
                client, model, sent(60 if short else 1000, 0), concurrency=12, tell=_ignore
            )

        best = summarize(asyncio.run(peak()), objective)
        rate = 5 * best["requests_per_s"]

        async def crowd() -> list[Outcome]:
            model = await client.model()
            load = sent(round(rate * seconds), 1)
            return await open_loop(client, model, load, rate=rate, seed=1, tell=_ignore)

        outcomes = asyncio.run(crowd())
        freed_s = server.freed_s()
    # Of the time in which requests came: the queue's end belongs to no one.
    figures = summarize(outcomes, objective)
    begun = min(one.due_s for one in outcomes)
    met = [one for one in outcomes if objective.is_met(one) and one.ended_s - begun <= seconds]
    refusals = [one.ended_s - one.due_s for one in outcomes if one.is_refused]
    return {
        "peak_requests_per_s": best["goodput_requests_per_s"],
        "offered_requests_per_s": rate,
        "goodput_requests_per_s": len(met) / seconds,
        "goodput_of_peak": len(met) / seconds / best["goodput_requests_per_s"],
        "bar": GOODPUT_BAR,
        "admitted_ttft_s": figures["ttft_s"],
        "slo_ttft_s": objective.ttft_s,
        "succeeded": figures["succeeded"],
        "refused": figures["refused"],
        "failed": figures["failed"],
        "errors": figures["errors"],
        "refusal_s": _percentiles(refusals),
        "freed_s": freed_s,
    }


def measure_slowloris(folder: Path, short: bool) -> dict[str, Any]:
    crowd, count = (100, 60) if short else (1000, 1500)
    with serving(folder, "--streams", "8") as server:
        client = Server(server.url)

        async def good(seed: int) -> dict[str, float]:
            load = list(requests(Workload(requests=count, prompt_tokens=32, output_tokens=32, seed=seed)))
            outcomes = await closed_loop(client, await client.model(), load, concurrency=4, tell=_ignore)
            assert all(one.succeeded for one in outcomes)
            return _percentiles([one.ended_s - one.due_s for one in outcomes])

        async def slow(ended: list[float]) -> None:
            """A header that never ends, a byte a second; notes how long the server bore it."""
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            began = time.perf_counter()
            with contextlib.suppress(ConnectionError):
                writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n")
                while not await _ends_within(reader, 1.0):
                    writer.write(b"X")
            ended.append(time.perf_counter() - began)
            writer.close()

        async def both() -> tuple[dict[str, float], dict[str, float], list[float]]:
            await good(0)
            alone = await good(1)
            ended: list[float] = []
            crowded = asyncio.create_task(_crowd(slow, crowd, ended))
            await asyncio.sleep(1)
            beside = await good(2)
            crowded.cancel()
            await asyncio.gather(crowded, return_exceptions=True)
            if not ended:  # the good ones were done first
                await asyncio.wait_for(_crowd_once(slow, min(crowd, 50), ended), 60)
            return alone, beside, ended

        alone, beside, ended = asyncio.run(both())
    return {
        "connections": crowd,
        "alone_latency_s": alone,
        "beside_latency_s": beside,
        "p99_ratio": beside["p99"] / alone["p99"],
        "bar": SLOWLORIS_BAR,
        "closed": len(ended),
        "closed_after_s": _percentiles(ended),
        "deadline_s": 10.0,
    }


async def _crowd(slow: Callable[[list[float]], Any], size: int, ended: list[float]) -> None:
    """Always so many of them: one that is closed comes again."""

    async def again() -> None:
        while True:
            await slow(ended)

    await asyncio.gather(*(again() for _ in range(size)))


async def _crowd_once(slow: Callable[[list[float]], Any], size: int, ended: list[float]) -> None:
    await asyncio.gather(*(slow(ended) for _ in range(size)))


async def _ends_within(reader: asyncio.StreamReader, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return not await reader.read()
    except TimeoutError:
        return False


def measure_disconnects(folder: Path, short: bool) -> dict[str, Any]:
    count, at_once = (300, 32) if short else (10_000, 64)
    chance = random.Random(0)
    with serving(folder, "--streams", "8") as server:

        async def rude(room: asyncio.Semaphore) -> None:
            async with room:
                _, writer = await asyncio.open_connection("127.0.0.1", server.port)
                data = post(body(stream=chance.random() < 0.5, n=chance.choice((1, 1, 4)), max_tokens=1900))
                part = data if chance.random() < 0.8 else data[: chance.randrange(len(data))]
                with contextlib.suppress(ConnectionError):
                    writer.write(part)
                    await asyncio.sleep(chance.expovariate(20))
                if chance.random() < 0.5:
                    writer.transport.abort()
                writer.close()

        async def all_of_them() -> None:
            room = asyncio.Semaphore(at_once)
            await asyncio.gather(*(rude(room) for _ in range(count)))

        began = time.perf_counter()
        asyncio.run(all_of_them())
        seconds = time.perf_counter() - began
        freed_s = server.freed_s()
        read = read_all(server.port, [body(stream=True)])
    return {
        "disconnects": count,
        "seconds": seconds,
        "freed_s": freed_s,
        "bar_s": FREED_BAR_S,
        "answers_after": read,
    }


def measure_soak(folder: Path, short: bool) -> dict[str, Any]:
    seconds = 10 if short else 600
    rows: list[tuple[float, float, float]] = []
    with serving(folder, "--streams", "8") as server:
        client = Server(server.url)

        async def traffic() -> int:
            model, until = await client.model(), time.perf_counter() + seconds
            answered = 0

            async def one(seed: int) -> None:
                nonlocal answered
                while time.perf_counter() < until:
                    seed += 1000
                    load = requests(
                        Workload(requests=1, prompt_tokens=100, output_tokens=60, spread=0.9, seed=seed)
                    )
                    outcome = await client.complete(next(load), model, time.perf_counter())
                    answered += outcome.succeeded

            async def watch() -> None:
                while time.perf_counter() < until:
                    rows.append((time.perf_counter(), *server.rss_mb()))
                    await asyncio.sleep(seconds / 200)

            await asyncio.gather(watch(), *(one(seed) for seed in range(12)))
            return answered

        answered = asyncio.run(traffic())
    late = np.array(rows[len(rows) // 2 :])  # caches fill in the first half
    slope = np.polyfit(late[:, 0], late[:, 1:], 1)[0] * 60
    return {
        "seconds": seconds,
        "answers": answered,
        "http_mb": late[-1, 1],
        "engine_mb": late[-1, 2],
        "http_mb_per_minute": slope[0],
        "engine_mb_per_minute": slope[1],
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{one}": float(np.percentile(values, one)) for one in (50, 99)} if values else {}


def _ignore(_: Outcome) -> None:
    pass


PARTS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "overhead": measure_overhead,
    "idle": measure_idle,
    "overload": measure_overload,
    "slowloris": measure_slowloris,
    "disconnects": measure_disconnects,
    "soak": measure_soak,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--short", action="store_true", help="a small size of everything, to see that it works"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    figures: dict[str, Any] = {"date": str(date.today()), "machine": machine(), "short": arguments.short}
    with tempfile.TemporaryDirectory() as scratch:
        folder = tiny(Path(scratch) / "tiny")
        for name in arguments.only:
            load = os.getloadavg()[0]
            figures[name] = {"load_before": load, **PARTS[name](folder, arguments.short)}
            print(name, json.dumps(_rounded(figures[name])), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
