"""llama.cpp's server, built from the source distribution of llama-cpp-python, which holds llama.cpp whole."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from peers.side import Setting, free_port, http_side

RELEASE = "llama-cpp-python==0.3.36"
TARGETS = ("llama-server", "llama-quantize", "llama-perplexity")
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
"""Its AMX code ends with a segmentation fault, as on others' machines (ggml-org/llama.cpp issue 20824): without it, it
computes with AVX-512."""
OPTIONS = (
    f"-DCMAKE_C_FLAGS={NO_AMX}", f"-DCMAKE_CXX_FLAGS={NO_AMX}",
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF", "-DGGML_CCACHE=OFF",
)  # fmt: skip
QUANTIZED = {"int8": "q8_0", "int4": "q4_0"}
WRITER = Path(__file__).parent / "workers" / "write_gguf.py"


class LlamaCpp:
    """`llama-server`; its int8 is q8_0, its int4 q4_0 (with a head of 6 bits, as its converter makes it)."""

    name = "llama.cpp"
    formats = ("bf16", "int8", "int4")
    over_http = True
    prefix_caches = (True, False)

    def __init__(self, home: Path) -> None:
        self._home, self._logs = home / "llama.cpp", home / "logs"

    @property
    def bin(self) -> Path:
        return self._home / "build" / "bin"

    def install(self) -> None:
        if all((self.bin / target).is_file() for target in TARGETS):
            return
        self._home.mkdir(parents=True, exist_ok=True)
        source = self._source()
        with open(self._home / "build.log", "w") as log:
            configure = ["cmake", "-G", "Ninja", "-S", str(source), "-B", str(self._home / "build"), *OPTIONS]
            subprocess.run(configure, check=True, stdout=log, stderr=log)
            build = ["cmake", "--build", str(self._home / "build"), "--target", *TARGETS]
            subprocess.run(build, check=True, stdout=log, stderr=log)

    def _source(self) -> Path:
        found = sorted(self._home.glob("llama_cpp_python-*/vendor/llama.cpp"))
        if not found:
            download = [
                sys.executable, "-m", "pip", "download", RELEASE, "--no-deps", "--no-binary", "llama-cpp-python",
                "--quiet", "--dest", str(self._home),
            ]  # fmt: skip
            subprocess.run(download, check=True)
            with tarfile.open(next(self._home.glob("*.tar.gz"))) as archive:
                archive.extractall(self._home, filter="data")
            found = sorted(self._home.glob("llama_cpp_python-*/vendor/llama.cpp"))
        return found[0]

    def convert(self, model: Path, format: str) -> Path:
        return self._converted(model, model.parent / self.name, format)

    def divergences(self, model: Path, text: str, context: int, chunks: int) -> dict[str, float]:
        """KL of its formats from fp32, in nats, over the later half of each context, by its own tool."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            (folder / "text").write_text(text)
            exact = folder / "exact"

            def run(file: Path, *more: str) -> str:
                command = [
                    str(self.bin / "llama-perplexity"), "-m", str(file), "-f", str(folder / "text"), "-c",
                    str(context), "-b", str(context), "--chunks", str(chunks), "--kl-divergence-base", str(exact),
                    *more,
                ]  # fmt: skip
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                return done.stdout + done.stderr

            run(self._converted(model, folder, "f32"), "-ctk", "f32", "-ctv", "f32", "-fa", "off")
            found = {}
            for format in self.formats:
                said = run(self._converted(model, folder, format), "--kl-divergence")
                line = next(line for line in said.splitlines() if line.startswith("Mean    KLD"))
                found[QUANTIZED.get(format, format)] = float(line.split(":")[1].split()[0])
            return found

    def _converted(self, model: Path, folder: Path, format: str) -> Path:
        folder.mkdir(exist_ok=True)
        wanted = folder / f"{format}.gguf"
        if wanted.exists():
            return wanted
        draft = wanted.with_suffix(".partial")
        if format in QUANTIZED:
            whole = self._converted(model, folder, "bf16")
            command = [str(self.bin / "llama-quantize"), str(whole), str(draft), QUANTIZED[format]]
            subprocess.run(command, check=True, capture_output=True)
        else:
            own = {"PYTHONPATH": str(self._source() / "gguf-py")}
            command = [sys.executable, str(WRITER), str(model), str(draft), format]
            subprocess.run(command, check=True, env=os.environ | own)
        draft.replace(wanted)
        return wanted

    def start(self, model: Path, setting: Setting) -> Any:
        port, threads = free_port(), str(setting.threads)
        command = [
            str(self.bin / "llama-server"), "-m", str(model), "--host", "127.0.0.1", "--port", str(port),
            "--threads", threads, "--threads-batch", threads, "--parallel", str(setting.streams),
            "--ctx-size", str(setting.streams * setting.context), "--no-webui", "--no-slots",
            # What would only cost it time here: copies of prompts kept beside the slots, and a chain of samplers.
            "--cache-ram", "0", "--samplers", "temperature", "--temp", "0",
            "--cache-prompt" if setting.prefix_cache else "--no-cache-prompt",
        ]  # fmt: skip
        return http_side(command, port, self._logs / f"{self.name}.log")
