"""What low-communication training costs in loss and saves in traffic, on the demo recipe's corpus.

    python benchmarks/diloco_cpu.py [--only WAY ...] [--sync SYNC] [--set KEY=VALUE ...] [--runs FOLDER] [--json FILE]

Two copies of one thread train the same model on the same tokens in each way, one way after the other; the recipe says
the rest. Bytes are those that a rank sends to the other copy in a step, on average, by the formulas that
tests/ranks/test_sync.py holds against the traffic meter. `--sync` adds a way, as `train.sync` would say it; `--set`
changes the recipe for all ways alike. Runs that are there already are not repeated; delete the folder to repeat them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cells

from muster.config.load import load_run
from muster.observe.records import read_jsonl
from muster.train import plan as planning
from muster.train.savings import savings

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "stdlib-tiny.yaml"
SYNCHRONOUS = "synchronous"
WAYS = {
    SYNCHRONOUS: "null",
    "delayed": "{kind: delayed}",
    "local-sgd": "{kind: local_sgd, every: 20}",
    "diloco": "{kind: diloco, every: 20}",
    # A run of 640 steps has 32 rounds, of which the papers' momentum remembers ten.
    "diloco-short": "{kind: diloco, every: 20, outer: {lr: 1.0, momentum: 0.3}}",
    "streaming-int8": "{kind: diloco, every: 20, fragments: 4, overlap: 2, compress: int8, "
    "outer: {lr: 1.0, momentum: 0.3}}",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--sync", action="append", default=[])
    parser.add_argument("--set", nargs="+", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--runs", type=Path, default=ROOT / "build" / "diloco")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    ways = {way: WAYS[way] for way in arguments.only} | {_slug(sync): sync for sync in arguments.sync}
    results = {way: measure(way, sync, arguments.runs, arguments.changes) for way, sync in ways.items()}
    base = results.get(SYNCHRONOUS, {}).get("held_out_loss")
    print(f"{'way':20}{'held-out loss':>14}{'gap':>9}{'bytes a step':>14}{'of synchronous':>16}   train.sync")
    for way, result in results.items():
        result["gap"] = None if base is None else result["held_out_loss"] / base - 1
        gap = "" if base is None else f"{result['gap']:+.2%}"
        print(
            f"{way[:19]:20}{result['held_out_loss']:>14.4f}{gap:>9}{result['bytes_a_step']:>14.0f}"
            f"{'1/' + format(result['factor'], '.3g'):>16}   {ways[way]}"
        )
    if arguments.json:
        made = {"machine": cells.machine(), "date": date.today().isoformat(), "torch": version("torch")}
        arguments.json.write_text(json.dumps(made | {"ways": results}, indent=1) + "\n")


def measure(way: str, sync: str, runs: Path, changes: Sequence[str]) -> dict[str, Any]:
    """Train in one way, unless that was done; its held-out loss, and the bytes of a step."""
    name = "-".join([way, *map(_slug, changes)])
    overrides = [f"name={name}", f"train.sync={sync}", "checkpoint.every=100000 steps", *changes]
    train(name, overrides, runs)
    rows = read_jsonl(runs / name / "metrics.jsonl")
    result = {
        "held_out_loss": [row["held_out_loss"] for row in rows if "held_out_loss" in row][-1],
        "sync": sync,
        "changes": list(changes),
    }
    if way == SYNCHRONOUS:  # whose bytes are in the comparison of any other way
        saved = savings(_plan([*overrides, f"train.sync={WAYS['delayed']}"], runs / name))
        return result | {"bytes_a_step": saved.synchronous_bytes, "factor": 1.0}
    saved = savings(_plan(overrides, runs / name))
    return result | {"bytes_a_step": saved.bytes_a_step, "factor": saved.factor}


def train(name: str, overrides: Sequence[str], runs: Path) -> None:
    events = runs / name / "events.jsonl"
    if events.exists() and any(event["event"] == "finished" for event in read_jsonl(events)):
        return
    runs.mkdir(parents=True, exist_ok=True)
    log = runs / f"{name}.log"
    print(f"training {name} (its lines are in {log})", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "muster", "train", str(RECIPE), "--runs", str(runs), *overrides]
    with log.open("w") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stdout=output, stderr=subprocess.STDOUT, env=environment)


def _plan(overrides: Sequence[str], folder: Path) -> planning.Plan:
    return planning.make(load_run(RECIPE, overrides), base=RECIPE.parent, folder=folder, gpus=0)


def _slug(said: str) -> str:
    return "-".join(re.findall(r"[\w.]+", said))


if __name__ == "__main__":
    main()
