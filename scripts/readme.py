"""Keeps README.md true: runs its console blocks and pastes what they really print (`make readme`).

A block is a shell session: a line that starts with `$ ` is run, the lines below it are its output. The blocks
run in order in one scratch folder; a command that ends with ` &` stays up until the end. The test suite runs
the same sessions and checks that every command still succeeds and prints lines of the same kind.
Between its markers it pastes the last `make demo | tee build/demo.log` and the last benchmarks (benchmarks/results/).
"""

from __future__ import annotations

import json
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
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BENCH = ROOT / "benchmarks" / "results" / "train_cpu.json"
ATTENTION = ROOT / "benchmarks" / "results" / "attention_cpu.json"
PEERS = ROOT / "benchmarks" / "results" / "deepspeed_cpu.json"
FAULTS = ROOT / "benchmarks" / "results" / "faults.json"
SERVE = (
    ROOT / "benchmarks" / "results" / "serve_cpu.json",
    ROOT / "benchmarks" / "results" / "serve_cpu_amx.json",
)
DEMO = ROOT / "build" / "demo.log"
BUBBLE = ROOT / "benchmarks" / "results" / "pipeline_bubble.json"
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
    with subprocess.Popen(
        ["sh", "-c", f"exec {text}"], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE
    ) as process:
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


def shape(output: str) -> list[str]:
    """The first word of every line: what stays the same from run to run."""
    return [re.sub(r"[\d.]+", "N", line.split()[0]) for line in output.splitlines() if line.strip()]


def _split(part: str) -> tuple[str, str]:
    text, _, output = part.partition("\n")
    return text, output


def main() -> None:
    if not DEMO.exists():
        sys.exit(f"{DEMO} is not there: make it with `make demo | tee {DEMO.relative_to(ROOT)}`")
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
    markdown = _BLOCK.sub(lambda _: f"```console\n{next(replacements)}```", markdown)
    markdown = paste(markdown, "demo", demo_excerpt(DEMO.read_text()))
    markdown = paste(markdown, "bench", bench_table(json.loads(BENCH.read_text())))
    markdown = paste(markdown, "attention", attention_table(json.loads(ATTENTION.read_text())))
    markdown = paste(markdown, "peers", peers_table(json.loads(PEERS.read_text())))
    markdown = paste(markdown, "faults", faults_table(json.loads(FAULTS.read_text())))
    markdown = paste(
        markdown, "serve", "\n".join(serve_table(json.loads(path.read_text())) for path in SERVE)
    )
    markdown = paste(markdown, "bubble", bubble_table(json.loads(BUBBLE.read_text())))
    README.write_text(markdown)


def paste(markdown: str, name: str, text: str) -> str:
    """Replace what stands between a pair of markers."""
    before, start, rest = markdown.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not start or not end:
        sys.exit(f"README.md has no markers for {name}")
    return before + start + text + end + after


def demo_excerpt(log: str) -> str:
    """The demo's own words, but for the progress lines in the middle of the training."""
    lines = log.replace(str(ROOT) + "/", "").splitlines()
    steps = [number for number, line in enumerate(lines) if re.match(r"step +\d+/\d+  loss", line)]
    resumed = next(number for number, line in enumerate(lines) if line.startswith("resumed"))
    first, last = steps[:1], steps[-1:]
    middle = [number for number in range(len(lines)) if first[0] < number < resumed and lines[number].strip()]
    killed = [number for number in middle if "killed" in lines[number]]
    shown = [lines[number].lstrip() for number in (*first, *killed, resumed, *last)]
    return "```text\n" + "\n".join([*shown, *lines[last[0] + 1 :]]).rstrip() + "\n```\n"


