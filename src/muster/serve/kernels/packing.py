"""Weights of linear layers in the formats that serving has, as plain matrices and in the layout of the kernels.

fp32, bf16   as they are
int8         whole numbers with a scale for each output feature: weight = number * scale
int4         -8..7, and a whole factor for each `GROUP` inputs of an output feature: number * factor are the numbers of
             an int8 layer, and all that is summed is whole (progressive quantisation: QServe, Lin et al. 2024)

Activations of int8 and int4 layers are rounded to 8 bits with a scale for each token when they are used. What rounding
costs depends on the numbers that stand out, so both sides are `mixed` first, which leaves their product as it is.

Layers of `low_rank` keep apart what they do with their inputs in R directions, those of the largest singular values,
and compute it in floats; what is rounded, weights and activations, is what is left (SVDQuant, Li et al. 2024).
N output features, K inputs, R = `RANK`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Format = Literal["fp32", "bf16", "int8", "int4"]
FORMATS: tuple[Format, ...] = ("fp32", "bf16", "int8", "int4")

LAYOUT = "panels-of-32-low-rank-behind"
"""The kernels' layout: [panel of 32 features][inputs][32 features], a 32-bit unit of inputs (1 fp32, 2 bf16, 4 int8,
8 int4) at a time; behind a panel of low rank its `left`. Written into files of packed weights."""
GROUP = 32
RANK = 8
"""Directions of inputs that are computed in floats; `cpp/low_rank.h` has as many."""
_ITERATIONS = 4
_LARGEST_FACTOR = 15
"""So that -8 times it is an int8."""
_PANEL = 32
_LEFT_UNITS = RANK * 2 // 4
"""What (R, 32) bf16 behind a panel are, in units of 32 features."""
_MIXED = 64
"""Neighbouring inputs that are mixed with each other."""
IN_UNIT = {"fp32": 1, "bf16": 2, "int8": 4, "int4": 8}
"""Inputs in a 32-bit unit of the layout."""
_MULTIPLE = {"fp32": 1, "bf16": 32, "int8": 64, "int4": 64}
"""What inputs are filled up to: whole tiles (AMX), whole vectors of the quantised activations, whole groups."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """One linear layer, plain or packed."""

    format: Format
    features: int
    inputs: int
    packed: bool
    weight: Tensor
    """Plain: (N, K) floats, or whole numbers as int8 of mixed inputs (K filled up to 64s). Packed: bytes of `LAYOUT`,
    with features and inputs filled up."""
    scale: Tensor | None = None
    """int8 and int4: (N,) fp32."""
    factor: Tensor | None = None
    """int4: int8 -15..15; plain (N, groups). Packed (panels, groups, 32, 2), not negative: numbers n of 0..15 stand for
    (n - 8) * first + second."""
    right: Tensor | None = None
    """Of low rank: (R, K) bf16, nearly orthonormal: directions of inputs, which are not mixed here. Packed
    (inputs filled up / 16, R, 16)."""
    left: Tensor | None = None
    """(N, R) bf16, what becomes of each; packed, it lies in `weight` behind each panel, (R, 32)."""
    bias: Tensor | None = None
    """(N,) fp32."""

    @property
    def padded(self) -> int:
        """Inputs of packed weights, those included that they were filled up with."""
        behind = 0 if self.right is None else _LEFT_UNITS
        return (self.weight.shape[1] - behind) * IN_UNIT[self.format]

    def tensors(self) -> dict[str, Tensor]:
        """What there is, by name."""
        return {name: tensor for name in TENSORS if (tensor := getattr(self, name)) is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> Weights:
        """The same with each tensor replaced."""
        changed: dict[str, Any] = {name: function(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)


TENSORS = ("weight", "scale", "factor", "right", "left", "bias")
"""Names of what `Weights` has."""


def quantize(weight: Tensor, bias: Tensor | None, format: Format, *, low_rank: bool = False) -> Weights:
    """A matrix (N, K) in a format, plain, by rounding to the nearest. `low_rank` concerns int8 and int4."""
    features, inputs = weight.shape
    bias = None if bias is None else bias.detach().float().contiguous()
    scale = factor = right = left = None
    weight = weight.detach()
    if format in ("int8", "int4"):
        weight = weight.float()
        if low_rank:
            right = _directions(weight)
            exact = right.float()
            left = (weight @ torch.linalg.pinv(exact)).to(torch.bfloat16)
            weight = weight - left.float() @ exact
        if format == "int8":
            weight, scale = _to_int8(mixed(weight))
        else:
            weight, scale, factor = _to_int4(mixed(weight))
    else:
        weight = weight.to(torch.float32 if format == "fp32" else torch.bfloat16).contiguous()
    return Weights(
        format=format, features=features, inputs=inputs, packed=False, weight=weight, scale=scale, factor=factor,
        right=right, left=left, bias=bias,
    )  # fmt: skip


def _directions(weight: Tensor) -> Tensor:
    """(R, K) bf16, near to the right singular vectors of a matrix (N, K) with the largest values, by subspace iteration
    from a fixed start. Where there are fewer than R, the last ones are zero."""
    inputs = weight.shape[1]
    found = torch.randn(inputs, min(RANK, inputs), generator=torch.Generator().manual_seed(0))
    for _ in range(_ITERATIONS):
        found = torch.linalg.qr(weight.T @ (weight @ found))[0]
    return F.pad(found.T, (0, 0, 0, RANK - found.shape[1])).to(torch.bfloat16).contiguous()


def mixed(x: Tensor) -> Tensor:
    """x (..., K), filled with zeros to whole blocks of 64, with each block times the orthonormal Hadamard matrix, fp32.

    Spreads a number that stands out over its block, and is its own inverse (QuaRot, Ashkboos et al. 2024).
    """
    exact = _filled(x.float(), 0, _MIXED)
    blocks = exact.reshape(-1, _MIXED)
    for half in (1, 2, 4, 8, 16, 32):  # the kernels add in this order, too
        first, second = blocks.view(-1, _MIXED // (2 * half), 2, half).unbind(2)
        blocks = torch.stack([first + second, first - second], 2).flatten(1)
    return (blocks / math.sqrt(_MIXED)).view(exact.shape)


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(1) / 127
    whole = torch.round(weight / scale.clamp_min(1e-30)[:, None]).clamp_(-127, 127)
    return whole.to(torch.int8), scale


def _to_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = weight.view(len(weight), -1, GROUP)
    # The number farthest from zero becomes about -8, so that all sixteen values are used (as llama.cpp's q4_0).
    exact = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0] / -8
    scale = exact.abs().amax(1) / _LARGEST_FACTOR
    relative = exact.abs() / scale.clamp_min(1e-30)[:, None]
    least = torch.full_like(exact, torch.inf)
    kept, factor = torch.zeros_like(groups, dtype=torch.int8), torch.ones_like(exact)
    for step in (0, -1, 1):  # of the factors nearby, that with the smallest error
        tried = (torch.round(relative) + step).clamp_(1, _LARGEST_FACTOR).copysign(exact)
        one = tried * scale[:, None]
        whole = torch.round(groups / torch.where(one == 0, 1.0, one)[..., None]).clamp_(-8, 7)
        error = (whole * one[..., None] - groups).square_().sum(-1)
        better = error < least
        least, factor = torch.where(better, error, least), torch.where(better, tried, factor)
        kept = torch.where(better[..., None], whole.to(torch.int8), kept)
    return kept.flatten(1), scale, factor.to(torch.int8)


def _filled(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """With zeros, to multiples of `rows` (0: as many as there are) and `columns`."""
    height = -len(matrix) % rows if rows else 0
    width = -matrix.shape[1] % columns
    return F.pad(matrix, (0, width, 0, height)) if height or width else matrix


def pack(plain: Weights) -> Weights:
    """Plain weights in the layout of the kernels."""
    if plain.packed:
        return plain
    unit = IN_UNIT[plain.format]
    matrix = _filled(plain.weight, _PANEL, _MULTIPLE[plain.format])
    inputs = matrix.shape[1]
    scale, bias = (
        None if row is None else _filled(row[None], 0, _PANEL)[0] for row in (plain.scale, plain.bias)
    )
    right, left = plain.right, plain.left
    if right is not None and left is not None:
        right = _filled(right, 0, _MULTIPLE[plain.format]).view(RANK, -1, 16).transpose(0, 1).contiguous()
        left = _filled(left, _PANEL, 1).view(-1, _PANEL, RANK).transpose(1, 2).contiguous()
        left = left.view(torch.uint8).view(-1, _LEFT_UNITS, _PANEL, 4)
    factor = plain.factor
    if plain.format == "int8":
        matrix = (matrix.to(torch.int16) + 128).to(torch.uint8)  # VNNI's first factor is unsigned
    if factor is not None:
        factor = _filled(factor, _PANEL, 1).view(-1, _PANEL, inputs // GROUP).transpose(1, 2)
        turned = factor < 0
        # Numbers of a negative factor are kept as those of a positive one: 7 - n in place of 8 + n.
        signs = (
            torch.where(turned, -1, 1)
            .to(torch.int8)
            .transpose(1, 2)
            .flatten(0, 1)
            .repeat_interleave(GROUP, 1)
        )
        matrix = (matrix * signs + torch.where(signs < 0, 7, 8)).to(torch.uint8)
        factor = torch.stack([factor.abs(), factor.abs() * turned], -1).contiguous()
        # [panel][8 inputs][half][32 features][4]: one byte holds an input of each half
        matrix = matrix.view(-1, _PANEL, inputs // 8, 2, 4).permute(0, 2, 3, 1, 4)
        matrix = matrix[:, :, 0] | (matrix[:, :, 1] << 4)
    else:
        matrix = matrix.view(-1, _PANEL, inputs // unit, unit).transpose(1, 2)
    if left is not None:
        matrix = torch.cat([matrix, left], 1)
    matrix = matrix.contiguous()
    return replace(
        plain, packed=True, weight=matrix, scale=scale, factor=factor, right=right, left=None, bias=bias
    )


def unpack(packed: Weights) -> Weights:
    """The plain weights that `pack` was given."""
    if not packed.packed:
        return packed
    N, K = packed.features, packed.inputs
    matrix, factor, right, left = packed.weight, packed.factor, packed.right, None
    if right is not None:
        matrix, left = matrix[:, :-_LEFT_UNITS], matrix[:, -_LEFT_UNITS:]
        left = left.contiguous().view(torch.bfloat16).view(-1, RANK, _PANEL)
        left = left.transpose(1, 2).flatten(0, 1)[:N].contiguous()
        right = right.transpose(0, 1).flatten(1)[:, :K].contiguous()
    if factor is not None:
        halves = torch.stack([matrix & 15, matrix >> 4], 2)  # [panel][8 inputs][half][32 features][4]
        matrix = halves.permute(0, 3, 1, 2, 4).to(torch.int8).reshape(-1, factor.shape[1], GROUP)
        signs = (
            torch.where(factor[..., 1] > 0, -1, 1).to(torch.int8).transpose(1, 2).flatten(0, 1)
        )  # (N, groups)
        matrix = (matrix - torch.where(signs < 0, 7, 8)[..., None]).to(torch.int8) * signs[..., None]
        factor = (factor[..., 0].transpose(1, 2).flatten(0, 1) * signs)[:N].contiguous()
    else:
        matrix = matrix.transpose(1, 2)
        if packed.format == "int8":
            matrix = (matrix.to(torch.int16) - 128).to(torch.int8)
    width = K if packed.format in ("fp32", "bf16") else -(-K // _MIXED) * _MIXED
    plain = matrix.reshape(-(-N // _PANEL) * _PANEL, -1)[:N, :width].contiguous()
    scale, bias = (None if row is None else row[:N] for row in (packed.scale, packed.bias))
    return replace(
        packed, packed=False, weight=plain, scale=scale, factor=factor, right=right, left=left, bias=bias
    )


def floats(plain: Weights) -> Tensor:
    """The matrix (N, K) that plain weights stand for, fp32 for quantised ones."""
    if plain.scale is None:
        return plain.weight
    matrix = mixed(stored_floats(plain))[:, : plain.inputs]
    if plain.right is None or plain.left is None:
        return matrix
    right = plain.right.float()
    return matrix + (plain.left.float() - matrix @ right.T) @ right


def stored_floats(plain: Weights) -> Tensor:
    """Of mixed inputs, what is stored as whole numbers, where the weights are quantised; else the matrix."""
    if plain.scale is None:
        return plain.weight
    whole = plain.weight.float()
    if plain.factor is not None:
        whole = whole * plain.factor.repeat_interleave(GROUP, 1)
    return whole * plain.scale[:, None]
