"""What stands in front of the engine: its cost, and what a crowd, a slow or a rude one, does to everybody else.

    python benchmarks/serve_front_cpu.py [--short] [--only NAME ...] [--json FILE]

A server of a tiny model, so that nearly all that is measured is ours: HTTP, scheduler, sampler, sockets. The clients
run on the same cores and are counted against it. Bars, where there is one, are printed beside the figure. How each
is measured is told by the module that it is in: serve_front_cost.py, serve_front_crowd.py, serve_front_rude.py and
serve_front_soak.py.

overhead     a step of 32 streams through HTTP, beside a pass of the same network alone
idle         memory of 500 streams
overload     up to 5 times as many requests as the server can answer, of a model whose engine is what is busy
slowloris    1,000 connections that send their headers byte by byte, beside good traffic
disconnects  10,000 clients that leave at any moment
soak         mixed traffic, and whether memory grows
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from cells import machine
from serve_front_cost import measure_idle, measure_overhead
from serve_front_crowd import measure_overload
from serve_front_rude import measure_disconnects, measure_slowloris
from serve_front_server import tiny
from serve_front_soak import measure_soak

PARTS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "overhead": measure_overhead,
    "idle": measure_idle,
    "overload": measure_overload,
    "slowloris": measure_slowloris,
    "disconnects": measure_disconnects,
    "soak": measure_soak,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--short", action="store_true", help="a small size of everything, to see that it works"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--json", type=Path, help="also write the figures there, beside those of the other parts"
    )
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as scratch:
        folder = tiny(Path(scratch) / "tiny")
        for name in arguments.only:
            load = os.getloadavg()[0]
            figures = {"load_before": load, **PARTS[name](folder, arguments.short)}
            print(name, json.dumps(_rounded(figures)), flush=True)
            if arguments.json:
                keep(arguments.json, name, figures, short=arguments.short)


def keep(path: Path, name: str, figures: dict[str, Any], *, short: bool) -> None:
    """Write the figures of one part into a file that may hold those of others, each with its machine and date."""
    found = json.loads(path.read_text()) if path.exists() else {}
    about = {"date": str(date.today()), "machine": machine(), "short": short}
    found[name] = about | _rounded(figures)
    path.write_text(json.dumps({part: found[part] for part in PARTS if part in found}, indent=1) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
