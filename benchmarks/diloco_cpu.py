"""What low-communication training costs in loss and saves in traffic, on the demo recipe's corpus.

    python benchmarks/diloco_cpu.py [--tokens N] [--only WAY ...] [--runs FOLDER] [--json FILE]

Two copies of one thread train the same model on the same tokens in each way, one way after the other; the recipe says
the rest. Bytes are those that a rank sends to the other copy in a step, on average, by the formulas that
tests/ranks/test_sync.py holds against the traffic meter. Runs that are there already are not repeated; deleting
the folder repeats them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "stdlib-tiny.yaml"
WAYS = {
    "synchronous": "null",
    "diloco": "{kind: diloco, every: 20}",
    "streaming-int8": "{kind: diloco, every: 20, fragments: 4, overlap: 2, compress: int8}",
    "local-sgd": "{kind: local_sgd, every: 20}",
    "delayed": "{kind: delayed}",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", help="instead of the recipe's, as it would say it")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--sync", help="one more way, as `train.sync` would say it")
    parser.add_argument("--runs", type=Path, default=ROOT / "build" / "diloco")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    ways = {way: WAYS[way] for way in arguments.only}
    if arguments.sync:
        ways["-".join(re.findall(r"[\w.]+", arguments.sync))] = arguments.sync
    results = {way: measure(way, sync, arguments.runs, arguments.tokens) for way, sync in ways.items()}
    base = results.get("synchronous", {}).get("held_out_loss")
    print(f"{'way':28}{'held-out loss':>14}{'gap':>8}{'bytes a step':>14}{'of synchronous':>16}   train.sync")
    for way, result in results.items():
        gap = "" if base is None else f"{result['held_out_loss'] / base - 1:+.2%}"
        print(
            f"{way:28}{result['held_out_loss']:>14.4f}{gap:>8}{result['bytes_a_step']:>14.0f}"
            f"{'1/' + format(result['factor'], '.3g'):>16}   {ways[way]}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def measure(way: str, sync: str, runs: Path, tokens: str | None) -> dict[str, Any]:
    """Train in one way, unless that was done; its held-out loss, and the bytes of a step."""
    from muster.config.load import load_run
    from muster.observe.records import read_jsonl
    from muster.train import plan as planning
    from muster.train.savings import savings

    name = way if tokens is None else f"{way}-{tokens}"
    changes = [f"name={name}", f"train.sync={sync}", "checkpoint.every=1000s"]
    changes += [] if tokens is None else [f"train.tokens={tokens}"]
    command = [sys.executable, "-m", "muster", "train", str(RECIPE), "--runs", str(runs), *changes]
    log = runs / f"{name}.log"
    if not (runs / name).exists() or "finished" not in (runs / name / "events.jsonl").read_text():
        runs.mkdir(parents=True, exist_ok=True)
        print(f"training {name} (its lines are in {log})", file=sys.stderr, flush=True)
        with log.open("w") as output:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, stdout=output, stderr=subprocess.STDOUT, env=environment)
    losses = [
        row["held_out_loss"] for row in read_jsonl(runs / name / "metrics.jsonl") if "held_out_loss" in row
    ]
    run = load_run(RECIPE, changes)
    training = planning.make(run, base=RECIPE.parent, folder=runs / name, gpus=0)
    if run.train.sync is None:
        like = load_run(RECIPE, [*changes, "train.sync={kind: delayed}"])
        saved = savings(planning.make(like, base=RECIPE.parent, folder=runs / name, gpus=0))
        return {"held_out_loss": losses[-1], "bytes_a_step": saved.synchronous_bytes, "factor": 1.0}
    saved = savings(training)
    return {
        "held_out_loss": losses[-1],
        "bytes_a_step": saved.exchange_bytes / saved.every,
        "factor": saved.factor,
        "sync": run.to_dict()["train"]["sync"],
    }


if __name__ == "__main__":
    main()
