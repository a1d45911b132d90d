"""Expert parallelism equals one process: outputs, and the gradients of inputs, router and experts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from muster.model.moe import MoE
from muster.model.spec import TransformerSpec
from muster.model.transformer import named_tensors
from muster.parallel.expert import ExpertExchange, divide
from muster.parallel.world import join
from tests.conftest import RunRanks

EXPERTS, WIDTH, ROWS, TOKENS = 8, 32, 8, 6
SPEC = TransformerSpec(
    family="dots1", layers=1, width=WIDTH, heads=4, kv_heads=2, head_dim=8, ffn=0, vocab=64, context=32, tied=True,
    experts=EXPERTS, experts_per_token=2, expert_ffn=24, shared_ffn=24, router="sigmoid", router_renormalize=True,
    router_bias=True,
)  # fmt: skip
LOADS: dict[str, list[float]] = {
    "uneven": [0.0] * EXPERTS,
    # The bias decides the choice: nothing for most experts, and so no rows at all for some ranks.
    "two experts": [50.0, 0, 0, 0, 0, 0, 50.0, 0],
    "one rank": [0, 0, 0, 0, 0, 0, 50.0, 50.0],
}


def layer(load: str, experts: int = EXPERTS) -> MoE:
    torch.manual_seed(0)
    moe = MoE(replace(SPEC, experts=experts))
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(0, 0.3)
        assert moe.router.bias is not None
        moe.router.bias.copy_(torch.tensor(LOADS[load][:experts]))
    return moe


def batch() -> tuple[Tensor, Tensor]:
    """Inputs (B, T, E), and the gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, ROWS, TOKENS, WIDTH, generator=generator).unbind()  # type: ignore[return-value]


Arrays = dict[str, np.ndarray]
"""What a rank sends back: a pipe takes arrays whole, and tensors not once their process is gone."""


def run(moe: MoE, x: Tensor, seed: Tensor, ranks: int = 1) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = moe(x)
    out.backward(seed * ranks)  # as FSDP2 averages
    return {"output": out.detach(), "input": x.grad} | gradients(moe)  # type: ignore[dict-item]


def gradients(moe: MoE) -> dict[str, Tensor]:
    return {name: p.grad for name, p in moe.named_parameters() if p.grad is not None}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reference(load: str, experts: int = EXPERTS, aux: float = 0.0) -> dict[str, Tensor]:
    moe = layer(load, experts)
    moe.aux_scale = aux
    return run(moe, *batch())


