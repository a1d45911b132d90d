"""From logits to tokens: functions over (B, V) logits, one request's parameters a row.

A row's draw depends on its own logits, its seed and its position in its own sequence, never on its neighbours
in the batch or on a generator's history: that makes seeds reproducible in a crowd, and lets another replica continue
a half-finished sequence. Noise is a hash of (seed, position, token): the draw is the argmax of log-probability plus
Gumbel noise. So two models that agree draw the same token mostly, which speculative decoding lives on.

Cost decides the form: nothing sorts a vocabulary where it need not. Without filters a span of tokens is drawn by its
mass and then one of its tokens, which is the same distribution. Filters look at the few dozen most likely tokens, found
by the maxima of spans, and at all only where a flat distribution makes them keep more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from muster.serve.protocol import SamplingParams

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: the division would only overflow towards the same token."""

_SPAN = 128
"""Tokens that are looked at as one first."""
_CANDIDATES = 64
"""Most likely tokens looked at one by one, or more where `top_k` asks for it."""
_MOST_CANDIDATES = 1024
_SMALL_VOCAB = 512
"""Up to this many tokens all are candidates."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


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


def most_likely(logits: Tensor) -> tuple[NDArray[np.float32], Ints]:
    """Maximum and argmax of each row (B, V) fp32; a nan in a row is its maximum. On a CPU by numpy, which takes 2 us
    for 32,000 logits where torch's argmax takes 40."""
    if logits.device.type != "cpu":
        values, ids = logits.max(dim=-1)
        return values.numpy(force=True), ids.numpy(force=True)
    exact = logits.numpy()
    best: Ints = exact.argmax(axis=-1)
    return exact[np.arange(len(best)), best], best


def _spans(logits: Tensor, spans: int) -> Tensor:
    """(B, V) -> (B, spans, 128), without what is left over at the end."""
    return logits[:, : spans * _SPAN].view(-1, spans, _SPAN)


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
        drawn[plain] = _from_all(_probabilities(logits, plain, temperature[plain]), base[plain])
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
        best = _probabilities(logits, shared, temperature[shared]).amax(dim=1)
        mass[shared] = 1 / best.double().numpy(force=True)
    kept, complete = _keep(weights, mass, count, filters)
    if weights.shape[1] == logits.shape[1]:
        complete[:] = True
    with np.errstate(divide="ignore"):
        scores = np.log(np.where(kept, weights, 0)) + _gumbel(base[:, None], ids)
    drawn: Ints = ids[rows, scores.argmax(axis=1)]
    flat = np.flatnonzero(~complete)
    if len(flat):
        probabilities = _probabilities(logits, flat, temperature[flat])
        _drop(probabilities, filters, flat)
        drawn[flat] = _from_all(probabilities, base[flat])
    return drawn


def _candidates(logits: Tensor, count: int) -> tuple[Floats, Ints]:
    """The `count` most likely tokens of each row, best first: (B, count) logits and ids; of a small vocabulary all."""
    vocab = logits.shape[1]
    spans = vocab // _SPAN
    if vocab <= max(_SMALL_VOCAB, count):
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        return values.double().numpy(force=True), ids.numpy(force=True)
    if spans <= 2 * count:
        values, ids = logits.topk(count, dim=-1)
        return values.double().numpy(force=True), ids.numpy(force=True)
    # The `count` best lie in the `count` spans with the highest maxima, or in the rest behind the last span.
    head = _spans(logits, spans)
    best = head.amax(dim=-1).topk(count, dim=-1).indices  # (B, count) spans
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    found = head[rows, best].flatten(1)  # (B, count * 128)
    where = (best[:, :, None] * _SPAN + torch.arange(_SPAN, device=logits.device)).flatten(1)
    rest = torch.arange(spans * _SPAN, vocab, device=logits.device).expand(len(logits), -1)
    found, where = torch.cat([found, logits[:, spans * _SPAN :]], 1), torch.cat([where, rest], 1)
    values, index = found.topk(count, dim=-1)
    return values.double().numpy(force=True), where.gather(1, index).numpy(force=True)


def _probabilities(logits: Tensor, rows: Sequence[int] | Ints, temperature: Floats) -> Tensor:
    """Of all tokens, for some rows of (B, V), fp32."""
    chosen = logits if len(rows) == len(logits) else logits[torch.tensor(rows, device=logits.device)]
    return (chosen * logits.new_tensor(1 / temperature)[:, None]).softmax(dim=-1)


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


def _drop(probabilities: Tensor, filters: _Filters, rows: Ints) -> None:
    """Set to 0 what the filters of some rows leave out of their probabilities (len(rows), V), where they keep more
    than the candidates. Of tokens that are equally likely, those at the border all stay."""
    least = filters.min_p[rows] * probabilities.amax(dim=1).double().numpy(force=True)
    for index, row in enumerate(rows.tolist()):
        top_k, top_p = int(filters.top_k[row]), float(filters.top_p[row])
        if top_k or top_p < 1:
            ordered = np.sort(probabilities[index].numpy(force=True))[::-1][: top_k or None]
            until = ordered.cumsum(dtype=np.float64)
            border = np.searchsorted(until, top_p * until[-1]) if top_p < 1 else len(ordered) - 1
            least[index] = max(least[index], ordered[min(int(border), len(ordered) - 1)])
    probabilities[probabilities < probabilities.new_tensor(least)[:, None]] = 0


def _from_all(probabilities: Tensor, base: NDArray[np.uint64]) -> Ints:
    """A token of each row of (B, V), which need not add up to 1: first a span of tokens, then one of it."""
    rows, spare = np.arange(len(probabilities)), -probabilities.shape[1] % _SPAN
    if spare:
        probabilities = torch.nn.functional.pad(probabilities, (0, spare))
    spans = probabilities.view(len(rows), -1, _SPAN)
    mass = spans.sum(dim=2).double().numpy(force=True)  # (B, spans)
    with np.errstate(divide="ignore"):
        noise = _gumbel(base[:, None], -1 - np.arange(mass.shape[1]))
        span = (np.log(mass) + noise).argmax(axis=1)
        inside = spans[torch.from_numpy(rows), torch.from_numpy(span)].double().numpy(force=True)  # (B, span)
        ids = span[:, None] * _SPAN + np.arange(_SPAN)
        token = (np.log(inside) + _gumbel(base[:, None], ids)).argmax(axis=1)
    found: Ints = ids[rows, token]
    return found


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
    # log of the sum of exp: the most likely logit less the log of its probability
    likely = _probabilities(logits, range(len(logits)), np.ones(len(logits))).amax(dim=1)
    total = values[:, 0] - likely.double().log().numpy(force=True)
    own = (
        logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].double().numpy(force=True)
    )
    found: list[tuple[float, tuple[tuple[int, float], ...]]] = []
    for row, (value, count) in enumerate(zip((own - total).tolist(), counts, strict=True)):
        top = zip(ids[row, :count].tolist(), (values[row, :count] - total[row]).tolist(), strict=True)
        found.append((value, tuple(top)))
    return found
