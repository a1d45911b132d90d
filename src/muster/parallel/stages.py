"""How a model's layers are shared out over pipeline stages, weighted by what they cost.

Pure; knows no torch. A stage is a contiguous range of layers and holds at least one; the first stage carries the
embedding as well, the last one the norm and the head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from muster.model.spec import TransformerSpec


@dataclass(frozen=True, slots=True)
class Costs:
    """Floating-point operations of training on one token."""

    embedding: float
    layers: tuple[float, ...]
    head: float

    def of(self, layers: range) -> float:
        """Cost of a stage."""
        cost = sum(self.layers[layers.start : layers.stop])
        cost += self.embedding if layers.start == 0 else 0.0
        return cost + (self.head if layers.stop == len(self.layers) else 0.0)


def costs(spec: TransformerSpec, sequence: int) -> Costs:
    """What the parts of a model cost on sequences of `sequence` tokens."""
    head = replace(spec, layers=0).flops_per_token(sequence)
    layer = (spec.flops_per_token(sequence) - head) / spec.layers
    # A lookup multiplies nothing; its backward adds one row of the table.
    return Costs(embedding=float(spec.width), layers=(layer,) * spec.layers, head=head)


def split(parts: Costs, stages: int) -> list[range]:
    """The contiguous layers of each stage such that the costliest stage costs least.

    Among splits that are equal in that, the most even one. There must be as many layers as stages
    (`split_problems`).
    """
    _, largest = _best(parts, stages, max)
    most_even, _ = _best(parts, stages, lambda total, cost: total + cost**2, limit=largest)
    return most_even


def explicit(layers_of_stages: Sequence[int]) -> list[range]:
    """The layers of each stage from a list of how many each has."""
    ends = [sum(layers_of_stages[: stage + 1]) for stage in range(len(layers_of_stages))]
    return [range(end - count, end) for end, count in zip(ends, layers_of_stages, strict=True)]


def split_problems(layers: int, stages: int, layers_of_stages: Sequence[int] | None = None) -> list[str]:
    """Why a model cannot be split so, one sentence each with the nearest legal values; empty where it can."""
    if layers < stages:
        return [
            f"{stages} pipeline stages need at least {stages} layers, but the model has {layers}: use {layers} stages "
            f"or fewer"
        ]
    if layers_of_stages is None:
        return []
    said = list(layers_of_stages)
    found = []
    if len(said) != stages:
        found.append(
            f"the split {said} names {len(said)} stages, but the layout has {stages}: name {stages} numbers"
        )
    if min(said, default=1) < 1:
        found.append(f"the split {said} leaves a stage without layers: each stage needs at least 1")
    if sum(said) != layers:
        found.append(
            f"the split {said} shares out {sum(said)} layers, but the model has {layers}: the numbers must add up "
            f"to {layers}"
        )
    return found


def _best(
    parts: Costs, stages: int, add: Callable[[float, float], float], limit: float = math.inf
) -> tuple[list[range], float]:
    """The split into stages no costlier than `limit` whose costs, taken together by `add`, come to least.

    Dynamic programming over (stages so far, layers so far); also returns what the costs come to.
    """
    layers = len(parts.layers)
    least = [0.0] + [math.inf] * layers  # by layers so far
    last_starts: list[list[int]] = []  # by stages so far, layers so far
    for stage in range(stages):
        before, least = least, [math.inf] * (layers + 1)
        last_starts.append([0] * (layers + 1))
        for end in range(stage + 1, layers + 1):
            for start in range(stage, end):
                cost = parts.of(range(start, end))
                total = add(before[start], cost)
                if cost <= limit and total < least[end]:
                    least[end], last_starts[stage][end] = total, start
    found, end = [], layers
    for starts in reversed(last_starts):
        found.append(range(starts[end], end))
        end = starts[end]
    return found[::-1], least[layers]
