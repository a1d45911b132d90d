"""What the GPU benchmarks share: each side in a process of its own, whose failure is a row of the table."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def parse(description: str | None) -> argparse.Namespace:
    """What all of them are told."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--tiny", action="store_true", help="a toy shape, two sides: does it run")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    return parser.parse_args()


def start(script: str, side: str, name: str) -> list[dict[str, Any]]:
    """The rows that one side prints, in a process of its own, or why there are none."""
    command = [sys.executable, script, "--side", side, "--name", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return [{"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}]
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def write(path: Path | None, rows: list[dict[str, Any]], **facts: Any) -> None:
    """The rows, and on what they were measured."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        result = {"device": device_name(), "torch": torch.__version__, **facts, "rows": rows}
        path.write_text(json.dumps(result, indent=1) + "\n")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
