"""A vocabulary of thousands, looked at as 256 lanes: lane l holds the tokens l, l + 256, l + 512, ... of a row.

Maxima and sums of lanes are additions of whole vectors. On a CPU it is numpy that makes them, a row at a time, which
stays in the cache: torch would give a batch to as many threads as there are cores, and on a busy machine those wait
for each other many times as long as the work takes.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LANES = 256

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def most_likely(logits: Tensor) -> tuple[NDArray[np.float32], Ints]:
    """Maximum and argmax of each row (B, V) fp32; a nan in a row is its maximum. On a CPU by numpy, which takes 2 us
    for 32,000 logits where torch's argmax takes 40."""
    if logits.device.type != "cpu":
        values, ids = logits.max(dim=-1)
        return values.numpy(force=True), ids.numpy(force=True)
    exact = logits.numpy()
    best: Ints = exact.argmax(axis=-1)
    return exact[np.arange(len(best)), best], best


def lane_masses(logits: Tensor, temperature: Floats) -> Floats:
    """(B, LANES): the sum of each lane's exp((logit - the row's largest) / temperature), of rows (B, V)."""
    largest, inverse = most_likely(logits)[0], (1 / temperature).astype(np.float32)
    rows, vocab = logits.shape
    if logits.device.type != "cpu":
        best, by = logits.new_tensor(largest)[:, None], logits.new_tensor(inverse)[:, None]
        weights = torch.nn.functional.pad(((logits - best) * by).exp(), (0, -vocab % LANES))
        return weights.view(rows, -1, LANES).sum(dim=1).double().numpy(force=True)
    masses = np.empty((rows, LANES))
    for row, exact in enumerate(logits.numpy()):
        masses[row] = _reduced(np.add, _weights(exact, largest[row], inverse[row]), 0)
    return masses


def lane_members(logits: Tensor, lanes: Ints, temperature: Floats) -> tuple[Floats, Ints]:
    """Of one lane of each row (B, V): (B, M) weights as `lane_masses` adds them up, and the tokens' ids. Where the
    last would be outside of the vocabulary, its weight is 0."""
    vocab = logits.shape[1]
    ids = lanes[:, None] + np.arange(0, vocab, LANES)
    where = torch.from_numpy(np.minimum(ids, vocab - 1)).to(logits.device)
    values = logits.gather(1, where).double().numpy(force=True)
    weights = np.exp((values - most_likely(logits)[0][:, None]) / temperature[:, None])
    weights[ids >= vocab] = 0
    return weights, ids


def row_weights(logits: Tensor, temperature: float) -> NDArray[np.float32]:
    """exp((logit - the largest) / temperature) of a row (V,)."""
    exact = logits.numpy(force=True)
    return _weights(exact, exact.max(), np.float32(1 / temperature))


def largest(logits: Tensor, count: int) -> tuple[Floats, Ints]:
    """The `count` largest of each row (B, V), the largest first and of equal ones that with the least id:
    (B, count) logits and ids."""
    if logits.device.type != "cpu":
        best, where = logits.topk(count, dim=-1)
        return best.double().numpy(force=True), where.numpy(force=True)
    values, ids = np.full((len(logits), count), -np.inf), np.zeros((len(logits), count), dtype=np.int64)
    for row, exact in enumerate(logits.numpy()):
        found = _largest(exact, count)  # fewer where there is a nan
        values[row, : len(found)], ids[row, : len(found)] = exact[found], found
    return values, ids


def _largest(row: NDArray[np.float32], count: int) -> Ints:
    """Each of the `count` lanes with the largest maxima has one that is as large as the least of these maxima: so what
    is sought is not below it."""
    among = row if count > LANES or len(row) <= LANES else _reduced(np.maximum, row, -np.inf)
    least = np.partition(among, len(among) - count)[len(among) - count]
    ids = np.flatnonzero(row > least)
    if len(ids) < count:
        ids = np.concatenate([ids, np.flatnonzero(row == least)[: count - len(ids)]])
    found: Ints = ids[np.argsort(-row[ids], kind="stable")][:count]
    return found


def _weights(row: NDArray[np.float32], best: np.float32, inverse: np.float32) -> NDArray[np.float32]:
    weights = row - best
    weights *= inverse
    np.exp(weights, out=weights)
    return weights


def _reduced(by: np.ufunc, row: NDArray[np.float32], nothing: float) -> NDArray[np.float32]:
    """(V,) -> (LANES,)."""
    whole = len(row) // LANES * LANES
    reduced: NDArray[np.float32] = by.reduce(
        row[:whole].reshape(-1, LANES), axis=0, initial=np.float32(nothing)
    )
    rest = row[whole:]
    by(reduced[: len(rest)], rest, out=reduced[: len(rest)])
    return reduced
