"""Making shards: read, encode on all cores, frame the documents, write. Holds a few batches in memory."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from muster.data.files import atomic
from muster.data.parts import Text
from muster.data.progress import Progress
from muster.data.shards import Record, Side
from muster.data.split import Split
from muster.data.tokenizer import Tokenizer

_BATCH_BYTES = 4 << 20
# While the ids of one batch are taken out, which needs the interpreter, the next one keeps the cores busy.
_AHEAD = 2

In = TypeVar("In")
Out = TypeVar("Out")
_Encoded = list[tuple[Text, NDArray[Any]]]


def build(
    shards: Sequence[tuple[Path, Iterable[Text]]], split: Split, tokenizer: Tokenizer, progress: Progress
) -> Iterator[Record]:
    """Tokenise texts into shard files; yields each file's record when the file is safely there."""
    # One pipeline for all shards, so that no core waits where one of them ends.
    batches = ((path, batch) for path, texts in shards for batch in _batches(texts))

    def encode(item: tuple[Path, list[Text]]) -> tuple[Path, _Encoded]:
        path, batch = item
        return path, list(zip(batch, tokenizer.encode_batch([text.text for text in batch]), strict=True))

    for path, group in groupby(_map_ahead(encode, batches), key=lambda item: item[0]):
        yield _write(path, (encoded for _, encoded in group), split, tokenizer, progress)


def _write(
    path: Path, batches: Iterable[_Encoded], split: Split, tokenizer: Tokenizer, progress: Progress
) -> Record:
    train, held_out = Side(), Side()
    held_out_tokens: list[NDArray[Any]] = []  # few, and written last
    crc32 = 0
    with atomic(path) as file:

        def append(tokens: NDArray[Any]) -> None:
            nonlocal crc32
            crc32 = zlib.crc32(tokens.data, crc32)
            file.write(tokens.data)

        for encoded in batches:
            tokens, totals = _framed([e for e in encoded if not split.is_held_out(e[0].document)], tokenizer)
            append(tokens)
            train += totals
            tokens, totals = _framed([e for e in encoded if split.is_held_out(e[0].document)], tokenizer)
            held_out_tokens.append(tokens)
            held_out += totals
            progress.advance(sum(text.size_bytes for text, _ in encoded))
        append(np.concatenate(held_out_tokens))
        record = Record(train, held_out, crc32)
        file.write(record.footer())
    return record


def _framed(encoded: _Encoded, tokenizer: Tokenizer) -> tuple[NDArray[Any], Side]:
    """Ids of consecutive texts, bos where a document begins and, if that is another token, eos at its end."""
    bos = np.array([tokenizer.bos_id], tokenizer.dtype)
    eos = np.array([tokenizer.eos_id], tokenizer.dtype)
    pieces: list[NDArray[Any]] = [bos[:0]]
    for text, ids in encoded:
        if text.begins:
            pieces.append(bos)
        pieces.append(ids)
        if text.ends and tokenizer.eos_id != tokenizer.bos_id:
            pieces.append(eos)
    tokens = np.concatenate(pieces)
    documents, size_bytes = sum(e.begins for e, _ in encoded), sum(e.size_bytes for e, _ in encoded)
    return tokens, Side(len(tokens), documents, size_bytes)


def _batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    batch: list[Text] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += text.size_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _map_ahead(function: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
    """`map` in order, with a few items under way in other threads."""
    waiting: deque[Future[Out]] = deque()
    with ThreadPoolExecutor(_AHEAD) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
