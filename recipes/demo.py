"""From text to an endpoint on this machine: what `make demo` runs. Every step is a `muster` command, shown as it runs.

Safe to run again: it says what it reuses, and resumes what was cut short. Fails if the model
did not learn more about the held-out files than `gzip -9` knows.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "build" / "demo"
RECIPE = ROOT / "recipes" / "stdlib-tiny.yaml"
RUN = RUNS / "stdlib-tiny"
MUSTER = [sys.executable, "-m", "muster"]
PROMPT = 'def read_lines(path):\n    """Return the lines of a file."""\n'


def main() -> None:
    started = time.monotonic()
    trained_already = newest_step() is not None and state() == "finished"
    if trained_already:
        say(f"1. {RUN} is trained already: nothing to do (delete it to start over)")
    else:
        train_with_an_interruption()
    say("2. How good is it? Bits per byte on files that it never saw, beside gzip -9 on the same files")
    figures = json.loads(muster("eval", RUN, "--json", capture=True))
    squeezed, held_out_bytes = gzip_bits_per_byte()
    learnt = figures["bits_per_byte"]
    print(f"   {figures['bytes']} bytes held out: model {learnt:.3f}, gzip -9 {squeezed:.3f} bits per byte")
    if held_out_bytes != figures["bytes"]:
        sys.exit(
            f"demo: gzip saw {held_out_bytes} bytes, but the model {figures['bytes']}: the comparison is not fair"
        )
    if not learnt < squeezed:
        sys.exit("demo: the model is not better than gzip: it has learnt nothing worth serving")
    say("3. Export to a Hugging Face folder, compared with what transformers computes from it")
    muster("export", RUN)
    say("4. Serve it on loopback and stream one completion over HTTP")
    with served() as url:
        print(f"   POST {url}/v1/completions\n")
        print(PROMPT, end="")
        count, begun = 0, time.monotonic()
        for piece in stream_completion(url):
            print(piece, end="", flush=True)
            count += 1
        print(f"\n\n   {count} pieces in {time.monotonic() - begun:.1f} s")
    summary(figures, squeezed, time.monotonic() - started)


def train_with_an_interruption() -> None:
    """Train; the first time, stop the whole job with SIGKILL after the first checkpoint and resume from it."""
    if newest_step() is None:
        say("1. Train on this Python's standard library; killed once (kill -9) to show that it resumes")
        command = [*MUSTER, "train", str(RECIPE), "--runs", str(RUNS)]
        show(command)
        job = subprocess.Popen(command)
        try:
            while newest_step() is None and job.poll() is None:
                time.sleep(0.2)
        finally:
            job.kill()
            job.wait()
        if newest_step() is None:
            sys.exit("demo: training ended before its first checkpoint; its own message is above")
        print(f"\n   killed; the newest checkpoint is of step {newest_step()}")
    else:
        say(f"1. Resume the training that stopped after step {newest_step()}")
    muster("train", RECIPE, "--runs", RUNS)


def newest_step() -> int | None:
    folders = (RUN / "checkpoints").glob("step-*/manifest.json")
    return max(
        (int(re.sub(r"\D", "", path.parent.name)) for path in folders if path.parent.suffix != ".partial"),
        default=None,
    )


def state() -> str:
    listed = json.loads(muster("runs", "--runs", RUNS, "--json", capture=True, quiet=True))
    return next((str(run["state"]) for run in listed if run["name"] == RUN.name), "none")


def gzip_bits_per_byte() -> tuple[float, int]:
    """The held-out documents, each compressed by gzip -9; and their size."""
    from muster.config.load import load_run
    from muster.data.dataset import prepare

    corpus = prepare(load_run(RECIPE).data, RECIPE.parent, RUNS / "cache")
    texts = [document.text.encode() for document in corpus.held_out_texts()]
    size = sum(len(text) for text in texts)
    return 8 * sum(len(gzip.compress(text, 9)) for text in texts) / size, size


@contextmanager
def served() -> Iterator[str]:
    """`muster serve` on a free port while the block runs; its address."""
    command = [*MUSTER, "serve", str(RUN), "--port", "0"]
    show(command)
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        for row in server.stdout:
            print(f"   {row}", end="")
            if found := re.search(r"http://\S+", row):
                yield found[0]
                break
        else:
            sys.exit("demo: the server did not start; its own message is above")
    finally:
        server.terminate()
        server.wait(timeout=30)


def stream_completion(url: str) -> Iterator[str]:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
        model = json.load(answer)["data"][0]["id"]
    body = {"model": model, "prompt": PROMPT, "max_tokens": 80, "temperature": 0.3, "seed": 1, "stream": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        for row in answer:
            data = row.decode().removeprefix("data: ").strip()
            if data and data != "[DONE]":
                yield json.loads(data)["choices"][0]["text"]


def summary(figures: dict[str, float], squeezed: float, seconds: float) -> None:
    here = Path(os.path.relpath(RUN))
    say(f"Done in {seconds / 60:.1f} minutes")
    print(f"   run      {here}  (checkpoints, events.jsonl, metrics.jsonl)")
    print(f"   model    {here / 'hf'}  (loads in transformers)")
    print(
        f"   quality  {figures['bits_per_byte']:.3f} bits per byte on held-out files; gzip -9 needs {squeezed:.3f}"
    )
    print("   next     " + f"{relative(MUSTER)} chat {here}")
    print("            " + f"{relative(MUSTER)} serve {here}")
    print("            " + f"{relative(MUSTER)} init mine && {relative(MUSTER)} train mine.yaml")


def muster(*arguments: object, capture: bool = False, quiet: bool = False) -> str:
    command = [*MUSTER, *map(str, arguments)]
    if not quiet:
        show(command)
    done = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"demo: the command above failed with exit code {done.returncode}")
    return done.stdout or ""


def show(command: list[str]) -> None:
    print(
        f"   $ {' '.join(['muster', *(os.path.relpath(part) if os.sep in part else part for part in command[3:])])}",
        flush=True,
    )


def relative(command: list[str]) -> str:
    return os.path.relpath(Path(command[0]).parent / "muster")


def say(sentence: str) -> None:
    print(f"\n== {sentence}", flush=True)


if __name__ == "__main__":
    main()
