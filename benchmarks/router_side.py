"""What the router's benchmarks share: a small model, servers as processes, pinned to a core where asked, and load."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from muster.data.tokenizer import Tokenizer
from muster.model.folder import save_folder
from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer
from muster.serve.load.client import Server
from muster.serve.load.drive import closed_loop
from muster.serve.load.figures import Objective, summarize
from muster.serve.load.workload import Workload, requests

CONTEXT, STREAMS = 1024, 4
REPLICAS = 3


def make_model(folder: Path, layers: int = 4, width: int = 128) -> Path:
    """A small Llama with random weights, wide enough that different prompts continue differently."""
    tokenizer = Tokenizer.byte()
    spec = TransformerSpec(
        family="llama", layers=layers, width=width, heads=width // 32, kv_heads=2, head_dim=32, ffn=3 * width,
        vocab=tokenizer.vocab, context=CONTEXT, tied=False,
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


def pin(process: psutil.Process, core: int) -> None:
    """Keep a process, what it has started and all their threads on one core."""
    for one in (process, *process.children(recursive=True)):
        for thread in one.threads():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread.id, {core})


def core_of(number: int) -> int:
    """Each replica's share: the cores in turn."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[number % len(cores)]


def load(url: str, workload: Workload, concurrency: int) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        server = Server(url)
        model = await server.model()
        sent = list(requests(workload))
        random.Random(workload.seed).shuffle(sent)  # groups in turn would be the worst that a cache can meet
        outcomes = await closed_loop(server, model, sent, concurrency=concurrency, tell=lambda outcome: None)
        return summarize(outcomes, Objective())

    return asyncio.run(run())
