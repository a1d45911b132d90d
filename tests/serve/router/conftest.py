"""A router as a process with three replicas of the tiny model, and what it takes to talk to it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest


@dataclass(frozen=True)
class Routed:
    """A router's process, its address and what it has said."""

    url: str
    process: subprocess.Popen[str]
    said: list[str]

    def replicas(self) -> dict[str, psutil.Process]:
        """Its replicas' processes, by the address where each listens."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            for connection in child.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found[f"http://127.0.0.1:{connection.laddr.port}"] = child
        return found

    def figure(self, name: str) -> list[float]:
        """Values of one of its metrics."""
        text = httpx.get(f"{self.url}/metrics").text
        return [float(value) for value in re.findall(rf"^muster_router_{name}(?:{{.*}})? (\S+)$", text, re.M)]

    def wait(self, condition: Callable[[], bool]) -> None:
        until_s = time.monotonic() + 90
        while not condition():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < until_s, self.said
            time.sleep(0.1)

    def wait_ready(self, replicas: int) -> None:
        self.wait(lambda: sum(self.figure("replica_ready")) == replicas)


@contextlib.contextmanager
def _routing(*arguments: object) -> Iterator[Routed]:
    command = [sys.executable, "-m", "muster", "serve", *map(str, arguments), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    said: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            url = None
            for line in process.stdout:
                said.append(line)
                if found := re.match(r"serving \d+ replicas on (\S+)", line):
                    url = found[1]
                    break
            assert url is not None, said
            reader = threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True)
            reader.start()
            yield Routed(url, process, said)
            family = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, said
            reader.join()
            assert not [one for one in family if one.is_running()]
        finally:
            process.kill()


@pytest.fixture(scope="session")
def routing() -> Callable[..., AbstractContextManager[Routed]]:
    """`with routing(FOLDER, "--replicas", 3) as routed`: a router's process, ended with SIGTERM."""
    return _routing


@pytest.fixture(scope="module")
def routed(folder: Path) -> Iterator[Routed]:
    """One with three replicas, for all tests that leave it with three."""
    with _routing(folder, "--replicas", 3, "--dtype", "fp32", "--streams", 4) as running:
        running.wait_ready(3)
        yield running
