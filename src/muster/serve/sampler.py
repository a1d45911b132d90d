"""From logits to tokens: functions over (B, V) logits, one request's parameters a row.

A row's draw depends on its own logits, its seed and its position in its own sequence, never on its neighbours
in the batch or on a generator's history: that makes seeds reproducible in a crowd, and lets another replica continue
a half-finished sequence. Noise is a hash of (seed, position, token): the draw is the argmax of log-probability plus
Gumbel noise. So two models that agree draw the same token mostly, which speculative decoding lives on.

Cost decides the form: nothing sorts a vocabulary where it need not. Without filters a lane of tokens (`lanes.py`) is
drawn by its mass and then one of its tokens, which is the same distribution. Filters look at the few dozen most likely
tokens, and at all only where a flat distribution makes them keep more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from muster.serve.lanes import Floats, Ints, lane_masses, lane_members, largest, most_likely, row_weights
from muster.serve.protocol import SamplingParams

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: the division would only overflow towards the same token."""

_CANDIDATES = 64
"""Most likely tokens looked at one by one, or more where `top_k` asks for it."""
_MOST_CANDIDATES = 1024
_SMALL_VOCAB = 512
"""Up to this many tokens all are candidates."""


def sample(
    logits: Tensor, params: Sequence[SamplingParams], seeds: Sequence[int], positions: Sequence[int]
) -> tuple[list[int], list[bool]]:
    """One token a row of logits (B, V) fp32, and whether the row was sound (not nan or inf).

    `positions` are the numbers of tokens that each row's sequence has generated before.
    """
    best, tokens = most_likely(logits)
    sound, ids = np.isfinite(best).tolist(), tokens.tolist()
    rows = [row for row, one in enumerate(params) if one.temperature >= GREEDY_BELOW and sound[row]]
    if rows:
        chosen = logits if len(rows) == len(params) else logits[rows]
        drawn = _draw(
            chosen,
            [params[row] for row in rows],
            [seeds[row] for row in rows],
            [positions[row] for row in rows],
        )
        for row, id in zip(rows, drawn, strict=True):
            ids[row] = id
    return ids, sound


def _draw(
    logits: Tensor, params: Sequence[SamplingParams], seeds: Sequence[int], positions: Sequence[int]
) -> list[int]:
    """A token for each row, none of them greedy."""
    base = _hashed(np.array([seed & _MASK for seed in seeds], dtype=np.uint64), np.array(positions))
    temperature = np.array([one.temperature for one in params])
    drawn = np.zeros(len(params), dtype=np.int64)
    plain = [row for row, one in enumerate(params) if not one.filtered]
    filtered = [row for row, one in enumerate(params) if one.filtered]
    if plain:
        chosen = logits if not filtered else logits[plain]
        drawn[plain] = _from_all(chosen, temperature[plain], base[plain])
    if filtered:
        filters = _Filters(
            top_k=np.array([min(params[row].top_k, logits.shape[1]) for row in filtered]),
            top_p=np.array([params[row].top_p for row in filtered]),
            min_p=np.array([params[row].min_p for row in filtered]),
        )
        chosen = logits if not plain else logits[filtered]
        drawn[filtered] = _from_kept(chosen, temperature[filtered], filters, base[filtered])
    result: list[int] = drawn.tolist()
    return result


def _from_kept(logits: Tensor, temperature: Floats, filters: _Filters, base: NDArray[np.uint64]) -> Ints:
    """A token of each row (B, V) that its filters keep: of the candidates, where these are enough."""
    rows = np.arange(len(logits))
    count = np.clip(filters.top_k, _CANDIDATES, _MOST_CANDIDATES)  # of each row, whatever the others need
    values, ids = _candidates(logits, int(count.max()))
    weights = np.exp((values - values[:, :1]) / temperature[:, None])  # (B, C), most likely first: 1
    weights[np.arange(weights.shape[1]) >= count[:, None]] = 0
    mass = np.zeros(len(rows))
    shared = np.flatnonzero((filters.top_k == 0) & (filters.top_p < 1))  # rows that keep a share of all
    if len(shared):
        chosen = logits if len(shared) == len(rows) else logits[torch.from_numpy(shared).to(logits.device)]
        mass[shared] = lane_masses(chosen, temperature[shared]).sum(axis=1)
    kept, complete = _keep(weights, mass, count, filters)
    if weights.shape[1] == logits.shape[1]:
        complete[:] = True
    with np.errstate(divide="ignore"):
        scores = np.log(np.where(kept, weights, 0)) + _gumbel(base[:, None], ids)
    drawn: Ints = ids[rows, scores.argmax(axis=1)]
    for row in np.flatnonzero(~complete).tolist():
        weights = row_weights(logits[row], temperature[row])
        _drop(weights, int(filters.top_k[row]), float(filters.top_p[row]), float(filters.min_p[row]))
        drawn[row] = _from_weights(weights, base[row])
    return drawn


def _candidates(logits: Tensor, count: int) -> tuple[Floats, Ints]:
    """The `count` most likely tokens of each row, best first: (B, count) logits and ids; of a small vocabulary all."""
    vocab = logits.shape[1]
    return largest(logits, vocab if vocab <= max(_SMALL_VOCAB, count) else count)


