"""The transformer as a whole: packing, loss, initial values, and that it can be made on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from muster.model.loss import IGNORED
from muster.model.rope import rotation
from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer, initial_value, materialize

Make = Callable[[TransformerSpec], Transformer]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"tied": True},
    {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    {"qk_norm": True},
    {"window": 5},
    {"ffn": 0, "experts": 6, "experts_per_token": 2, "expert_ffn": 24, "router_renormalize": True},
    {
        "ffn": 0, "experts": 5, "experts_per_token": 3, "expert_ffn": 20, "shared_ffn": 20, "router": "sigmoid",
        "router_bias": True,
    },
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_packed_documents_equal_separate_ones(
    make: Make, spec: TransformerSpec, options: dict[str, Any], grad: bool
) -> None:
    model = make(replace(spec, **options))
    torch.manual_seed(0)
    tokens = torch.randint(0, spec.vocab, (2, 40))
    borders = [[0, 1, 13, 40], [0, 27, 28, 40]]
    documents = torch.zeros(2, 40, dtype=torch.int32)
    for row, border in enumerate(borders):
        for index, start in enumerate(border[:-1]):
            documents[row, start:] = index
    with torch.set_grad_enabled(grad):
        packed = model(tokens, documents=documents)
        for row, border in enumerate(borders):
            for start, stop in pairwise(border):
                alone = model(tokens[row : row + 1, start:stop])
                torch.testing.assert_close(packed[row : row + 1, start:stop], alone, atol=1e-4, rtol=0)


def test_learned_positions_start_over_in_each_document(make: Make, gpt2: TransformerSpec) -> None:
    model = make(gpt2)
    tokens = torch.randint(0, gpt2.vocab, (1, 30))
    documents = torch.tensor([[4] * 11 + [7] * 19], dtype=torch.int32)
    packed = model(tokens, documents=documents)
    torch.testing.assert_close(packed[:, :11], model(tokens[:, :11]), atol=1e-4, rtol=0)
    torch.testing.assert_close(packed[:, 11:], model(tokens[:, 11:]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_the_summed_cross_entropy_of_the_logits(
    make: Make, spec: TransformerSpec, tied: bool
) -> None:
    model = make(replace(spec, tied=tied))
    tokens, targets = torch.randint(0, spec.vocab, (2, 2, 33))
    targets[0, :7] = IGNORED
    names = dict(model.named_parameters())
    loss = model(tokens, targets)
    ours = torch.autograd.grad(loss, list(names.values()))
    reference = F.cross_entropy(
        model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    theirs = torch.autograd.grad(reference, list(names.values()))
    torch.testing.assert_close(loss, reference)
    for name, mine, other in zip(names, ours, theirs, strict=True):
        scale = float(other.abs().max())
        assert float((mine - other).abs().max()) <= 1e-5 * scale, name


def test_bf16_loss_is_near_the_fp32_one(spec: TransformerSpec) -> None:
    model = Transformer(spec)
    model.init_weights(0)
    tokens, targets = torch.randint(0, spec.vocab, (2, 2, 33))
    exact = model(tokens, targets)
    rounded = model.bfloat16()(tokens, targets)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=5e-3, atol=0)


def test_initial_values_depend_on_seed_and_name_alone(spec: TransformerSpec) -> None:
    model = Transformer(spec)
    torch.manual_seed(1)
    model.init_weights(3)
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(2)
    for name in reversed(list(values)):
        assert torch.equal(initial_value(name, values[name].shape, spec, 3), values[name])
    assert not torch.equal(
        initial_value("embed.weight", values["embed.weight"].shape, spec, 4), values["embed.weight"]
    )
    assert not torch.equal(values["layers.0.mlp.up.weight"], values["layers.1.mlp.up.weight"])
    assert float(values["embed.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(values["layers.0.mlp.down.weight"].std()) == pytest.approx(0.02 / 6**0.5, rel=0.05)
    assert bool((values["norm.weight"] == 1).all())


def test_made_on_meta_and_filled_equals_made_directly(spec: TransformerSpec) -> None:
    direct = Transformer(spec)
    direct.init_weights(5)
    filled = materialize(spec, lambda name, shape: initial_value(name, shape, spec, 5))
    tokens = torch.randint(0, spec.vocab, (1, 17))
    assert torch.equal(filled(tokens), direct(tokens))
    assert not list(filled.buffers()), "a buffer would be left unfilled"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_parameters_are_counted_right(spec: TransformerSpec, options: dict[str, Any]) -> None:
    counted = replace(spec, **options)
    with torch.device("meta"):
        model = Transformer(counted)
    assert counted.parameters() == sum(parameter.numel() for parameter in model.parameters())


def test_gpt2_parameters_are_counted_right(gpt2: TransformerSpec) -> None:
    with torch.device("meta"):
        model = Transformer(gpt2)
    assert gpt2.parameters() == sum(parameter.numel() for parameter in model.parameters())


def test_parameter_names(spec: TransformerSpec) -> None:
    with torch.device("meta"):
        names = {
            name
            for name, _ in Transformer(
                replace(spec, layers=1, qkv_bias=True, qk_norm=True)
            ).named_parameters()
        }
    block = {f"attention.{name}.weight" for name in "qkvo"} | {f"attention.{name}.bias" for name in "qkv"}
    block |= {
        "attention.q_norm.weight",
        "attention.k_norm.weight",
        "attention_norm.weight",
        "mlp_norm.weight",
    }
    block |= {f"mlp.{name}.weight" for name in ("gate", "up", "down")}
    assert names == {f"layers.0.{name}" for name in block} | {"embed.weight", "norm.weight", "head.weight"}


def test_flops(spec: TransformerSpec) -> None:
    multiplied = spec.parameters() - spec.vocab * spec.width  # the embedding is looked up
    attention = 6 * spec.layers * 64 * spec.heads * spec.head_dim
    assert spec.flops_per_token(64) == 6 * multiplied + attention
    assert replace(spec, tied=True).flops_per_token(64) == 6 * multiplied + attention
    # Windowed: as many keys as the mask shows on average, twice.
    shown = sum(min(t + 1, 16) for t in range(64)) / 64
    windowed = (replace(spec, window=16).flops_per_token(64) - 6 * multiplied) / attention * 64
    assert windowed == pytest.approx(2 * shown, rel=0.02)


def test_training_after_inference_mode(spec: TransformerSpec) -> None:
    """Cached rotary tables made while serving must not break a backward pass."""
    rotation.cache_clear()
    model = Transformer(spec)
    model.init_weights(0)
    tokens = torch.randint(0, spec.vocab, (1, 21))
    with torch.inference_mode():
        model(tokens)
    model(tokens, tokens).backward()


@pytest.mark.parametrize("tied", [True, False])
def test_stretches_make_up_the_whole(spec: TransformerSpec, gpt2: TransformerSpec, tied: bool) -> None:
    for shape in (replace(spec, tied=tied, layers=3), replace(gpt2, tied=tied, layers=3)):
        whole = Transformer(shape)
        whole.init_weights(seed=1)
        stretches = [Transformer(shape, layers) for layers in (range(2), range(2, 2), range(2, 3))]
        names = [name for stretch in stretches for name, _ in stretch.named_parameters()]
        assert set(names) == {name for name, _ in whole.named_parameters()}
        assert len(names) - len(set(names)) == tied  # embed.weight is in both ends
        x = tokens = torch.randint(0, shape.vocab, (2, 8))
        documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]]).expand(2, -1)
        for stretch in stretches:
            stretch.init_weights(seed=1)
            x = stretch(x, tokens, documents=documents)
        assert torch.equal(x, whole(tokens, tokens, documents=documents))
