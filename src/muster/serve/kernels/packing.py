"""Weights of linear layers in the formats that serving has, as plain matrices and in the layout of the kernels.

fp32, bf16   as they are
int8         whole numbers with a scale for each output feature: weight = number * scale
int4         -8..7 with a bf16 scale for each `GROUP` inputs of an output feature

Activations of int8 and int4 layers are rounded to 8 bits with a scale for each token when they are used. What rounding
costs depends on the numbers that stand out, so both sides are `mixed` first, which leaves their product as it is.
N output features, K inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Format = Literal["fp32", "bf16", "int8", "int4"]
FORMATS: tuple[Format, ...] = ("fp32", "bf16", "int8", "int4")

LAYOUT = "mixed-panels-of-32"
"""The kernels' layout: [panel of 32 features][inputs][32 features], a 32-bit unit of inputs (1 fp32, 2 bf16, 4 int8,
8 int4) at a time. Written into files of packed weights."""
GROUP = 32
_PANEL = 32
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
    """int8: (N,) fp32. int4 plain: (N, groups) bf16; packed: (panels, groups, 32)."""
    bias: Tensor | None = None
    """(N,) fp32."""

    def tensors(self) -> dict[str, Tensor]:
        """What there is, by name."""
        named = {"weight": self.weight, "scale": self.scale, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> Weights:
        """The same with each tensor replaced."""
        scale, bias = (None if tensor is None else function(tensor) for tensor in (self.scale, self.bias))
        return replace(self, weight=function(self.weight), scale=scale, bias=bias)


def quantize(weight: Tensor, bias: Tensor | None, format: Format) -> Weights:
    """A matrix (N, K) in a format, plain, by rounding to the nearest."""
    features, inputs = weight.shape
    bias = None if bias is None else bias.detach().float().contiguous()
    scale = None
    weight = weight.detach()
    if format == "int8":
        weight, scale = _to_int8(mixed(weight))
    elif format == "int4":
        weight, scale = _to_int4(mixed(weight))
    else:
        weight = weight.to(torch.float32 if format == "fp32" else torch.bfloat16).contiguous()
    return Weights(
        format=format, features=features, inputs=inputs, packed=False, weight=weight, scale=scale, bias=bias
    )


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


def _to_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    groups = weight.view(len(weight), -1, GROUP)
    # The number farthest from zero becomes -8, so that all sixteen values are used (as llama.cpp's q4_0).
    farthest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    scale = (farthest / -8).to(torch.bfloat16)
    inverse = torch.where(scale == 0, 0.0, 1 / scale.float())
    whole = torch.round(groups * inverse[..., None]).clamp_(-8, 7)
    return whole.to(torch.int8).flatten(1), scale


def _filled(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """With zeros, to multiples of `rows` (0: as many as there are) and `columns`."""
    height = -len(matrix) % rows if rows else 0
    width = -matrix.shape[1] % columns
    return F.pad(matrix, (0, width, 0, height)) if height or width else matrix


def pack(plain: Weights) -> Weights:
    """Plain weights in the layout of the kernels."""
    if plain.packed:
        return plain
    unit, scale = IN_UNIT[plain.format], plain.scale
    matrix = _filled(plain.weight, _PANEL, _MULTIPLE[plain.format])
    features, inputs = matrix.shape
    if plain.format == "int8":
        assert scale is not None
        matrix = (matrix.to(torch.int16) + 128).to(torch.uint8)  # VNNI's first factor is unsigned
        scale = _filled(scale[None], 0, _PANEL)[0]
    if plain.format == "int4":
        assert scale is not None
        matrix = (matrix + 8).to(torch.uint8)
        # [panel][8 inputs][half][32 features][4]: one byte holds an input of each half
        matrix = matrix.view(-1, _PANEL, inputs // 8, 2, 4).permute(0, 2, 3, 1, 4)
        matrix = matrix[:, :, 0] | (matrix[:, :, 1] << 4)
        scale = F.pad(scale, (0, 0, 0, features - len(scale)))
        scale = scale.view(-1, _PANEL, inputs // GROUP).transpose(1, 2).contiguous()
    else:
        matrix = matrix.view(-1, _PANEL, inputs // unit, unit).transpose(1, 2)
    bias = None if plain.bias is None else _filled(plain.bias[None], 0, _PANEL)[0]
    return replace(plain, packed=True, weight=matrix.contiguous(), scale=scale, bias=bias)


def unpack(packed: Weights) -> Weights:
    """The plain weights that `pack` was given."""
    if not packed.packed:
        return packed
    N, K = packed.features, packed.inputs
    matrix, scale = packed.weight, packed.scale
    if packed.format == "int4":
        assert scale is not None
        halves = torch.stack([matrix & 15, matrix >> 4], 2)  # [panel][8 inputs][half][32 features][4]
        matrix = halves.permute(0, 3, 1, 2, 4).to(torch.int8) - 8
        scale = scale.transpose(1, 2).flatten(0, 1)[:N].contiguous()
    else:
        matrix = matrix.transpose(1, 2)
        if packed.format == "int8":
            matrix = (matrix.to(torch.int16) - 128).to(torch.int8)
        scale = None if scale is None else scale[:N]
    width = K if packed.format in ("fp32", "bf16") else -(-K // _MIXED) * _MIXED
    plain = matrix.reshape(-(-N // _PANEL) * _PANEL, -1)[:N, :width].contiguous()
    bias = None if packed.bias is None else packed.bias[:N]
    return replace(packed, packed=False, weight=plain, scale=scale, bias=bias)


def floats(plain: Weights) -> Tensor:
    """The matrix (N, K) that plain weights stand for, fp32 for quantised ones."""
    stored = stored_floats(plain)
    return stored if plain.scale is None else mixed(stored)[:, : plain.inputs]


def stored_floats(plain: Weights) -> Tensor:
    """The same for mixed inputs, where the weights are quantised."""
    if plain.scale is None:
        return plain.weight
    if plain.format == "int8":
        return plain.weight.float() * plain.scale[:, None]
    return plain.weight.float() * plain.scale.float().repeat_interleave(GROUP, 1)