@dataclass(frozen=True, slots=True)
class _Filters:
    """Of each row."""

    top_k: Ints
    top_p: Floats
    min_p: Floats


def _keep(
    weights: Floats, mass: Floats, count: Ints, filters: _Filters
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """What top-k, then top-p (nucleus, Holtzman et al. 2020), and min-p (Nguyen et al. 2024) keep of weights (B, C)
    in falling order, of which a row has `count`; and whether that is all they keep of the whole row, whose mass is
    `mass`. The first always stays."""
    top_k, top_p, min_p = filters.top_k, filters.top_p, filters.min_p
    kept = (weights > 0) & (np.arange(weights.shape[1]) < np.where(top_k > 0, top_k, count)[:, None])
    until = np.where(kept, weights, 0).cumsum(axis=1)
    whole = np.where(top_k > 0, until[:, -1], np.maximum(mass, until[:, -1]))
    limit = np.where(top_p < 1, top_p * whole, np.inf)
    complete = ((top_k > 0) & (top_k <= count)) | ((top_k == 0) & (until[:, -1] >= limit))
    last = weights[np.arange(len(weights)), np.minimum(count, weights.shape[1]) - 1]
    complete |= last < min_p
    kept &= (until - weights < limit[:, None]) & (weights >= min_p[:, None])
    kept[:, 0] = True
    return kept, complete


def _drop(weights: NDArray[np.float32], top_k: int, top_p: float, min_p: float) -> None:
    """Set to 0 what filters leave out of a row's weights (V,), of which the largest is 1, where they keep more than
    the candidates. Of tokens that are equally likely, those at the border all stay."""
    least, vocab = min_p, len(weights)
    if top_k or top_p < 1:
        whole = 0.0 if top_k else top_p * weights.sum(dtype=np.float64)
        # Sorting all of them takes several times as long as finding the largest thousand.
        for count in (top_k,) if top_k else (min(_MOST_CANDIDATES, vocab), vocab):
            ordered = np.sort(np.partition(weights, vocab - count)[vocab - count :])[::-1]
            until = ordered.cumsum(dtype=np.float64)
            if until[-1] >= whole:
                break
        border = np.searchsorted(until, top_p * until[-1] if top_k else whole) if top_p < 1 else count - 1
        least = max(least, float(ordered[min(int(border), count - 1)]))
    weights[weights < least] = 0


def _from_all(logits: Tensor, temperature: Floats, base: NDArray[np.uint64]) -> Ints:
    """A token of each row of (B, V): first a lane of tokens, then one of it."""
    masses = lane_masses(logits, temperature)
    with np.errstate(divide="ignore"):
        lanes = (np.log(masses) + _gumbel(base[:, None], -1 - np.arange(masses.shape[1]))).argmax(axis=1)
        weights, ids = lane_members(logits, lanes, temperature)
        token = (np.log(weights) + _gumbel(base[:, None], ids)).argmax(axis=1)
    found: Ints = ids[np.arange(len(ids)), token]
    return found


def _from_weights(weights: NDArray[np.float32], base: np.uint64) -> int:
    """A token by the weights (V,) of all."""
    ids = np.flatnonzero(weights)
    return int(ids[(np.log(weights[ids].astype(np.float64)) + _gumbel(base, ids)).argmax()])


_MASK = (1 << 64) - 1


def _hashed(state: NDArray[np.uint64] | np.uint64, number: Ints | np.int64) -> NDArray[np.uint64]:
    """SplitMix64 (Steele et al. 2014) as a hash of a state and a number."""
    with np.errstate(over="ignore"):
        mixed = np.asarray(state, dtype=np.uint64) + np.asarray(number).astype(np.uint64) * _ODD
        mixed = (mixed ^ (mixed >> _S30)) * _M1
        mixed = (mixed ^ (mixed >> _S27)) * _M2
        hashed: NDArray[np.uint64] = mixed ^ (mixed >> _S31)
        return hashed


_ODD = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)


def _uniform(hashed: NDArray[np.uint64]) -> Floats:
    """Numbers between 0 and 1, neither included."""
    uniforms: Floats = ((hashed >> _S11).astype(np.float64) + 0.5) * 2.0**-53
    return uniforms


def _gumbel(base: NDArray[np.uint64] | np.uint64, ids: Ints | np.int64) -> Floats:
    """Gumbel noise for token ids."""
    noise: Floats = -np.log(-np.log(_uniform(_hashed(base, ids))))
    return noise


def top_logprobs(
    logits: Tensor, tokens: Sequence[int], counts: Sequence[int]
) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """For each row of raw logits (B, V): the log-probability of its token, and its most likely tokens with theirs."""
    values, ids = _candidates(logits, max(1, *counts))
    total = values[:, 0] + np.log(
        lane_masses(logits, np.ones(len(logits))).sum(axis=1)
    )  # log of the sum of exp
    own = (
        logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].double().numpy(force=True)
    )
    found: list[tuple[float, tuple[tuple[int, float], ...]]] = []
    for row, (value, count) in enumerate(zip((own - total).tolist(), counts, strict=True)):
        top = zip(ids[row, :count].tolist(), (values[row, :count] - total[row]).tolist(), strict=True)
        found.append((value, tuple(top)))
    return found
