"""What the parts of `serve_front_cpu.py` share: a server of a small model as a process, and cheap clients."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from muster.data.tokenizer import Tokenizer
from muster.model.folder import save_folder
from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer
from muster.serve.load.client import Outcome

CONTEXT = 2048


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


def percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{one}": float(np.percentile(values, one)) for one in (50, 99)} if values else {}


def ignore(_: Outcome) -> None:
    pass
