"""A tiny transformer whose every option differs from the trivial: grouped heads, odd sizes, untied."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer


@pytest.fixture
def spec() -> TransformerSpec:
    return TransformerSpec(
        family="llama",
        layers=3,
        width=48,
        heads=6,
        kv_heads=2,
        head_dim=10,
        ffn=72,
        vocab=101,
        context=64,
        tied=False,
    )


@pytest.fixture
def gpt2() -> TransformerSpec:
    return TransformerSpec(
        family="gpt2",
        layers=2,
        width=24,
        heads=3,
        kv_heads=3,
        head_dim=8,
        ffn=40,
        vocab=101,
        context=64,
        tied=True,
        norm="layer",
        positions="learned",
        mlp="gelu",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )


@pytest.fixture
def make() -> Callable[[TransformerSpec], Transformer]:
    return _make


@pytest.fixture
def model(spec: TransformerSpec) -> Transformer:
    return _make(spec)


def _make(spec: TransformerSpec) -> Transformer:
    """Weights large enough that attending to a wrong token shows in the logits."""
    model = Transformer(spec)
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(8)
    return model
