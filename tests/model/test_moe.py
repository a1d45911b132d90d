"""Mixture of experts: the layer against a token-by-token loop, its balance, its counts, its names and sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from muster.model import grouped
from muster.model.balance import sequence_balance_loss, update_bias
from muster.model.folder import load_folder, save_folder
from muster.model.generate import generate
from muster.model.moe import MoE
from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer, initial_value, materialize, named_tensors

SOFTMAX = {"ffn": 0, "experts": 6, "experts_per_token": 2, "expert_ffn": 24}
SIGMOID = SOFTMAX | {
    "experts_per_token": 3,
    "shared_ffn": 24,
    "router": "sigmoid",
    "router_bias": True,
    "router_renormalize": True,
}


def sparse(spec: TransformerSpec, **options: object) -> TransformerSpec:
    return replace(spec, **options)  # type: ignore[arg-type]


def layer(spec: TransformerSpec) -> MoE:
    torch.manual_seed(0)
    moe = MoE(spec)
    with torch.no_grad():
        for tensor in (*moe.parameters(), *moe.buffers()):
            tensor.normal_(0, 0.3)
    return moe


def token_by_token(moe: MoE, x: Tensor) -> Iterator[Tensor]:
    for token in x.flatten(0, 1):
        logits = moe.router.weight @ token
        scores = logits.softmax(0) if moe.shared is None else logits.sigmoid()
        preference = scores if moe.router.bias is None else scores + moe.router.bias
        chosen = preference.argsort(descending=True)[: moe.router.experts_per_token].tolist()
        total = sum(scores[index] for index in chosen) if moe.router.renormalize else 1.0
        out = torch.zeros_like(token) if moe.shared is None else moe.shared(token)
        for index in chosen:
            hidden = F.silu(moe.experts.gate[index] @ token) * (moe.experts.up[index] @ token)
            out = out + scores[index] / total * (moe.experts.down[index] @ hidden)
        yield out


@pytest.mark.parametrize("options", [SOFTMAX, SOFTMAX | {"router_renormalize": True}, SIGMOID], ids=str)
@pytest.mark.parametrize("expert_ffn", [24, 23])  # whole 16 bytes a row, and not
def test_output_and_gradients_equal_a_loop_over_tokens(
    spec: TransformerSpec, options: dict[str, object], expert_ffn: int
) -> None:
    moe = layer(sparse(spec, **(options | {"expert_ffn": expert_ffn})))
    x = torch.randn(2, 9, spec.width, requires_grad=True)
    seed = torch.randn(2, 9, spec.width)
    sources = [x, *moe.parameters()]
    ours, reference = moe(x), torch.stack(list(token_by_token(moe, x))).view_as(x)
    torch.testing.assert_close(ours, reference)
    for mine, theirs in zip(
        torch.autograd.grad(ours, sources, seed), torch.autograd.grad(reference, sources, seed), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_groups_of_rounded_sizes_change_nothing(
    spec: TransformerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = layer(sparse(spec, **SOFTMAX)).bfloat16()
    rows = torch.randn(400, spec.width, dtype=torch.bfloat16, requires_grad=True)
    counts = torch.tensor([1, 0, 33, 64, 300, 2])
    seed = torch.randn_like(rows)
    assert grouped.few_sizes_pay(rows, counts)
    assert not grouped.few_sizes_pay(rows.float(), counts)
    sources = [rows, *moe.experts.parameters()]
    rounded = moe.experts(rows, counts)
    gradients = torch.autograd.grad(rounded, sources, seed)
    monkeypatch.setattr(grouped, "few_sizes_pay", lambda *_: False)
    exact = moe.experts(rows, counts)
    torch.testing.assert_close(rounded, exact)
    for mine, theirs in zip(gradients, torch.autograd.grad(exact, sources, seed), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 8, 0], [0, 0, 0]])
def test_grouped_linear_equals_a_loop(counts: list[int], dtype: torch.dtype) -> None:
    rows = torch.randn(sum(counts), 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(3, 24, 16, dtype=dtype, requires_grad=True)
    out = grouped.linear(rows, weight, torch.tensor(counts))
    parts = zip(torch.split(rows, counts), weight.unbind(), strict=True)
    expected = torch.cat([F.linear(part, matrix) for part, matrix in parts])
    torch.testing.assert_close(out, expected)
    seed = torch.randn_like(out)
    for mine, theirs in zip(
        torch.autograd.grad(out, [rows, weight], seed),
        torch.autograd.grad(expected, [rows, weight], seed),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_load_counts_tokens_once(spec: TransformerSpec) -> None:
    moe = layer(sparse(spec, **SOFTMAX))
    x = torch.randn(3, 7, spec.width, requires_grad=True)
    _, chosen = moe.router.choose(moe.router(x))
    moe(x)
    assert moe.load.tolist() == chosen.flatten().bincount(minlength=6).tolist()
    moe(x)
    assert int(moe.load.sum()) == 2 * 3 * 7 * 2
    with torch.no_grad():
        moe(x)
    assert int(moe.load.sum()) == 2 * 3 * 7 * 2, "an evaluation is not part of a step's load"
    moe.reset_load()
    moe.counting = False
    moe(x)
    assert int(moe.load.sum()) == 0


def test_balance_loss_is_that_of_the_paper(spec: TransformerSpec) -> None:
    """DeepSeek-V3, equations 17 to 20, written out for each sequence."""
    experts, per_token, length = 6, 2, 11
    scores = torch.rand(3, length, experts)
    chosen = scores.topk(per_token, dim=-1).indices
    counts = F.one_hot(chosen, experts).sum((1, 2))
    expected = 0.0
    for sequence, ids in zip(scores, chosen, strict=True):
        for expert in range(experts):
            f = experts / (per_token * length) * float((ids == expert).any(-1).sum())
            p = float((sequence[:, expert] / sequence.sum(-1)).mean())
            expected += length * f * p
    assert float(sequence_balance_loss(scores, counts)) == pytest.approx(expected, rel=1e-5)


def _router_gradient(moe: MoE, x: Tensor) -> Tensor:
    out = moe(x)
    (gradient,) = torch.autograd.grad(out, [moe.router.weight], torch.zeros_like(out))
    return gradient


@pytest.mark.parametrize("options", [SOFTMAX, SIGMOID], ids=str)
def test_auxiliary_gradient_reaches_the_router_through_the_activations(
    spec: TransformerSpec, options: dict[str, object]
) -> None:
    moe = layer(sparse(spec, **options))
    x = torch.randn(2, 9, spec.width)
    plain = moe(x)
    assert not _router_gradient(moe, x).any()
    moe.aux_scale = 0.25
    assert torch.equal(moe(x), plain)
    scores = moe.router(x)
    _, chosen = moe.router.choose(scores)
    loss = 0.25 * sequence_balance_loss(scores, F.one_hot(chosen, 6).sum((1, 2)))
    (expected,) = torch.autograd.grad(loss, [moe.router.weight])
    torch.testing.assert_close(_router_gradient(moe, x), expected)
    recomputed = checkpoint(moe, x.requires_grad_(), use_reentrant=False)
    (again,) = torch.autograd.grad(recomputed, [moe.router.weight], torch.zeros_like(recomputed))
    torch.testing.assert_close(again, expected)


def test_auxiliary_gradient_does_not_depend_on_how_sequences_are_spread(spec: TransformerSpec) -> None:
    moe = layer(sparse(spec, **SOFTMAX))
    moe.aux_scale = 0.1
    x = torch.randn(4, 8, spec.width)
    whole = _router_gradient(moe, x)
    microbatches = sum((_router_gradient(moe, part) for part in x.split(1)), torch.zeros_like(whole))
    torch.testing.assert_close(microbatches, whole)
    # Halves of each sequence, with the counts of the whole, as context parallelism has them.
    _, chosen = moe.router.choose(moe.router(x))
    counts = F.one_hot(chosen, 6).sum((1, 2))
    moe.sum_over_sequence = lambda _: counts
    halves = sum((_router_gradient(moe, part) for part in x.split(4, dim=1)), torch.zeros_like(whole))
    torch.testing.assert_close(halves, whole)


def test_bias_moves_towards_the_idle_experts(spec: TransformerSpec) -> None:
    bias = torch.zeros(4)
    update_bias(bias, torch.tensor([10, 0, 5, 5]), 0.1)
    assert bias.tolist() == pytest.approx([-0.1, 0.1, 0.0, 0.0])
    moe = layer(sparse(spec, **SIGMOID))
    assert moe.router.bias is not None
    moe.router.bias.zero_()
    torch.nn.init.normal_(moe.router.weight, 0.1, 0.1)
    x = torch.randn(8, 64, spec.width)

    def unevenness() -> float:
        moe.reset_load()
        moe(x)
        return float(moe.load.max() / moe.load.double().mean())

    before = unevenness()
    for _ in range(100):
        unevenness()
        update_bias(moe.router.bias, moe.load, 0.01)
    assert unevenness() < min(1.1, before)


def test_names_shapes_and_initial_values(spec: TransformerSpec) -> None:
    shape = sparse(spec, **SIGMOID)
    model = Transformer(shape)
    model.init_weights(3)
    found = {name: tensor for name, tensor in named_tensors(model) if name.startswith("layers.0.mlp.")}
    assert {name.removeprefix("layers.0.mlp."): tuple(tensor.shape) for name, tensor in found.items()} == {
        "router.weight": (6, 48),
        "router.bias": (6,),
        "experts.gate": (6, 24, 48),
        "experts.up": (6, 24, 48),
        "experts.down": (6, 48, 24),
        "shared.gate.weight": (24, 48),
        "shared.up.weight": (24, 48),
        "shared.down.weight": (48, 24),
    }
    stds = dict.fromkeys(("router.weight", "experts.gate", "experts.up", "shared.up.weight"), 0.02)
    stds |= dict.fromkeys(("experts.down", "shared.down.weight"), 0.02 / 6**0.5)
    for name, std in stds.items():
        assert float(found[f"layers.0.mlp.{name}"].detach().std()) == pytest.approx(std, rel=0.1), name
    assert not found["layers.0.mlp.router.bias"].any()


def test_only_the_chosen_experts_count_as_work(spec: TransformerSpec) -> None:
    two, more = sparse(spec, **SOFTMAX), sparse(spec, **(SOFTMAX | {"experts": 60}))
    routers = 6 * 54 * spec.width * spec.layers
    assert more.flops_per_token(64) - two.flops_per_token(64) == routers
    dense = replace(spec, ffn=2 * 24)
    assert two.flops_per_token(64) - dense.flops_per_token(64) == 6 * 6 * spec.width * spec.layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_stays_fp32_and_survives_a_folder(
    spec: TransformerSpec, tmp_path: Path, dtype: torch.dtype
) -> None:
    shape = sparse(spec, **SIGMOID, family="dots1", qk_norm=True, norm_eps=1e-6)
    model = materialize(shape, lambda name, size: initial_value(name, size, shape, 1))
    for buffer in model.buffers():
        buffer.normal_()
    save_folder(dict(named_tensors(model)), shape, tmp_path / "out", dtype=torch.float32, bos_id=1, eos_id=2)
    loaded = load_folder(tmp_path / "out", dtype=dtype)
    for (name, ours), (_, theirs) in zip(named_tensors(model), named_tensors(loaded), strict=True):
        assert theirs.dtype == (torch.float32 if "bias" in name else dtype)
        assert torch.equal(ours.to(theirs.dtype), theirs), name


def test_cached_generation_equals_recomputing(spec: TransformerSpec, make: object) -> None:
    model = make(sparse(spec, **SIGMOID))  # type: ignore[operator]
    tokens = torch.randint(0, spec.vocab, (2, 5))
    continued = generate(model, tokens, 12)
    for length in range(5, 17):
        assert torch.equal(model(continued[:, :length])[:, -1].argmax(-1), continued[:, length])


def test_training_step_in_bf16(spec: TransformerSpec) -> None:
    model = Transformer(sparse(spec, **SOFTMAX))
    model.init_weights(0)
    tokens, targets = torch.randint(0, spec.vocab, (2, 2, 33))
    exact = model(tokens, targets)
    model.bfloat16()
    loss = model(tokens, targets)
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=5e-3, atol=0)
    assert isinstance(model.layers["0"].mlp, nn.Module)
    assert all(parameter.grad is not None for parameter in model.parameters())
