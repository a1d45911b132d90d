"""What requests change about their logits before a token is drawn: penalties, then biases."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from muster.serve.protocol import SamplingParams


class Adjustment:
    """One sequence's tokens so far, and what its parameters make of them."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], answer: Sequence[int] = ()) -> None:
        self.params = params
        # Arrays, so that a step makes its tensors without looking at the tokens one by one.
        self.all = array("q", dict.fromkeys(prompt))
        """Tokens of prompt and answer, each once."""
        self.answer = array("q")
        """Tokens of the answer, each once,"""
        self.times = array("f")
        """and how often."""
        self.bias = array("q", [id for id, _ in params.logit_bias])
        self.added = array("f", [value for _, value in params.logit_bias])
        self._known = set(self.all)
        self._where: dict[int, int] = {}
        for token in answer:
            self.push(token)

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        return params.penalized or bool(params.logit_bias)

    def push(self, token: int) -> None:
        """A token has been drawn."""
        if token in self._where:
            self.times[self._where[token]] += 1
            return
        self._where[token] = len(self.answer)
        self.answer.append(token)
        self.times.append(1)
        if token not in self._known:
            self._known.add(token)
            self.all.append(token)


def adjust(logits: Tensor, rows: Sequence[int], adjustments: Sequence[Adjustment]) -> None:
    """Change the given rows of logits (B, V) in place, all of them in a few operations."""
    repeated = [
        (row, one) for row, one in zip(rows, adjustments, strict=True) if one.params.repetition_penalty != 1
    ]
    if repeated:
        where = _places(logits, [row for row, _ in repeated], [one.all for _, one in repeated])
        by = _spread([one.params.repetition_penalty for _, one in repeated], [one.all for _, one in repeated])
        values, penalty = logits[where], torch.from_numpy(by).to(logits)
        logits[where] = torch.where(values > 0, values / penalty, values * penalty)
    taken = [
        (row, one)
        for row, one in zip(rows, adjustments, strict=True)
        if len(one.answer) and (one.params.presence_penalty or one.params.frequency_penalty)
    ]
    if taken:
        answers = [one.answer for _, one in taken]
        times = np.concatenate([np.frombuffer(one.times, dtype=np.float32) for _, one in taken])
        less = _spread([one.params.presence_penalty for _, one in taken], answers)
        less += _spread([one.params.frequency_penalty for _, one in taken], answers) * times
        logits[_places(logits, [row for row, _ in taken], answers)] -= torch.from_numpy(less).to(logits)
    biased = [(row, one) for row, one in zip(rows, adjustments, strict=True) if len(one.bias)]
    if biased:
        more = np.concatenate([np.frombuffer(one.added, dtype=np.float32) for _, one in biased])
        where = _places(logits, [row for row, _ in biased], [one.bias for _, one in biased])
        logits[where] += torch.from_numpy(more).to(logits)


def _places(logits: Tensor, rows: Sequence[int], ids: Sequence[array[int]]) -> tuple[Tensor, Tensor]:
    """Index of some tokens of some rows; none twice."""
    row = np.repeat(np.array(rows), [len(one) for one in ids])
    column = np.concatenate([np.frombuffer(one, dtype=np.int64) for one in ids])
    return torch.from_numpy(row).to(logits.device), torch.from_numpy(column).to(logits.device)


def _spread(values: Sequence[float], ids: Sequence[array[int]]) -> NDArray[np.float32]:
    """A row's value for each of its tokens."""
    spread: NDArray[np.float32] = np.repeat(np.array(values, dtype=np.float32), [len(one) for one in ids])
    return spread
