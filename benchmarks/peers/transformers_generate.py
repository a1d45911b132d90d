"""transformers' `generate` on static batches, in process, in our own environment."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from peers.side import Setting, worker_side

WORKER = Path(__file__).parent / "workers" / "run_transformers.py"


class Transformers:
    """The reference that everybody has; its 8- and 4-bit formats are for GPUs."""

    name = "transformers"
    formats = ("bf16",)
    over_http = False
    prefix_caches = (False,)

    def __init__(self, home: Path) -> None:
        self._logs = home / "logs"

    def install(self) -> None:
        """It is among what this project's tests need."""

    def convert(self, model: Path, format: str) -> Path:
        return model

    def start(self, model: Path, setting: Setting) -> Any:
        command = [sys.executable, str(WORKER), str(model), str(setting.threads)]
        return worker_side(command, self._logs / f"{self.name}.log")
