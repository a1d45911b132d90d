"""What a step of 32 streams costs beside its network, and what 500 streams keep in memory."""

from __future__ import annotations

import socket
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from serve_front_server import body, post, read_all, serving

from muster.model.folder import load_folder
from muster.serve.engine.network import TransformerNetwork
from muster.serve.engine.runner import make_batch
from muster.serve.engine.scheduler import Work
from muster.serve.engine.sequence import Sequence as Scheduled

STEP_BAR_MS, IDLE_BAR_MB = 0.5, 100


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
