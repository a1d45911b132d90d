"""What the router costs, what it saves, and whether anybody notices a kill -9, on this machine.

    python benchmarks/serve_router_cpu.py [--short] [--json FILE]

1. Added time to first token: the same request to a replica directly and through the router, by turns over kept
   connections, so that both meet the same load; the median of the pairs' differences counts. Besides, the router's own
   CPU time for each token that it passes on.
2. Failover: three replicas under load, streams and whole answers, greedy and sampled; the same requests undisturbed
   and with a kill -9 of one replica (its process group's head) in the middle. All answers are compared.
3. Policies on prompts with shared prefixes, more of them than one replica's cache holds: what the replicas' prefix
   caches found (their own counters, where they have /metrics), times to first token, and the same simulated.

Replicas are `muster serve` with a small model of random weights; they share the cores with router and client, so times
under load are upper bounds.
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
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import httpx
import psutil
import torch
from cells import machine

from muster.data.tokenizer import Tokenizer
from muster.model.folder import save_folder
from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer
from muster.serve.load.client import Server
from muster.serve.load.drive import closed_loop
from muster.serve.load.figures import Objective, summarize
from muster.serve.load.workload import Workload, requests
from muster.serve.router.policy import Policy
from muster.serve.router.simulate import Arrival, Machine, simulate

CONTEXT, STREAMS = 1024, 4
REPLICAS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a tenth of everything, to see that it runs")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    scale = 0.1 if arguments.short else 1.0
    print(f"load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_model(Path(temporary) / "model")
        with contextlib.ExitStack() as stack:
            urls = [stack.enter_context(serving(folder, "--port", "0"))[0] for _ in range(REPLICAS)]
            result: dict[str, Any] = {"ttft": added_ttft(urls[0], pairs=int(500 * scale))}
            result["tokens"] = cost_of_tokens(urls, int(600 * scale))
            result["policies"] = policies(urls, int(720 * scale))
        result["simulated"] = simulated()
        result["failover"] = failover(folder, int(400 * scale))
    if arguments.json:
        about = {"machine": machine(), "date": date.today().isoformat(), "torch": torch.__version__}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(about | {"short": arguments.short} | result, indent=1) + "\n")


def make_model(folder: Path) -> Path:
    """A small Llama with random weights, wide enough that different prompts continue differently."""
    tokenizer = Tokenizer.byte()
    spec = TransformerSpec(
        family="llama", layers=4, width=128, heads=4, kv_heads=2, head_dim=32, ffn=384, vocab=tokenizer.vocab,
        context=CONTEXT, tied=False,
    )  # fmt: skip
    model = Transformer(spec)
    model.init_weights(seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(4.0)
    save_folder(
        dict(model.named_parameters()), spec, folder, dtype=torch.float32, bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )  # fmt: skip
    tokenizer.save(folder)
    return folder


@contextlib.contextmanager
def serving(*arguments: object) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(address, process) of `muster serve ARGUMENTS`, ended with SIGTERM."""
    options = [] if "--upstream" in arguments else ["--streams", STREAMS, "--dtype", "fp32"]
    command = [sys.executable, "-m", "muster", "serve", *map(str, [*arguments, *options])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        found = None
        for line in process.stdout:
            if found := re.match(r"serving .* on (http\S+)", line):
                break
        if found is None:
            raise SystemExit(f"{' '.join(command)} ended with {process.wait()}")
        reader = threading.Thread(target=lambda: list(process.stdout or ()), daemon=True)
        reader.start()
        try:
            yield found[1], process
        finally:
            process.send_signal(signal.SIGTERM)
            if process.wait(60) != 0:
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")


@contextlib.contextmanager
def routing(urls: list[str], policy: str) -> Iterator[tuple[str, psutil.Process]]:
    upstreams = [text for url in urls for text in ("--upstream", url)]
    with serving(*upstreams, "--port", "0", "--policy", policy) as (url, process):
        wait(lambda: sum(figure(url, "muster_router_replica_ready")) == len(urls))
        yield url, psutil.Process(process.pid)


def figure(url: str, name: str) -> list[float]:
    """Values of a metric; none where the server has no metrics, or not this one."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError:
        return []
    return [float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M)]


def wait(condition: Callable[[], bool], limit_s: float = 180.0) -> float:
    started_s = time.perf_counter()
    while not condition():
        if time.perf_counter() - started_s > limit_s:
            raise SystemExit("what was waited for did not come")
        time.sleep(0.05)
    return time.perf_counter() - started_s


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (10, 50, 90, 99)}


def added_ttft(url: str, pairs: int) -> dict[str, Any]:
    """Part 1, for a short prompt and a long one, streams and whole answers."""
    names = ("direct p50", "routed p50", "added p50", "p10", "p90", "its CPU")
    print(f"\n{'request, ms':>20}" + "".join(f"{name:>12}" for name in names))
    result: dict[str, Any] = {}
    with routing([url], "prefix") as (through, router):
        for name, prompt, stream in (
            ("stream, 16 tokens", "x" * 16, True),
            ("stream, 512 tokens", list(range(256)) * 2, True),
            ("whole, 16 tokens", "x" * 16, False),
        ):
            body = {"model": "model", "prompt": prompt, "max_tokens": 4, "seed": 1, "stream": stream}
            sides = {"direct": connect(url), "routed": connect(through)}
            times: dict[str, list[float]] = {side: [] for side in sides}
            before = router.cpu_times()
            for pair in range(pairs + 20):
                order = ("direct", "routed") if pair % 2 else ("routed", "direct")
                for side in order:
                    took_s = first_byte_s(sides[side], body)
                    if pair >= 20:
                        times[side].append(took_s)
            after = router.cpu_times()
            cpu_s = (after.user + after.system - before.user - before.system) / (pairs + 20)
            for connection in sides.values():
                connection.close()
            added = [routed - direct for direct, routed in zip(times["direct"], times["routed"], strict=True)]
            result[name] = {side: percentiles(values) for side, values in times.items()}
            result[name] |= {"added": percentiles(added), "router_cpu_s": cpu_s, "pairs": pairs}
            result[name]["load"] = os.getloadavg()[0]
            medians = [statistics.median(values) for values in (times["direct"], times["routed"], added)]
            spread = [result[name]["added"][percent] for percent in ("p10", "p90")]
            cells = "".join(f"{seconds * 1e3:12.3f}" for seconds in (*medians, *spread, cpu_s))
            print(f"{name:>20}{cells}", flush=True)
    return result


def connect(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)


def first_byte_s(connection: http.client.HTTPConnection, body: dict[str, Any]) -> float:
    """Seconds from sending a request to the first of its answer's body."""
    content = json.dumps(body).encode()
    started_s = time.perf_counter()
    connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read1(1)
    took_s = time.perf_counter() - started_s
    answer.read()
    return took_s


def cost_of_tokens(urls: list[str], count: int) -> dict[str, Any]:
    """The router's CPU time for a token that it passes on, under load."""
    workload = Workload(requests=max(count // 10, 12), prompt_tokens=32, output_tokens=64, seed=1)
    with routing(urls, "prefix") as (url, process):
        before = process.cpu_times()
        figures = load(url, workload, concurrency=REPLICAS * STREAMS)
        after = process.cpu_times()
    cpu_s = after.user + after.system - before.user - before.system
    tokens = figures["output_tokens"]
    print(
        f"\nrouter's CPU time: {cpu_s / tokens * 1e6:.0f} us a token, of {tokens} tokens in {figures['wall_s']:.1f} s"
    )
    return {"cpu_s_per_token": cpu_s / tokens, "load": figures}


def load(url: str, workload: Workload, concurrency: int) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        server = Server(url)
        model = await server.model()
        sent = list(requests(workload))
        random.Random(workload.seed).shuffle(sent)  # groups in turn would be the worst that a cache can meet
        outcomes = await closed_loop(server, model, sent, concurrency=concurrency, tell=lambda outcome: None)
        return summarize(outcomes, Objective())

    return asyncio.run(run())


def policies(urls: list[str], count: int) -> dict[str, Any]:
    """Part 3: each policy in turn on the same replicas, with prefixes that none has seen."""
    print(
        f"\n{'policy':>14}{'found in caches':>17}{'ttft p50':>10}{'p99':>8} ms{'tokens/s':>10}{'failed':>8}"
    )
    result: dict[str, Any] = {}
    for number, policy in enumerate(get_args(Policy)):
        workload = Workload(
            requests=count, prompt_tokens=32, output_tokens=16, shared_prefix_tokens=512, groups=17, seed=100 + number
        )  # fmt: skip
        with routing(urls, policy) as (url, _):
            before = counters(urls)
            figures = load(url, workload, concurrency=6)
            after = counters(urls)
        queries, hits = (sum(after[which]) - sum(before[which]) for which in ("queries", "hits"))
        rate = hits / queries if queries else None
        result[policy] = {"hit_rate": rate, **figures}
        ttft = figures["ttft_s"]
        said = "no counters" if rate is None else f"{rate:.1%}"
        print(f"{policy:>14}{said:>17}{ttft['p50'] * 1e3:10.1f}{ttft['p99'] * 1e3:8.1f}   "
              f"{figures['output_tokens_per_s']:10.0f}{figures['failed']:8}", flush=True)  # fmt: skip
    compare({policy: figures["hit_rate"] for policy, figures in result.items()})
    return result


def counters(urls: list[str]) -> dict[str, list[float]]:
    names = {"queries": "muster:prefix_cache_queries_total", "hits": "muster:prefix_cache_hits_total"}
    return {which: [sum(figure(url, name)) for url in urls] for which, name in names.items()}


def compare(rates: dict[str, float | None]) -> None:
    ours, base = rates["prefix"], rates["round-robin"]
    if ours and base:
        print(f"prefix affinity finds {ours / base:.2f} times what round robin does")


def simulated() -> dict[str, Any]:
    """Part 3 with virtual time: Poisson arrivals at three loads, the same for each policy."""
    print(f"\n{'simulated: policy':>18}{'requests/s':>12}{'found in caches':>17}{'mean s':>9}{'p99 s':>8}")
    result: dict[str, Any] = {}
    for rate in (4.0, 8.0, 16.0):
        found: dict[str, float | None] = {}
        for policy in get_args(Policy):
            chance, now_s, arrivals = random.Random(0), 0.0, []
            for number in range(2000):
                now_s += chance.expovariate(rate)
                group = chance.randrange(24)
                keys = [group * 100 + block for block in range(64)] + [
                    10**6 + number * 8 + block for block in range(8)
                ]
                arrivals.append(Arrival(now_s, keys, chance.randint(16, 64)))
            done = simulate(policy, arrivals, [Machine(900.0, cache_blocks=800) for _ in range(REPLICAS)])
            mean_s, p99_s = statistics.mean(done.latencies_s), percentiles(list(done.latencies_s))["p99"]
            found[policy] = done.hit_rate
            result.setdefault(policy, []).append(
                {"requests_per_s": rate, "hit_rate": done.hit_rate, "mean_s": mean_s, "p99_s": p99_s}
            )
            print(f"{policy:>18}{rate:12.0f}{done.hit_rate:17.1%}{mean_s:9.2f}{p99_s:8.2f}", flush=True)
        compare(found)
    return result


def failover(folder: Path, count: int) -> dict[str, Any]:
    """Part 2."""
    result: dict[str, Any] = {}
    with serving(folder, "--replicas", REPLICAS, "--port", "0") as (url, process):
        wait(lambda: sum(figure(url, "muster_router_replica_ready")) == REPLICAS)
        undisturbed, timeline = ask(url, count, lambda done: None)
        result["undisturbed"] = timeline
        killed: dict[str, float] = {}

        def disturb(done: int) -> None:
            if done >= count // 3 and not killed:
                victim = psutil.Process(process.pid).children()[0]
                killed["at_s"] = time.perf_counter()
                victim.kill()

        disturbed, timeline = ask(url, count, disturb)
        timeline["killed_at_s"] = killed["at_s"] - timeline.pop("began")
        undisturbed_began = result["undisturbed"].pop("began")
        assert undisturbed_began
        wait(lambda: sum(figure(url, "muster_router_replica_ready")) == REPLICAS)
        result["disturbed"] = timeline | {"all_replicas_again_s": time.perf_counter() - killed["at_s"]}
        result["failovers"] = figure(url, "muster_router_failovers_total")[0]
    result["requests"] = count
    result["failed"] = sum(answer is None for answer in disturbed)
    result["equal"] = sum(
        one is not None and one == two for one, two in zip(undisturbed, disturbed, strict=True)
    )
    print(
        f"\nkill -9 of one of {REPLICAS} replicas: {result['failed']} of {count} requests failed, {result['equal']} "
        f"answers equal, {result['failovers']:.0f} went on elsewhere; longest wait between two tokens "
        f"{timeline['longest_gap_s']:.2f} s ({result['undisturbed']['longest_gap_s']:.2f} s undisturbed); "
        f"{REPLICAS} replicas again after {result['disturbed']['all_replicas_again_s']:.1f} s",
        flush=True,
    )
    return result


def ask(url: str, count: int, disturb: Callable[[int], None]) -> tuple[list[Any], dict[str, Any]]:
    """All answers (None: failed), and when their pieces came: counts by tenth of a second."""
    began = time.perf_counter()
    arrived: list[float] = []
    longest = [0.0]

    async def one(client: httpx.AsyncClient, number: int) -> Any:
        body: dict[str, Any] = {
            "model": "model",
            "prompt": f"request {number}",
            "max_tokens": 48,
            "ignore_eos": True,
        }
        body |= {"temperature": 0} if number % 2 else {"seed": number, "top_p": 0.9}
        if number % 4 == 3:
            answer = await client.post(f"{url}/v1/completions", json=body)
            return answer.json()["choices"][0]["text"] if answer.status_code == 200 else None
        content, last_s = b"", time.perf_counter()
        async with client.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}) as answer:
            async for piece in answer.aiter_raw():
                now_s = time.perf_counter()
                arrived.append(now_s - began)
                if content:
                    longest[0] = max(longest[0], now_s - last_s)
                content, last_s = content + piece, now_s
        events = [event.removeprefix(b"data: ") for event in content.strip().split(b"\n\n")]
        if answer.status_code != 200 or events[-1] != b"[DONE]":
            return None
        return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])

    async def run() -> list[Any]:
        answers: list[Any] = [None] * count
        waiting, done = iter(range(count)), [0]
        async with httpx.AsyncClient(timeout=120) as client:

            async def worker() -> None:
                for number in waiting:
                    with contextlib.suppress(httpx.HTTPError):
                        answers[number] = await one(client, number)
                    done[0] += 1
                    disturb(done[0])

            await asyncio.gather(*(worker() for _ in range(REPLICAS * STREAMS)))
        return answers

    answers = asyncio.run(run())
    bins = [0] * (int(max(arrived, default=0.0) * 10) + 1)
    for at_s in arrived:
        bins[int(at_s * 10)] += 1
    return answers, {"began": began, "pieces_by_tenth_s": bins, "longest_gap_s": longest[0]}


if __name__ == "__main__":
    main()
