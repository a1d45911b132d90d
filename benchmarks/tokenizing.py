"""Tokens per second of building a token store, beside the tokenizers library encoding the same texts.

    python benchmarks/tokenizing.py [--files GLOB] [--repeats N] [--json FILE]

Ours is the whole way from files to an opened store: listing, checking, hashing, splitting, encoding, framing,
checksums, writing and syncing. The library's is one call over texts that are in memory already. The
ways take turns, so that a neighbour on the machine disturbs all of them alike, and processor time, which a
neighbour disturbs little, is shown as well. (Not called tokenize.py, which would hide Python's own module
of that name from every script in this folder.)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers

from muster.config.schema import Data, Source, TrainTokenizer
from muster.data.dataset import prepare
from muster.data.sources import list_files

_EXCLUDE = ["**/test/**", "**/tests/**", "**/idlelib/**"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", default="stdlib:**/*.py", help="corpus (default: the standard library)")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments.files, arguments.vocab, arguments.repeats, Path(folder))
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(files: str, vocab: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Seconds of each way, and the tokens and bytes that each encodes."""
    base = Path.cwd()
    source = Source(files=files, exclude=_EXCLUDE)
    training = Data(train=[source], held_out=0, tokenizer=TrainTokenizer(train="bpe", vocab=vocab))
    corpus = prepare(training, base, folder / "cache", tokenizer_folder=folder / "tokenizer")
    texts = [file.path.read_bytes().decode() for file in list_files(source, base)]
    section = Data(train=[source], held_out=0, tokenizer=str(folder / "tokenizer"))
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))

    def ours(repeat: int) -> None:
        prepare(section, base, folder / f"cache-{repeat}")

    ways: dict[str, Callable[[int], object]] = {
        "muster: files to store": ours,
        "tokenizers: encode_batch": lambda _: library.encode_batch(texts, add_special_tokens=False),
        "tokenizers: encode_batch_fast": lambda _: library.encode_batch_fast(texts, add_special_tokens=False),
    }
    wall_s: dict[str, list[float]] = {name: [] for name in ways}
    cpu_s: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name, way in ways.items():
            started_s, started_cpu_s = time.perf_counter(), time.process_time()
            way(repeat)
            wall_s[name].append(time.perf_counter() - started_s)
            cpu_s[name].append(time.process_time() - started_cpu_s)
    return {
        "documents": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens": corpus.train_tokens,
        "vocab": vocab,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "median_wall_s": {name: statistics.median(times) for name, times in wall_s.items()},
        "median_cpu_s": {name: statistics.median(times) for name, times in cpu_s.items()},
    }


def show(result: dict[str, Any]) -> None:
    tokens, size_bytes = result["tokens"], result["bytes"]
    wall_s, cpu_s = result["median_wall_s"], result["median_cpu_s"]
    ours = next(iter(wall_s))
    size = f"{size_bytes / 1e6:.1f} MB, {tokens / 1e6:.2f}M tokens"
    print(f"{result['documents']} documents, {size}, {result['cores']} cores; medians")
    print(f"{'':32}{'wall s':>8}{'cpu s':>8}{'M tokens/s':>12}{'MB/s':>8}  muster's speed: wall   cpu")
    for name in wall_s:
        rates = f"{tokens / wall_s[name] / 1e6:>12.3f}{size_bytes / wall_s[name] / 1e6:>8.2f}"
        ratios = f"{wall_s[name] / wall_s[ours]:>22.3f}{cpu_s[name] / cpu_s[ours]:>6.3f}"
        print(f"{name:32}{wall_s[name]:>8.2f}{cpu_s[name]:>8.2f}{rates}{ratios}")


if __name__ == "__main__":
    main()
