"""Tokens per second of building a token store, beside the tokenizers library encoding the same texts.

    python benchmarks/tokenizing.py [--files GLOB] [--repeats N] [--json FILE]

Ours is the whole way from files to an opened store: listing, checking, hashing, splitting, encoding, framing,
checksums, writing and syncing. The library's is one call over texts that are in memory already. The
ways take turns, so that a neighbour on the machine disturbs all of them alike. (Not called tokenize.py, which would
hide Python's own module of that name from every script in this folder.)
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


def measure(files: str, vocab: int, repeats: int, folder: Path) -> dict[str, object]:
    """Median seconds of each way, and the tokens and bytes that each encodes."""
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
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name, way in ways.items():
            started_s = time.perf_counter()
            way(repeat)
            seconds[name].append(time.perf_counter() - started_s)
    return {
        "documents": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens": corpus.train_tokens,
        "vocab": vocab,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
        "seconds": seconds,
        "median_s": {name: statistics.median(times) for name, times in seconds.items()},
    }


def show(result: dict[str, object]) -> None:
    tokens, size_bytes, medians = result["tokens"], result["bytes"], result["median_s"]
    assert isinstance(tokens, int)
    assert isinstance(size_bytes, int)
    assert isinstance(medians, dict)
    ours_s = next(iter(medians.values()))
    size = f"{size_bytes / 1e6:.1f} MB, {tokens / 1e6:.2f}M tokens"
    print(f"{result['documents']} documents, {size}, {result['cores']} cores")
    print(f"{'':32}{'median s':>10}{'M tokens/s':>12}{'MB/s':>8}{'muster / this':>15}")
    for name, median_s in medians.items():
        rates = f"{tokens / median_s / 1e6:>12.3f}{size_bytes / median_s / 1e6:>8.2f}"
        print(f"{name:32}{median_s:>10.2f}{rates}{median_s / ours_s:>15.3f}")


if __name__ == "__main__":
    main()
