"""Muon: against torch's on one process, and the same weights however its matrices are sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muster.config import schema
from muster.train.muon import orthogonalize
from muster.train.optimizer import make_optimizer
from tests.ranks.test_resume import EVERY_STEP, train_and_stop
from tests.toy import STEPS, tiny, train_here, write_corpus

LR, DECAY = 0.02, 0.1
MUON = schema.Optimizer(kind="muon", lr=LR, weight_decay=DECAY, momentum=0.9)


class Toy(nn.Module):
    """Parameters under the names of a model's; what they would compute does not matter."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).normal_(0, 0.02, generator=generator))

        self.embed = parameter(12, 8)
        self.layers = nn.ModuleDict({"0": nn.Module()})
        block = self.layers["0"]
        block.wide, block.tall, block.square = parameter(6, 10), parameter(10, 6), parameter(8, 8)
        block.bias = parameter(8)
        block.experts = parameter(4, 6, 8)
        block.router = nn.Linear(8, 4, bias=False)
        with torch.no_grad():
            block.router.weight.normal_(0, 0.02, generator=generator)


MATRICES = ("wide", "tall", "square", "experts")


def gradient(name: str, shape: torch.Size, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step * 1000 + sum(name.encode()))
    return torch.empty(shape).normal_(0, 1, generator=generator)


def test_singular_values_come_near_one() -> None:
    matrices = torch.stack([gradient("m", torch.Size((12, 20)), step) for step in range(3)])
    for x in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalize(x))
        assert values.shape == (3, 12)
        assert 0.6 < values.min() < values.max() < 1.3
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        cosine = (orthogonalize(x) * (u @ v)).sum((-2, -1)) / 12
        assert cosine.min() > 0.85  # near the orthogonal matrix next to x, whose length is sqrt(12)
    assert not orthogonalize(torch.zeros(1, 3, 4)).any()


@pytest.mark.parametrize(("compute", "tolerance"), [(torch.bfloat16, 1e-3), (torch.float32, 4e-2)])
def test_the_numbers_are_torchs(compute: torch.dtype, tolerance: float) -> None:
    """torch orthogonalises in bf16 whatever it is given, so fp32 can only come as near as bf16 is exact."""
    ours, theirs = Toy(), Toy()
    start = {name: p.detach().clone() for name, p in ours.named_parameters()}
    optimizer = make_optimizer(dict(ours.named_parameters()), MUON, compute=compute)
    named = dict(theirs.named_parameters())
    stack = named["layers.0.experts"]
    experts = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    matrices = [named[f"layers.0.{name}"] for name in MATRICES if name != "experts"] + experts
    muon = torch.optim.Muon(matrices, lr=LR, weight_decay=DECAY, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    rest = [p for name, p in named.items() if not name.endswith(MATRICES)]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": DECAY},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=LR,
        betas=MUON.betas,
        eps=MUON.eps,
        fused=True,
    )
    for step in range(5):
        for model in (ours, theirs):
            for name, p in model.named_parameters():
                p.grad = gradient(name, p.shape, step)
        for matrix, grad in zip(experts, stack.grad, strict=True):
            matrix.grad = grad
        optimizer.step(LR)
        muon.step()
        adamw.step()
    with torch.no_grad():
        stack.copy_(torch.stack(experts))
    for name, p in ours.named_parameters():
        if name.endswith(MATRICES):
            moved = (named[name] - start[name]).norm()
            assert (p - named[name]).norm() < tolerance * moved, name
        else:
            assert torch.equal(p, named[name]), name
    assert all(p.grad is None for p in ours.parameters())


def test_an_update_is_as_large_as_adamws() -> None:
    toy = Toy()
    before = toy.layers["0"].square.detach().clone()
    optimizer = make_optimizer(
        dict(toy.named_parameters()), schema.Optimizer(kind="muon", weight_decay=0.0), compute=torch.float32
    )
    for name, p in toy.named_parameters():
        p.grad = gradient(name, p.shape, 0)
    optimizer.step(1.0)
    rms = (toy.layers["0"].square - before).square().mean().sqrt()
    assert 0.15 < rms < 0.25


def test_state_is_named_by_what_it_is() -> None:
    state = make_optimizer(dict(Toy().named_parameters()), MUON, compute=torch.float32).state()
    moments = {"embed", "layers.0.bias", "layers.0.router.weight"}
    assert state.keys() == {f"momentum.layers.0.{name}" for name in MATRICES} | {
        f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in moments
    }


# Sharding


