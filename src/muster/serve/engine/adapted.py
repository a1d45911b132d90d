"""Linear layers with adapters: some rows of a batch get B A x on top of W x, each the adapter of its request.

Rows of one adapter lie together, so that is two small products for each adapter in the batch, by the same kernels as
the rest: a row's bits do not depend on the other rows. Matrices that are fused in the model are fused here too: their
As lie one under the other, their Bs on a diagonal of blocks. n rows; R is the sum of their ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from muster.parallel.tensor_plan import divided_dim
from muster.serve.adapters import Adapter
from muster.serve.engine.part import Part
from muster.serve.kernels.ops import Kernels
from muster.serve.kernels.packing import Format, quantize

Linear = Callable[[Tensor], Tensor]
Spans = Sequence[tuple[int, slice]]
"""Which rows belong to which adapter, counted from 1; rows of none are the model's alone."""


class AdaptedLinear:
    """A layer of the model, and what each adapter adds to it, by the adapter's number."""

    def __init__(self, base: Linear, added: Mapping[int, Linear]) -> None:
        self.base, self._added = base, added

    def __call__(self, x: Tensor, spans: Spans) -> Tensor:
        out = self.base(x)
        for adapter, rows in spans:
            if (added := self._added.get(adapter)) is not None:
                out[rows] += added(x[rows])
        return out


class Adaptation:
    """All adapters of a rank's part of a model."""

    def __init__(self, adapters: Sequence[Adapter], part: Part, kernels: Kernels) -> None:
        self._adapters, self._part, self._kernels = adapters, part, kernels

    def of(self, base: Linear, fused: Mapping[str, int]) -> AdaptedLinear:
        """A layer that was made from matrices with so many features each, by their names, in this order."""
        numbered = enumerate(self._adapters, 1)
        added = {
            number: self._added(adapter, fused)
            for number, adapter in numbered
            if adapter.pairs.keys() & fused
        }
        return AdaptedLinear(base, added)

    def _added(self, adapter: Adapter, fused: Mapping[str, int]) -> Linear:
        """x (n, K) to B A x (n, N)."""
        pairs = {name: self._own(name, *adapter.pairs[name]) for name in fused if name in adapter.pairs}
        a = torch.cat([a for a, _ in pairs.values()])  # (R, K)
        b = torch.zeros(sum(fused.values()), len(a))  # (N, R)
        row = column = 0
        for name, features in fused.items():
            if name in pairs:
                block = pairs[name][1]
                b[row : row + features, column : column + adapter.rank] = block
                column += adapter.rank
            row += features
        format: Format = "fp32" if self._kernels.compute == torch.float32 else "bf16"
        inner = self._kernels.linear(quantize(a, None, format), self._kernels.compute)
        outer = self._kernels.linear(quantize(b, None, format), self._kernels.compute)
        return lambda x: outer(inner(x))

    def _own(self, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's share: of A where the inputs are divided, and the sum over ranks is that of B A x; else of B."""
        whole, ranks = self._part.whole, self._part.ranks
        if divided_dim(name, kv_heads=whole.kv_heads, ranks=ranks) == 1:
            return self._part.own(name, a), b
        return a, self._part.own(name, b)
