"""What the router costs, what it saves, and whether anybody notices a kill -9, on this machine.

    python benchmarks/serve_router_cpu.py [--short] [--only PART ...] [--json FILE]

`ttft`: the same request to a replica directly and through the router, by turns over kept connections, so that both meet
the same load; the median of the pairs' differences counts. `tokens`: the router's CPU time for each token that it
passes on. `policies`: on prompts with shared prefixes, more of them than one replica's cache holds, and without any;
interleaved, each replica on its own core; what the replicas' prefix caches found, tokens/s, times to first token.
`simulated`: the same with virtual time. `failover`: three replicas under load, streams and whole answers, greedy and
sampled; the same requests undisturbed and with a kill -9 of one replica in the middle; all answers are compared, and
what happened is drawn. `prefill`: the gaps between the tokens of running streams while long prompts arrive, with two
replicas for everything and with one of them for prompts (`--prefill-replicas`).

A file that holds the figures of other parts keeps them. Replicas are `muster serve` with a small model of random
weights; they share the cores with router and client, so times under load are upper bounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from cells import machine
from router_failover import failover
from router_policies import policies, simulated
from router_prefill import prefill
from router_side import REPLICAS, make_model, serving
from router_ttft import added_ttft, cost_of_tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a tenth of everything, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    scale = 0.1 if arguments.short else 1.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_model(Path(temporary) / "model")
        for name in arguments.only:
            print(f"\n{name}, load {os.getloadavg()[0]:.1f}", flush=True)
            figures = PARTS[name](folder, scale)
            if arguments.json:
                keep(arguments.json, name, figures, short=arguments.short)


def _ttft(folder: Path, scale: float) -> dict[str, Any]:
    with serving(folder, "--port", "0") as (url, _):
        return added_ttft(url, pairs=int(500 * scale))


def _tokens(folder: Path, scale: float) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(serving(folder, "--port", "0"))[0] for _ in range(REPLICAS)]
        return cost_of_tokens(urls, int(600 * scale))


PARTS: dict[str, Callable[[Path, float], dict[str, Any]]] = {
    "ttft": _ttft,
    "tokens": _tokens,
    "policies": lambda folder, scale: policies(
        folder, rounds=4 if scale == 1 else 1, count=int(80 * scale) + 10
    ),
    "simulated": lambda folder, scale: simulated(),
    "failover": lambda folder, scale: failover(folder, int(400 * scale)),
    "prefill": lambda folder, scale: prefill(folder.parent, rounds=5 if scale == 1 else 1),
}


def keep(path: Path, name: str, figures: dict[str, Any], *, short: bool) -> None:
    """Write one part's figures into a file that may hold those of others, each with its machine and date."""
    found = json.loads(path.read_text()) if path.exists() else {}
    about = {
        "machine": machine(),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "short": short,
    }
    found[name] = about | figures
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({part: found[part] for part in PARTS if part in found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
