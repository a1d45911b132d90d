"""What is computed a second time is counted once, and gives the same gradients."""

from __future__ import annotations

from dataclasses import replace

import torch

from muster.model.presets import PRESETS
from muster.model.transformer import Transformer
from muster.parallel import recompute

SPEC = replace(
    PRESETS["mixtral-8x7b"], layers=2, width=32, heads=4, kv_heads=2, head_dim=8, expert_ffn=16, vocab=64, context=32
)  # fmt: skip


def test_the_load_of_recomputed_experts_is_counted_once() -> None:
    tokens, targets = torch.randint(0, SPEC.vocab, (2, 2, 16))
    loads, gradients = [], []
    for kind in ("none", "full"):
        model = Transformer(SPEC)
        model.init_weights(0)
        for block in model.blocks:
            block.mlp.aux_scale = 0.1  # type: ignore[union-attr]
        recompute.apply(model, kind)
        model(tokens, targets).backward()
        loads.append([block.mlp.load.tolist() for block in model.blocks])  # type: ignore[union-attr]
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert loads[0] == loads[1]
    assert [sum(load) for load in loads[0]] == [2 * 16 * 2] * 2
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)
