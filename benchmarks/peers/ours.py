"""This project: `muster serve` over HTTP, and its engine's own loop in one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from muster.serve.engine.packed_bytes import packed_path
from muster.serve.engine.packed_file import open_packed
from muster.serve.engine.process import ENVIRONMENT
from peers.side import Setting, free_port, http_side, worker_side

WORKERS = Path(__file__).parent / "workers"


class Ours:
    """`muster serve`."""

    name = "ours"
    formats = ("bf16", "int8", "int4")
    over_http = True
    prefix_caches = (True,)

    def __init__(self, home: Path) -> None:
        self._logs = home / "logs"

    def install(self) -> None:
        """It is what runs this."""

    def convert(self, model: Path, format: Any) -> Path:
        if format != "bf16" and not packed_path(model, format).exists():
            open_packed(model, format)
        return model

    def start(self, model: Path, setting: Setting) -> Any:
        port = free_port()
        command = [
            sys.executable, "-m", "muster", "serve", str(model), "--dtype", setting.format, "--port", str(port),
            "--streams", str(setting.streams), "--context", str(setting.context),
        ]  # fmt: skip
        return http_side(command, port, self._logs / f"{self.name}.log")


class OurEngine(Ours):
    """What HTTP, text and processes around the engine cost is its ratio to `Ours`."""

    name = "engine"
    over_http = False

    def start(self, model: Path, setting: Setting) -> Any:
        command = [
            sys.executable, str(WORKERS / "run_engine.py"), str(model), setting.format, str(setting.streams),
            str(setting.context),
        ]  # fmt: skip
        return worker_side(command, self._logs / f"{self.name}.log", ENVIRONMENT)


def step_bytes(model: Path, format: Any) -> int:
    """Of weights that every step of ours reads: all but the embedding."""
    if format == "bf16":
        header, total = _header(model / "model.safetensors")
        embed = next(entry for name, entry in header.items() if "embed" in name)
    else:
        header, total = _header(packed_path(model, format))
        embed = header["embed"]
    first, last = embed["data_offsets"]
    return total - int(last - first)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says about its tensors, and how many bytes those have."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header, max(entry["data_offsets"][1] for entry in header.values())
