"""Runs the commands in README.md's console blocks and pastes what they really print (`make readme`).

A block is a shell session: a line that starts with `$ ` is run, the lines below it are its output. The blocks
run in order in one scratch folder; a command that ends with ` &` stays up until the end. The test suite runs
the same sessions and checks that every command still succeeds and prints lines of the same kind.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
_BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
_READY_S = 60.0


@dataclass(frozen=True)
class Command:
    text: str
    output: str
    """What it printed when the README was last written."""


def sessions(markdown: str) -> list[list[Command]]:
    """The console blocks of a document."""
    found = []
    for block in _BLOCK.findall(markdown):
        parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
        found.append([Command(*_split(part)) for part in parts])
    return found


def run(command: Command, folder: Path, stack: ExitStack) -> tuple[int, str]:
    """Exit code and output of a command, run by a shell in `folder` with `muster` on its path."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": "100",
    }
    if command.text.endswith(" &"):
        return 0, stack.enter_context(_background(command.text[:-2], folder, environment))
    done = subprocess.run(
        ["sh", "-c", command.text], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


@contextmanager
def _background(text: str, folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """A server while the block runs; yields what it prints until it is ready."""
    process = subprocess.Popen(
        ["sh", "-c", f"exec {text}"], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        printed, deadline = "", time.monotonic() + _READY_S
        for line in process.stdout:
            printed += line
            if "http://" in line or time.monotonic() > deadline:
                break
        yield printed
    finally:
        process.terminate()
        process.wait(timeout=30)


def shape(output: str) -> list[str]:
    """The first word of every line: what stays the same from run to run."""
    return [re.sub(r"[\d.]+", "N", line.split()[0]) for line in output.splitlines() if line.strip()]


def _split(part: str) -> tuple[str, str]:
    text, _, output = part.partition("\n")
    return text, output


def main() -> None:
    markdown = README.read_text()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        fresh = []
        for session in sessions(markdown):
            lines = ""
            for command in session:
                print(f"$ {command.text}", flush=True)
                code, output = run(command, Path(scratch), stack)
                if code != 0:
                    sys.exit(f"exit code {code}:\n{output}")
                lines += f"$ {command.text}\n{output.rstrip()}\n" if output.strip() else f"$ {command.text}\n"
            fresh.append(lines)
    replacements = iter(fresh)
    README.write_text(_BLOCK.sub(lambda _: f"```console\n{next(replacements)}```", markdown))


if __name__ == "__main__":
    main()
