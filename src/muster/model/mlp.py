"""The dense feed-forward block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from muster.model.spec import TransformerSpec


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020), or two matrices around tanh-approximated GELU."""

    def __init__(self, spec: TransformerSpec, ffn: int) -> None:
        super().__init__()
        self.gate = nn.Linear(spec.width, ffn, bias=spec.mlp_bias) if spec.mlp == "swiglu" else None
        self.up = nn.Linear(spec.width, ffn, bias=spec.mlp_bias)
        self.down = nn.Linear(ffn, spec.width, bias=spec.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)  # (B, T, F)
        hidden = F.gelu(up, approximate="tanh") if self.gate is None else F.silu(self.gate(x)) * up
        out: Tensor = self.down(hidden)
        return out
