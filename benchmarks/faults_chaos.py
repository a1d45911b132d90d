"""`muster chaos` on a toy run, and what its table says.

    python benchmarks/faults_chaos.py [--kinds kill,stop,slow,link,disk,flip,poison] [--count 10] [--seed 0]

Two ranks, a checkpoint every 20 steps, a fault every 2 s in the mean; the losses are compared with those of an
undisturbed run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from faults_restart import CORPUS

RUN_FILE = """
name: chaos
model: {{family: llama, layers: 2, width: 64, heads: 4, context: 64}}
data: {{train: [{{files: "*.py"}}], held_out: 5%}}
train: {{tokens: {tokens}, batch_tokens: 512, precision: fp32, schedule: {{kind: constant, warmup: 0}}}}
layout: {{replicate: 2}}
checkpoint: {{every: 20 steps, keep: 3}}
faults: {{hang_after: 2s}}
"""
_STEPS_A_FAULT = 150
"""Enough for the run to last longer than its faults."""


@dataclass(frozen=True, slots=True)
class Drilled:
    injected: int
    kept: int
    """Recovered, and not named wrongly."""
    goodput: str
    longest: str
    error: str
    said: str


def trial(folder: Path, *, kinds: str, count: int, seed: int) -> Drilled:
    for number in range(30):
        (folder / f"{number}.py").write_text(f"# {number}\n" + CORPUS * 9)
    (folder / "run.yaml").write_text(RUN_FILE.format(tokens=count * _STEPS_A_FAULT * 512))
    asked = ["--faults", kinds, "--every", "2s", "--count", str(count), "--seed", str(seed), "--compare"]
    done = subprocess.run(
        [sys.executable, "-m", "muster", "chaos", "run.yaml", *asked],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    row = re.search(r"^all +(\d+) +(\d+) +(\d+) of (\d+) +(\S+ ?s?)", done.stdout, re.MULTILINE)
    if row is None:
        return Drilled(count, 0, "-", "-", done.stderr[-300:], done.stdout)
    injected, recovered, named, nameable = (int(number) for number in row.groups()[:4])
    goodput = re.search(r"^goodput (\S+)", done.stdout, re.MULTILINE)
    error = done.stderr.strip()[-300:] if done.returncode else ""
    kept = min(recovered, injected - (nameable - named)) if "bit for bit" in done.stdout else 0
    return Drilled(injected, kept, goodput[1] if goodput else "-", row[5], error, done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", default="kill,stop,slow,link,disk,flip,poison")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="muster-chaos-") as folder:
        done = trial(Path(folder), kinds=chosen.kinds, count=chosen.count, seed=chosen.seed)
    print(done.said)
    print(done.error)
    sys.exit(done.kept < done.injected or bool(done.error))


if __name__ == "__main__":
    main()
