"""Serving on this machine: muster beside llama.cpp, OpenVINO GenAI, ONNX Runtime GenAI and transformers.

    python benchmarks/serve_cpu.py [--peers ...] [--shapes m160 1b] [--formats bf16 int8 int4] [--concurrency 1 8 32]
                                   [--rounds N] [--prefix] [--short] [--json FILE]

All sides have the same random weights and get the same prompts, and generate exactly as many tokens as asked for.
Where a side has a server it is asked over HTTP, by the client of `muster bench serve`. OpenVINO GenAI's wheel has
none: its continuous batching runs in a process of its own without HTTP, which favours it. ONNX Runtime GenAI on CPUs
and transformers' `generate` have static batches, which favours them too, as all requests of a load are of one length.
`engine` is our own engine's loop without HTTP.

Sides run one at a time, each started, warmed up, measured and ended; the rounds are interleaved, and the best of them
counts, because whatever else the machine does only ever makes a side slower. `--prefix` measures prompts that share a
system prompt instead. Peers are installed on the first run, below build/peers (`--home`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch
from cells import machine
from peers import tables
from peers.models import model_folder, spec_of
from peers.ours import step_bytes
from peers.side import Failed, Prompt, Running, Setting, Side, figures, memory_bytes
from peers.sides import all_sides
from serve_kernels_cpu import read_bandwidth

FORMATS = ("bf16", "int8", "int4")
LOADS: dict[str, dict[int, tuple[int, int]]] = {
    "m160": {1: (256, 64), 8: (64, 48), 32: (32, 32)},
    "1b": {1: (128, 24), 8: (32, 16), 32: (16, 12)},
    "tiny": {1: (32, 16), 8: (16, 16), 32: (8, 16)},
}
"""Tokens of each prompt and answer by requests at a time: enough to be measured, few enough for slow sides."""
PREFIX_REQUESTS, PREFIX_CONCURRENCY, PREFIX_LOAD = 16, 8, (32, 16)


def prefix_tokens(shape: str) -> int:
    """Of the system prompt: 1024, or what fits."""
    return min(1024, spec_of(shape).context // 2)


def main() -> None:
    arguments = parse()
    sides = all_sides(arguments.home)
    chosen = [sides[name] for name in arguments.peers]
    for side in chosen:
        side.install()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {
        "machine": machine(), "date": date.today().isoformat(), "torch": torch.__version__,
        "bandwidth_bytes_per_s": read_bandwidth(),
        "setup": {k: v for k, v in vars(arguments).items() if k not in ("json", "home")},
    }  # fmt: skip
    begun_s = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        # Neighbours take their share of it: the best of all rounds, as of everything.
        result["bandwidth_bytes_per_s"] = max(result["bandwidth_bytes_per_s"], read_bandwidth())
        for shape in arguments.shapes:
            for format in arguments.formats:
                for side in chosen:
                    if format in side.formats:
                        rows += visit(side, shape, format, number, arguments)
                        keep(result | {"rows": rows}, arguments.json)  # what there is, should the rest fail
    result |= {"took_s": time.perf_counter() - begun_s, "rows": rows}
    if arguments.prefix:
        result["bars"] = tables.prefix(rows)
    else:
        result["bars"] = tables.rates(rows, result["bandwidth_bytes_per_s"])
    keep(result, arguments.json)


def keep(result: dict[str, Any], path: Path | None) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    home = Path(__file__).parents[1] / "build" / "peers"
    names = list(all_sides(home))
    parser.add_argument("--peers", nargs="+", choices=names, default=names, help="the sides, ours among them")
    parser.add_argument("--shapes", "--shape", nargs="+", choices=LOADS, default=["m160", "1b"])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--concurrency", nargs="+", type=int, choices=(1, 8, 32), default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prefix", action="store_true", help="prompts that share a system prompt")
    parser.add_argument(
        "--short", action="store_true", help="one round of few tokens: does it run, not how fast"
    )
    parser.add_argument("--home", type=Path, default=home, help="where peers and models are kept")
    parser.add_argument("--json", type=Path, help="also write all figures there")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.rounds = 1
    return arguments


def visit(
    side: Side, shape: str, format: str, number: int, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One start of a side, and what it did with each load; a side that fails is told of, and left out."""
    folder = model_folder(shape, arguments.home / "models")
    about = {"side": side.name, "shape": shape, "format": format, "round": number}
    for caching in side.prefix_caches if arguments.prefix else (False,):
        try:
            model = side.convert(folder, format)
            with side.start(model, setting(shape, format, caching, arguments)) as running:
                start = {"ready_s": running.ready_s, "prefix_cache": caching}
                for row in measure(running, shape, number, arguments):
                    whole = about | start | row | {"memory_bytes": memory_bytes(running.pid)}
                    whole |= {"over_http": side.over_http, "load": os.getloadavg()[0]}
                    if side.name in ("ours", "engine"):
                        whole["step_bytes"] = step_bytes(model, format)
                    tables.tell(whole)
                    yield whole
        except (Failed, OSError, subprocess.SubprocessError, psutil.Error) as failure:
            print(f"{side.name} {shape} {format}: {failure}", file=sys.stderr, flush=True)


def setting(shape: str, format: str, caching: bool, arguments: argparse.Namespace) -> Setting:
    streams = PREFIX_CONCURRENCY if arguments.prefix else max(arguments.concurrency)
    longest = (
        prefix_tokens(shape) + sum(PREFIX_LOAD)
        if arguments.prefix
        else max(sum(LOADS[shape][concurrency]) for concurrency in arguments.concurrency)
    )
    context = min(-(-(longest + 1) // 64) * 64, spec_of(shape).context)
    return Setting(
        format=format, streams=streams, context=context, prefix_cache=caching, threads=arguments.threads
    )


def measure(
    running: Running, shape: str, number: int, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Figures of each load, after a warm-up."""
    vocab = spec_of(shape).vocab
    if arguments.prefix:
        own, output = PREFIX_LOAD
        system = prompts("system", 1, prefix_tokens(shape), vocab)[0]
        running.ask([system + prompt for prompt in prompts("warm", 1, own, vocab)], 2, 1)
        asked = [system + prompt for prompt in prompts(f"own {number}", PREFIX_REQUESTS, own, vocab)]
        answers = running.ask(asked, output, PREFIX_CONCURRENCY)
        wall_s = max(answer.ended_s for answer in answers) - min(answer.sent_s for answer in answers)
        yield {"concurrency": PREFIX_CONCURRENCY, "wall_s": wall_s, "requests_per_s": len(answers) / wall_s}
        return
    running.ask(prompts("warm", 8, 4, vocab), 3, 8)
    for concurrency in arguments.concurrency:
        prompt, output = LOADS[shape][concurrency]
        output = 8 if arguments.short else output
        asked = prompts(f"{number} {concurrency}", concurrency, prompt, vocab)
        yield {"concurrency": concurrency} | figures(running.ask(asked, output, concurrency))


def prompts(seed: str, count: int, tokens: int, vocab: int) -> list[Prompt]:
    """The same for every side, and different for every load, so that nothing of them is in a cache."""
    chance = random.Random(seed)
    return [tuple(chance.randrange(vocab) for _ in range(tokens)) for _ in range(count)]


if __name__ == "__main__":
    main()
