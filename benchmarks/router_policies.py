"""The router's policies beside one another, measured and simulated (`serve_router_cpu.py`)."""

from __future__ import annotations

import contextlib
import random
import statistics
from pathlib import Path
from typing import Any, get_args

import psutil
from router_side import core_of, figure, load, percentiles, pin, routing, serving

from muster.serve.load.workload import Workload
from muster.serve.router.policy import Policy
from muster.serve.router.simulate import Arrival, Machine, simulate

REPLICAS = 2
"""One for each core of a small machine; more would measure how the system shares those out."""
WORKLOADS = {"shared prefixes": (512, 12), "no shared prefix": (0, 1)}
"""(tokens, groups): more prefixes than one replica's cache holds, and fewer than two do."""


def policies(folder: Path, rounds: int, count: int) -> dict[str, Any]:
    """Each policy in turn on the same replicas, round after round, with prompts that none has seen."""
    names = ("found in caches", "ttft p50 ms", "p99 ms", "tokens/s", "of round-robin")
    print(f"{'':>12}" + "".join(f"{name:>17}" for name in names))
    found: dict[str, Any] = {name: {policy: [] for policy in get_args(Policy)} for name in WORKLOADS}
    with contextlib.ExitStack() as stack:
        urls = []
        for number in range(REPLICAS):
            url, process = stack.enter_context(serving(folder, "--port", "0"))
            pin(psutil.Process(process.pid), core_of(number))
            urls.append(url)
        for turn in range(rounds):
            for place, (name, (shared, groups)) in enumerate(WORKLOADS.items()):
                chosen = get_args(Policy)[turn % 3 :] + get_args(Policy)[: turn % 3]
                for number, policy in enumerate(chosen):
                    workload = Workload(
                        requests=count, prompt_tokens=32 if shared else 544, output_tokens=16,
                        shared_prefix_tokens=shared, groups=groups, seed=100 * turn + 10 * place + number,
                    )  # fmt: skip
                    with routing(urls, policy) as (url, _):
                        before = counters(urls)
                        figures = load(url, workload, concurrency=2 * REPLICAS)
                        after = counters(urls)
                    queries, hits = (sum(after[which]) - sum(before[which]) for which in ("queries", "hits"))
                    found[name][policy].append(figures | {"hit_rate": hits / queries})
    result: dict[str, Any] = {}
    for name, by_policy in found.items():
        rates = {policy: [one["output_tokens_per_s"] for one in runs] for policy, runs in by_policy.items()}
        result[name] = {}
        for policy, runs in by_policy.items():
            ratios = [ours / base for ours, base in zip(rates[policy], rates["round-robin"], strict=True)]
            middle = {
                "hit_rate": statistics.median(one["hit_rate"] for one in runs),
                "ttft_p50_s": statistics.median(one["ttft_s"]["p50"] for one in runs),
                "ttft_p99_s": statistics.median(one["ttft_s"]["p99"] for one in runs),
                "output_tokens_per_s": statistics.median(rates[policy]),
                "of_round_robin": statistics.median(ratios),
            }
            result[name][policy] = middle | {"ratios": ratios, "failed": sum(one["failed"] for one in runs)}
            cells = f"{middle['hit_rate']:17.1%}" + "".join(
                f"{value:17.{digits}f}"
                for value, digits in (
                    (middle["ttft_p50_s"] * 1e3, 1),
                    (middle["ttft_p99_s"] * 1e3, 1),
                    (middle["output_tokens_per_s"], 0),
                    (middle["of_round_robin"], 2),
                )
            )
            print(f"{policy:>12}{cells}  {name}", flush=True)
    return result


def counters(urls: list[str]) -> dict[str, list[float]]:
    names = {"queries": "muster:prefix_cache_queries_total", "hits": "muster:prefix_cache_hits_total"}
    return {which: [sum(figure(url, name)) for url in urls] for which, name in names.items()}


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
        ours, base = found["prefix"], found["round-robin"]
        if ours and base:
            print(f"prefix affinity finds {ours / base:.2f} times what round robin does")
    return result