def bench_table(result: dict[str, Any]) -> str:
    """The benchmark's cells as Markdown."""
    rows = [
        "| model | precision | processes x threads | muster tokens/s | transformers | ratio | of GEMM peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in result["cells"]:
        rates = f"{cell['muster_tokens_per_s']:.0f} | {cell['transformers_tokens_per_s']:.0f}"
        rows.append(
            f"| {cell['size']} | {cell['precision']} | {cell['place']} | {rates} "
            f"| **{cell['ratio']:.2f}** | {cell['mfu']:.0%} |"
        )
    rows.append(f"\nGeometric mean {result['geometric_mean']:.2f}. {result['machine']}, {result['date']}.")
    return "\n".join(rows) + "\n"


def peers_table(result: dict[str, Any]) -> str:
    """Ratios of speed and of peak memory to the peers of parallel training."""
    rows = [
        "| technique | model | beside | muster tokens/s | theirs | ratio | peak memory, ours to theirs |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in result["cells"]:
        rates = f"{cell['muster_tokens_per_s']:.0f} | {cell['peer_tokens_per_s']:.0f}"
        rows.append(
            f"| {cell['name']} | {cell['size']} | {cell['peer'].split()[0]} | {rates} | **{cell['ratio']:.2f}** "
            f"| {cell['rss_ratio']:.2f} |"
        )
    rows.append(f"\n{result['machine']}, {result['date']}; {', '.join(result['packages'])}.")
    return "\n".join(rows) + "\n"


def faults_table(result: dict[str, Any]) -> str:
    """The promises about faults, and how often each was kept."""
    rows = ["| promise | kept | |", "|---|---|---|"]
    parts = result.values()
    rows += [
        f"| {row['promise']} | {row['kept']} of {row['trials']} | {row['said']} |"
        for part in parts
        for row in part["rows"]
    ]
    rows.append("\n" + "; ".join(sorted({f"{part['machine']}, {part['date']}" for part in parts})) + ".")
    return "\n".join(rows) + "\n"


def serve_table(result: dict[str, Any]) -> str:
    """Decoding beside the peers: the best of the rounds, ours and that of the best peer."""
    loads = result["setup"]["concurrency"]
    rows = [
        "| model | weights | " + " | ".join(f"{load} at a time" for load in loads) + " |",
        "|---" * (len(loads) + 2) + "|",
    ]
    best: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in result["rows"]:
        sides = best.setdefault((row["shape"], row["format"], row["concurrency"]), {})
        sides[row["side"]] = max(row["decode_tokens_per_s"], sides.get(row["side"], 0.0))
    for shape, format in dict.fromkeys(key[:2] for key in best):
        cells = []
        for load in loads:
            sides = best[shape, format, load]
            ours = sides["ours"]
            peer = max(
                (side for side in sides if side not in ("ours", "engine")), key=lambda side: sides[side]
            )
            cells.append(f"{ours:.0f} beside {sides[peer]:.0f} ({peer}): **{ours / sides[peer]:.2f}**")
        rows.append(f"| {shape} | {format} | " + " | ".join(cells) + " |")
    rows.append(f"\n{result['machine']}, {result['date']}.")
    return "\n".join(rows) + "\n"


def bubble_table(result: dict[str, Any]) -> str:
    """The share of time in which pipeline ranks wait: recorded, and simulated from the means of the operations."""
    schedules = result["schedules"]
    return "\n".join(
        [
            "| schedule | " + " | ".join(row["schedule"] for row in schedules) + " |",
            "|---" * (len(schedules) + 1) + "|",
            "| recorded | " + " | ".join(f"{row['recorded']:.1%}" for row in schedules) + " |",
            "| simulated | " + " | ".join(f"{row['simulated']:.1%}" for row in schedules) + " |",
            f"\n{result['machine']}, {result['date']}.\n",
        ]
    )


def attention_table(result: dict[str, Any]) -> str:
    """How many times as fast as torch's kernel the blocked attention is, by sequence length."""
    lengths = sorted({row["length_tokens"] for row in result["rows"]})
    ratios = {(row["precision"], row["length_tokens"]): row["ratio"] for row in result["rows"]}
    rows = [
        "| tokens | " + " | ".join(f"{length}" for length in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for precision in ("bf16", "fp32"):
        cells = " | ".join(f"{ratios[precision, length]:.1f}x" for length in lengths)
        rows.append(f"| {precision} | {cells} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
