"""ONNX Runtime GenAI's generator with static batches, in process: its continuous batching is for GPUs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from peers.environment import environment
from peers.side import Setting, converted, worker_side

PACKAGES = (
    "onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "onnx", "onnx-ir", "transformers==5.23.0",
)  # fmt: skip
WORKER = Path(__file__).parent / "workers" / "run_ort_genai.py"


class OrtGenai:
    """`Generator`, with activations rounded to 8 bits (accuracy level 4); its bf16 is for GPUs."""

    name = "ort-genai"
    formats = ("int8", "int4")
    over_http = False
    prefix_caches = (False,)

    def __init__(self, home: Path) -> None:
        self._home, self._logs = home / self.name, home / "logs"
        self._python = self._home / "bin" / "python"

    def install(self) -> None:
        self._python = environment(self._home, PACKAGES)

    def convert(self, model: Path, format: str) -> Path:
        wanted = model.parent / self.name / format
        if wanted.exists():
            return wanted
        draft = wanted.with_name(f"{format}.partial")
        shutil.rmtree(draft, ignore_errors=True)
        command = [
            str(self._python), "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(draft),
            "-e", "cpu", "-c", str(draft / "cache"), "-p", format,
            "--extra_options", "accuracy_level=4",
        ]  # fmt: skip
        return converted(command, draft, wanted)

    def start(self, model: Path, setting: Setting) -> Any:
        command = [str(self._python), str(WORKER), str(model), str(setting.threads)]
        return worker_side(command, self._logs / f"{self.name}.log", {"PYTHONPATH": ""})
