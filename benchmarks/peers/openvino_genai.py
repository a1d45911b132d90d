"""OpenVINO GenAI's continuous batching, in process: its wheel has no server. Converted by optimum-intel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers.environment import environment
from peers.side import Setting, converted, worker_side

PACKAGES = ("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0")
WEIGHTS = {"bf16": "fp16", "int8": "int8", "int4": "int4"}
"""What its exporter calls them; on CPUs with bf16, 16-bit weights are computed with in bf16."""
WORKER = Path(__file__).parent / "workers" / "run_openvino.py"
LOGITS = WORKER.with_name("logits_openvino.py")


class OpenVino:
    """`ContinuousBatchingPipeline` with the exporter's own choice of groups, and 8-bit keys and values by default."""

    name = "openvino"
    formats = ("bf16", "int8", "int4")
    over_http = False
    prefix_caches = (True, False)

    def __init__(self, home: Path) -> None:
        self._home, self._logs = home / self.name, home / "logs"
        self._python = self._home / "bin" / "python"

    def install(self) -> None:
        # The index's torchvision is for another build of torch, and transformers fails on it.
        self._python = environment(self._home, PACKAGES, without=["torchvision"])

    def convert(self, model: Path, format: str) -> Path:
        return self._converted(model, model.parent / self.name / format, format)

    def logits(self, model: Path, format: str, chunks: NDArray[np.int64]) -> NDArray[np.float32]:
        """(B, T, V) of a converted model for token ids (B, T)."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = self._converted(model, Path(scratch) / "model", format)
            ids, out = Path(scratch) / "ids.npy", Path(scratch) / "logits.npy"
            np.save(ids, chunks)
            command = [str(self._python), str(LOGITS), str(folder), str(ids), str(out)]
            subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": ""})
            found: NDArray[np.float32] = np.load(out)
            return found

    def _converted(self, model: Path, wanted: Path, format: str) -> Path:
        if wanted.exists():
            return wanted
        draft = wanted.with_name(f"{format}.partial")
        shutil.rmtree(draft, ignore_errors=True)
        command = [
            str(self._python), "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", str(model),
            "--task", "text-generation-with-past", "--weight-format", WEIGHTS[format], str(draft),
        ]  # fmt: skip
        config = json.loads((model / "config.json").read_text())
        if format == "int4" and (config["hidden_size"] % 128 or config["intermediate_size"] % 128):
            command += ["--group-size", "64"]  # its own choice, 128, has to divide them
        return converted(command, draft, wanted)

    def start(self, model: Path, setting: Setting) -> Any:
        command = [
            str(self._python), str(WORKER), str(model), str(setting.streams), str(int(setting.prefix_cache)),
            str(setting.threads),
        ]  # fmt: skip
        return worker_side(command, self._logs / f"{self.name}.log", {"PYTHONPATH": ""})
