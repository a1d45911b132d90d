"""`muster serve` as a process of its own, and what it has started."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
import pytest

Start = Callable[..., AbstractContextManager["Running"]]


@dataclass(frozen=True)
class Running:
    """A server's process, and all that it has started."""

    process: subprocess.Popen[bytes]
    url: str
    said: list[str]

    def ranks(self) -> dict[str, psutil.Process]:
        """The ranks beside the first one, by the name they have given themselves."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return {child.name(): child for child in children if child.name().startswith("rank-")}


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """`with start(folder, "--tensor", 2) as running`; at the end none of its processes is left."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()

    @contextlib.contextmanager
    def serve(folder: Path, *options: object) -> Iterator[Running]:
        command = [sys.executable, "-m", "muster", "serve", str(folder), "--port", "0", *map(str, options)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        ) as process:
            family: list[psutil.Process] = []
            try:
                assert process.stdout is not None
                assert process.stderr is not None
                said: list[str] = []
                while not said or not said[-1].startswith("serving"):
                    said.append(process.stdout.readline().decode())
                    assert said[-1], process.stderr.read().decode()
                url = re.search(r"http://\S+", said[-1])
                assert url
                family = psutil.Process(process.pid).children(recursive=True)
                yield Running(process, url[0], said)
            finally:
                process.kill()
                _, alive = psutil.wait_procs(family, timeout=20)
                assert not alive

    return serve


@contextlib.contextmanager
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made