def toy_after_steps(mesh_shape: tuple[int, ...], dims: tuple[int | None, ...]) -> dict[str, Any]:
    """Weights after five steps of Muon on parameters sharded on `dims` by mesh axis."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from muster.parallel.world import join

    with join():
        mesh = init_device_mesh("cpu", mesh_shape)

        def spread(tensor: Tensor) -> Tensor:
            usable = [dim if dim is None or dim < tensor.ndim else 0 for dim in dims]
            placements = [Replicate() if dim is None else Shard(dim) for dim in usable]
            return distribute_tensor(tensor, mesh, placements, src_data_rank=None)

        toy = Toy()
        for module in toy.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(spread(p.detach())))
        optimizer = make_optimizer(dict(toy.named_parameters()), MUON, compute=torch.float32)
        for step in range(5):
            for name, p in toy.named_parameters():
                p.grad = spread(gradient(name, p.shape, step))
            optimizer.step(LR)
        return {name: p.full_tensor().detach().numpy() for name, p in toy.named_parameters()}


@pytest.mark.parametrize(
    ("mesh_shape", "dims"),
    [((2,), (0,)), ((4,), (0,)), ((2,), (None,)), ((2, 2), (None, 0)), ((2, 2), (0, 0)), ((2, 2), (0, 1))],
    ids=["shard 2", "shard 4", "replicate 2", "hybrid 2 x 2", "tensor rows", "tensor columns"],
)
def test_sharded_as_on_one_process(
    mesh_shape: tuple[int, ...], dims: tuple[int | None, ...], run_ranks: Any
) -> None:
    toy = Toy()
    optimizer = make_optimizer(dict(toy.named_parameters()), MUON, compute=torch.float32)
    for step in range(5):
        for name, p in toy.named_parameters():
            p.grad = gradient(name, p.shape, step)
        optimizer.step(LR)
    ranks = torch.Size(mesh_shape).numel()
    for weights in run_ranks(ranks, toy_after_steps, mesh_shape, dims):
        for name, p in toy.named_parameters():
            difference = (torch.from_numpy(weights[name]) - p).norm() / p.norm()
            assert difference < 1e-5, name


def test_below_fsdp_and_tensor_parallelism_at_once(run_ranks: Any) -> None:
    """Rows cut by the tensor axis first and by FSDP2 within those, the order that a plain DTensor does not have."""
    assert run_ranks(4, strided_differences) == [[]] * 4


def strided_differences() -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from muster.parallel.world import join

    def build() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.ModuleDict({"up": nn.Linear(8, 12, bias=False), "down": nn.Linear(12, 8, bias=False)})
        return nn.ModuleDict({"layers": layers})

    with join() as world:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
        plain, sharded = build(), build()
        layers = parallelize_module(
            sharded["layers"], mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()}
        )
        for layer in layers.values():
            fully_shard(layer, mesh=mesh["shard"])
        optimizers = [
            make_optimizer(dict(model.named_parameters()), MUON, compute=torch.float32)
            for model in (plain, sharded)
        ]
        for step in range(3):
            x = gradient("x", torch.Size((4, 8)), step)
            for model, mine in ((plain, x), (sharded, x.chunk(2)[world.rank // 2])):
                hidden = model["layers"]["up"](mine)
                loss = model["layers"]["down"](torch.relu(hidden)).square().sum()
                (loss * (2 if model is sharded else 1)).backward()  # FSDP2 averages over its two ranks
            for optimizer in optimizers:
                optimizer.step(LR)
        return [
            name
            for (name, p), q in zip(plain.named_parameters(), sharded.parameters(), strict=True)
            if (p - q.full_tensor()).norm() > 1e-5 * p.norm()
        ]


# Whole runs


def muon_run(**layout: int) -> dict[str, Any]:
    run = tiny(layout=layout, checkpoint=EVERY_STEP)
    run["train"] = run["train"] | {"optimizer": {"kind": "muon", "lr": 1e-3}}
    return run


def losses(metrics: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in metrics if "loss" in record]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def single(corpus: Path, run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("single") / "tiny"
    return losses(run_ranks(1, train_here, muon_run(), str(corpus), str(folder))[0])


@pytest.mark.parametrize(
    "layout", [{"shard": 2, "zero": 3}, {"replicate": 2}, {"replicate": 2, "shard": 2, "zero": 3}], ids=str
)
def test_same_curve_as_one_rank(
    layout: dict[str, int], corpus: Path, single: list[float], run_ranks: Any, tmp_path: Path
) -> None:
    ranks = layout.get("replicate", 1) * layout.get("shard", 1)
    metrics = run_ranks(ranks, train_here, muon_run(**layout), str(corpus), str(tmp_path / "tiny"))[0]
    assert losses(metrics) == pytest.approx(single, rel=1e-5)


def test_resumed_on_another_layout(corpus: Path, single: list[float], run_ranks: Any, tmp_path: Path) -> None:
    folder = str(tmp_path / "tiny")
    run_ranks(2, train_and_stop, muon_run(shard=2, zero=3), str(corpus), folder, STEPS // 2)
    metrics = run_ranks(1, train_here, muon_run(), str(corpus), folder)[0]
    assert losses(metrics) == pytest.approx(single, rel=1e-5)
