"""The commands themselves, some as processes."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from muster.cli.chat import chat
from muster.cli.serve import serve
from muster.errors import UsageError
from muster.model.folder import load_folder
from muster.serve.codec import TextCodec

MUSTER = [sys.executable, "-m", "muster"]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}


def run(
    environment: dict[str, str], *arguments: object, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    command = [*MUSTER, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, env=environment, timeout=120)


def test_serve_answers_and_stops_cleanly_on_sigterm(folder: Path, environment: dict[str, str]) -> None:
    command = [*MUSTER, "serve", str(folder), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            lines = [process.stdout.readline().decode() for _ in range(4)]
            facts = r"\(\d.*k parameters, bf16, context 96, 3 streams\)"
            ready = re.fullmatch(rf"serving small-run on (http://127\.0\.0\.1:(\d+))  {facts}\n", lines[3])
            assert ready, (lines, process.stderr.read())
            maps = Path(f"/proc/{process.pid}/maps")
            assert not maps.exists() or "libtorch" not in maps.read_text(), (
                "only the engine's process needs it"
            )
            with openai.OpenAI(base_url=f"{ready[1]}/v1", api_key="none", max_retries=0) as client:
                fields: dict[str, Any] = {
                    "model": "small-run",
                    "prompt": "ab",
                    "temperature": 0,
                    "max_tokens": 9,
                }
                assert client.completions.create(**fields).usage is not None
                taken = run(environment, "serve", folder, "--port", ready[2])
                assert taken.returncode == 2
                assert f"port {ready[2]} on 127.0.0.1 is in use" in taken.stderr.decode()
                chatted = run(
                    environment, "chat", ready[1], "--temperature", 0, "--max-tokens", 9, stdin=b"ab\n"
                )
                whole = client.completions.create(**fields).choices[0].text
                assert chatted.stdout.decode() == whole + "\n"
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
            assert process.stderr.read() == b""
        finally:
            process.kill()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(ready[2])), timeout=5)


def test_chat_in_process_answers_each_line_of_a_pipe(folder: Path, environment: dict[str, str]) -> None:
    stdin = "one\n\ntwo é\n".encode() + b"\xff\n"
    done = run(
        environment, "chat", folder, "--temperature", 0, "--max-tokens", 5, "--dtype", "fp32", stdin=stdin
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.decode().count("base model without a chat template") == 1
    assert done.stdout.endswith(b"\n")
    assert len(done.stdout) > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "so whoever asks needs a key"),
        ({"streams": 0}, "--streams 0 should be at least 1"),
        ({"context": 1}, "--context 1 should be at least 2"),
    ],
)
def test_usage_errors_of_serve(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        serve(folder, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 3.0}, "--temperature 3 is outside 0 to 2"),
        ({"max_tokens": 0}, "--max-tokens 0 should be at least 1"),
        ({"system": "Be kind."}, "no chat template, so --system has no place"),
    ],
)
def test_usage_errors_of_chat(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        chat(str(folder), **options)


def test_chat_remembers_the_conversation_and_starts_afresh(
    folder: Path,
    tmp_path: Path,
    reference: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A model with a template: the same line again is answered otherwise, and after /new as at first."""
    model = Path(shutil.copytree(folder / "hf", tmp_path / "model"))
    (model / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nhi\n/new\nhi\n"))
    chat(str(model), system="s", temperature=0, max_tokens=6, dtype="fp32")
    codec = TextCodec.from_folder(model)
    weights = load_folder(model)

    def answer(prompt: str) -> str:
        return codec.decode(reference(weights, codec.encode(prompt), 6))

    first = answer("[s][hi]")
    second = answer(f"[s][hi][{first}][hi]")
    assert capsys.readouterr().out == f"{first}\n{second}\n{first}\n"


def test_chat_with_no_server_says_so(environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    done = run(environment, "chat", f"http://127.0.0.1:{port}", stdin=b"hello\n")
    assert done.returncode == 1
    assert b"Connection refused): start one with muster serve" in done.stderr


@pytest.mark.parametrize("moment_s", [0.0, 0.02, 0.3])
def test_told_to_stop_while_it_starts_it_leaves_nothing(
    folder: Path, environment: dict[str, str], moment_s: float
) -> None:
    with subprocess.Popen([*MUSTER, "serve", str(folder), "--port", "0"], env=environment) as process:
        try:
            while not (family := psutil.Process(process.pid).children()):
                assert process.poll() is None
            time.sleep(moment_s)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
    assert not any(child.is_running() for child in family)


INSIDE_POPEN = """
class Struck(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        print(self.pid, flush=True)
        signal.raise_signal(signal.SIGTERM)
subprocess.Popen = Struck
"""
INSIDE_A_DESTRUCTOR = """
class Dying:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)
import muster.serve.folders
def find_source(*_, **__):
    print(*(child.pid for child in psutil.Process().children()), flush=True)
    Dying()
    time.sleep(60)
muster.serve.folders.find_source = find_source
"""


@pytest.mark.parametrize("struck", [INSIDE_POPEN, INSIDE_A_DESTRUCTOR])
def test_told_to_stop_where_no_exception_would_help(
    folder: Path, environment: dict[str, str], struck: str
) -> None:
    """The signal comes before anybody knows the engine's process, and where Python swallows exceptions."""
    script = f"import signal, subprocess, sys, time, psutil\n{struck}\nfrom muster.cli import main\nmain()"
    command = [sys.executable, "-c", script, "serve", str(folder), "--port", "0"]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=50)
    assert (done.returncode, done.stderr) == (0, b"")
    assert not psutil.pid_exists(int(done.stdout))
