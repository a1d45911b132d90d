"""The tokenizer that a run file asks for: bytes, a file, or one trained once on a sample of the documents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from muster.config.schema import TrainTokenizer
from muster.data.cache import Cache
from muster.data.catalogue import Entry
from muster.data.parts import Part, name_hash
from muster.data.progress import Progress
from muster.data.split import Split
from muster.data.tokenizer import Tokenizer

_VERSION = 1
_SAMPLE_BYTES = 16 << 20  # more text hardly changes the merges, but takes longer


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a file that the tokenizer learns from."""

    split: Split
    entry: Entry
    part: Part


def resolve(
    wanted: TrainTokenizer | str, base: Path, splits: Sequence[Split], cache: Cache, progress: Progress
) -> tuple[Tokenizer, str]:
    """The tokenizer, and how it came about."""
    if wanted == "byte":
        return Tokenizer.byte(), "bytes"
    if isinstance(wanted, str):
        return Tokenizer.from_file(base / Path(wanted).expanduser()), f"from {wanted}"
    sample = _sample(splits)
    folder = cache.tokenizers / _key(sample, wanted.vocab)
    origin = "reused"
    if not (folder / "tokenizer.json").is_file():
        with cache.lock():
            if not (folder / "tokenizer.json").is_file():
                _train(sample, wanted.vocab, progress).save(folder)
                origin = "trained"
    tokenizer = Tokenizer.from_file(folder)
    if tokenizer.vocab < wanted.vocab:
        origin += f" (the text yields only {tokenizer.vocab} of {wanted.vocab} tokens)"
    return tokenizer, origin


def _train(sample: Sequence[_Piece], vocab: int, progress: Progress) -> Tokenizer:
    progress.start(sum(piece.part.text_bytes for piece in sample), "training the tokenizer")
    try:
        return Tokenizer.train_bpe(_texts(sample, progress), vocab)
    finally:
        progress.done()


def _texts(sample: Sequence[_Piece], progress: Progress) -> Iterator[str]:
    for piece in sample:
        for text in piece.split.training_texts(piece.entry, piece.part):
            yield text.text
        progress.advance(piece.part.text_bytes)


def _sample(splits: Sequence[Split]) -> list[_Piece]:
    """Parts with training documents in an order that is random, but always the same, up to a size."""
    pieces = [
        _Piece(split, entry, part)
        for split in splits
        for entry in split.catalogue.entries
        if entry.scan.highest >= split.threshold
        for part in entry.scan.parts
    ]
    pieces.sort(key=_order)
    chosen: list[_Piece] = []
    size = 0
    for piece in pieces:
        size += piece.part.text_bytes
        if chosen and size > _SAMPLE_BYTES:
            break
        chosen.append(piece)
    return chosen


def _order(piece: _Piece) -> tuple[int, str]:
    return name_hash(f"sample {piece.entry.file.name}@{piece.part.start}"), piece.entry.scan.digest


def _key(sample: Sequence[_Piece], vocab: int) -> str:
    content = [piece.split.identity(piece.entry, piece.part) for piece in sample]
    return hashlib.blake2b(json.dumps([_VERSION, vocab, content]).encode(), digest_size=16).hexdigest()