def joined(results: list[Arrays], divided: list[str]) -> dict[str, Tensor]:
    """The first rank's arrays, and for those that are divided over the ranks all of them."""
    parts = {name: [result[name] for result in results] for name in divided}
    first = {name: torch.from_numpy(value) for name, value in results[0].items()}
    return first | {name: torch.from_numpy(np.concatenate(part)) for name, part in parts.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = float((found[name] - value).abs().max() / value.abs().max())
        assert error <= 1e-6, f"{name}: {error:.1e}"


def spread(ranks: int, load: str) -> Arrays:
    """The layer over an expert axis alone; what a rank has of its own rows, and sums over ranks of the rest."""
    with join():
        rank = dist.get_rank()
        moe = layer(load)
        moe.exchange = ExpertExchange(dist.group.WORLD, EXPERTS)  # type: ignore[arg-type]
        own = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
        for name, parameter in list(moe.experts.named_parameters()):
            setattr(moe.experts, name, torch.nn.Parameter(parameter[own].detach().clone()))
        x, seed = batch()
        rows = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
        found = run(moe, x[rows], seed[rows], ranks)
        found["input"] /= ranks
        for name, value in found.items():
            if name.startswith(("router", "shared")):
                dist.all_reduce(value)
                value /= ranks
        return {name: value.numpy() for name, value in found.items()}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_expert_axis_equals_one_process(run_ranks: RunRanks, ranks: int, load: str) -> None:
    results = run_ranks(ranks, spread, ranks, load)
    expected = reference(load)
    counts = layer(load)
    counts(batch()[0])
    assert len(set(counts.load.tolist())) > 1
    divided = [name for name in expected if name in ("output", "input") or name.startswith("experts")]
    assert_equal(joined(results, divided), expected)


def sharded(ranks: int, axis: int, load: str, experts: int, aux: float) -> Arrays:
    """Experts over `axis` ranks and FSDP2 over the others; everything else on FSDP2 over all."""
    with join() as world:
        dense = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
        sparse = init_device_mesh("cpu", (ranks // axis, axis), mesh_dim_names=("shard", "expert"))
        source = dict(layer(load, experts).state_dict())
        moe = layer(load, experts).to("meta")
        divide(moe, sparse["expert"])
        fully_shard(moe.experts, mesh=sparse["shard"])
        fully_shard(moe, mesh=dense)
        fill(moe, source)
        moe.aux_scale = aux * ranks
        x, seed = batch()
        rows = slice(world.rank * ROWS // ranks, (world.rank + 1) * ROWS // ranks)
        found = run(moe, x[rows], seed[rows], ranks)
        found["input"] /= ranks
        return {name: whole(value).numpy() for name, value in found.items()}


def fill(moe: MoE, source: dict[str, Tensor]) -> None:
    moe.to_empty(device="cpu")
    for name, tensor in named_tensors(moe):
        own = tensor.detach()
        if isinstance(own, DTensor):
            [chunk] = own.__create_chunk_list__()  # type: ignore[no-untyped-call]
            part = [
                slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
            ]
            own.to_local().copy_(source[name][tuple(part)])
        else:
            own.copy_(source[name])


@pytest.mark.parametrize(
    ("ranks", "axis", "load", "experts", "aux"),
    [
        (2, 2, "uneven", 8, 0.1),
        (4, 2, "uneven", 8, 0.0),
        (4, 4, "one rank", 8, 0.1),
        (4, 2, "uneven", 6, 0.1),  # three experts of a rank over two shards
        (4, 2, "uneven", 2, 0.1),  # one
    ],
)
def test_with_fsdp_one_scale_of_the_loss_is_right_for_all_parameters(
    run_ranks: RunRanks, ranks: int, axis: int, load: str, experts: int, aux: float
) -> None:
    results = run_ranks(ranks, sharded, ranks, axis, load, experts, aux)
    assert_equal(joined(results, ["output", "input"]), reference(load, experts, aux))


def with_tensor_axis() -> Arrays:
    """Two ranks of the expert axis, each expert's hidden width divided over two of the tensor axis."""
    with join() as world:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("expert", "tensor"))
        source = dict(layer("uneven").state_dict())
        moe = layer("uneven").to("meta")
        divide(moe, mesh)
        fill(moe, source)
        moe.shared = None
        x, seed = batch()
        half = slice(world.rank // 2 * ROWS // 2, (world.rank // 2 + 1) * ROWS // 2)
        found = run(moe, x[half], seed[half], 2)
        found["input"] /= 2
        for name in ("output", "input"):
            dist.all_reduce(found[name], group=mesh.get_group("tensor"))
        return {
            name: whole(found[name]).numpy()
            for name in ("output", "input", "experts.gate", "experts.up", "experts.down")
        }


def test_an_expert_can_be_divided_over_a_tensor_axis(run_ranks: RunRanks) -> None:
    results = run_ranks(4, with_tensor_axis)
    moe = layer("uneven")
    moe.shared = None
    expected = run(moe, *batch())
    found = joined(results[::2], ["output", "input"])
    assert_equal(found, {name: expected[name] for name in found})


def test_experts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="7 experts cannot be divided evenly over 2 ranks"):
        ExpertExchange(TwoRanks(), 7)  # type: ignore[arg-type]


class TwoRanks:
    def size(self) -> int:
        return 2
