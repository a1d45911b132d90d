"""A step sends over every axis of a layout what the formulas say: the same calls and bytes, on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from muster.comm.axes import Routed
from muster.comm.meter import Meter
from muster.comm.traffic import Traffic
from muster.model.moe import Experts
from muster.model.spec import TransformerSpec
from muster.model.transformer import initial_value
from muster.parallel.catalogue import AXES
from muster.parallel.expert import ExpertExchange
from muster.parallel.inputs import Inputs
from muster.parallel.layout import Layout
from muster.parallel.mesh import Mesh
from muster.parallel.model import ParallelModel
from muster.parallel.schedules import SCHEDULES
from muster.parallel.traffic import expected_traffic
from muster.parallel.world import join

SEQUENCE = 16
LLAMA = TransformerSpec(
    family="llama",
    layers=2,
    width=32,
    heads=8,
    kv_heads=4,
    head_dim=4,
    ffn=48,
    vocab=65,  # divides by nothing, as vocabularies may
    context=SEQUENCE,
    tied=False,
)
TIED = replace(LLAMA, tied=True, layers=4)
GPT2 = replace(
    TIED, family="gpt2", kv_heads=8, norm="layer", positions="learned", mlp="gelu",
    qkv_bias=True, out_bias=True, mlp_bias=True,
)  # fmt: skip
SHARED_HEADS = replace(LLAMA, family="qwen3", kv_heads=1, qkv_bias=True, out_bias=True, qk_norm=True)
MIXTRAL = replace(LLAMA, family="mixtral", ffn=0, experts=8, experts_per_token=2, expert_ffn=24)
DOTS = replace(MIXTRAL, family="dots1", shared_ffn=24, router="sigmoid", router_bias=True, qk_norm=True)
FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True, slots=True)
class Case:
    spec: TransformerSpec
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the layout."""
    compute: torch.dtype = FP32
    documents: bool = False
    balance: float = 0.0


def layout_of(degrees: dict[str, Any], case: Case) -> Layout:
    given = {"replicate": 1, "shard": 1, "zero": 0, "microbatch": 2, "accumulate": 2, "recompute": "none"}
    given |= {"sequence_parallel": "tensor" in degrees, "reason": ""} | degrees | case.changes
    if "pipeline" in degrees:
        given["virtual"] = SCHEDULES[given.get("schedule", "1f1b")].stages_per_rank
    return Layout(**given)


def measured_and_expected(degrees: dict[str, Any], cases: list[Case]) -> list[tuple[Traffic, Traffic]]:
    with join() as world:
        # One for all cases: torch takes meshes of the same ranks for one another, and so may use another's groups.
        mesh = Mesh(layout_of(degrees, cases[0]), world.device)
        found = []
        for case in cases:
            mesh.layout = layout_of(degrees, case)
            routed: list[Tensor] = []
            measured = measure(mesh, case, routed)
            expected = expected_traffic(
                case.spec,
                mesh.layout,
                world.rank,
                sequence=SEQUENCE,
                compute=case.compute,
                balance_loss=case.balance > 0,
                routed=list(exchanges(mesh, case, routed)),
            )
            found.append((measured, expected))
        return found


def measure(mesh: Mesh, case: Case, routed: list[Tensor]) -> Traffic:
    """The traffic of a step; of a pipeline's second, because the first begins with a handshake."""
    model = ParallelModel(
        case.spec,
        mesh,
        sequence=SEQUENCE,
        compute=case.compute,
        value=lambda name, shape: initial_value(name, shape, case.spec, 0),
    )
    batch = list(microbatches(mesh, case))
    if mesh.layout.pipeline > 1:
        model.train(batch, 0.01, case.balance)
    with Meter(mesh.groups) as meter, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExpertExchange, "__call__", recording(routed))
        model.train(batch, 0.01, case.balance)
    return meter.traffic


def microbatches(mesh: Mesh, case: Case) -> Iterator[Inputs]:
    generator = torch.Generator().manual_seed(mesh.data_index)
    for index in range(mesh.layout.accumulate):
        shape = (mesh.layout.microbatch, SEQUENCE)
        tokens, targets = (torch.randint(0, case.spec.vocab, shape, generator=generator) for _ in range(2))
        documents = (torch.arange(SEQUENCE) // 5).int().expand(shape) if case.documents and index else None
        yield Inputs(tokens, targets, documents)


def recording(routed: list[Tensor]) -> Any:
    """An exchange with experts that notes how many rows go to each rank."""
    exchange = ExpertExchange.__call__

    def call(self: ExpertExchange, experts: Experts, rows: Tensor, counts: Tensor) -> Tensor:
        routed.append(counts.view(self.ranks, -1).sum(1))
        return exchange(self, experts, rows, counts)

    return call


def exchanges(mesh: Mesh, case: Case, routed: list[Tensor]) -> Iterator[Routed]:
    """Those of the forward passes: full recomputation makes each a second time, after all layers of a microbatch."""
    layers, again = case.spec.layers, mesh.layout.recompute == "full"
    for index, sent in enumerate(routed):
        if not again or index % (2 * layers) < layers:
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent, group=mesh.groups["expert"])
            yield Routed(tuple(sent.tolist()), tuple(received.tolist()))


RECOMPUTED = [{"recompute": kind} for kind in ("none", "selective", "full")]


def scheduled(*names: str, spec: TransformerSpec = TIED) -> list[Case]:
    return [Case(spec, {"schedule": name, "accumulate": 4}) for name in names]


def check(ranks: int, run_ranks: Any, degrees: dict[str, Any], cases: list[Case]) -> None:
    for rank, pairs in enumerate(run_ranks(ranks, measured_and_expected, degrees, cases)):
        for case, (measured, expected) in zip(cases, pairs, strict=True):
            assert measured == expected, f"rank {rank}: {case}"
            assert {axis for axis, _ in measured} >= {axis for axis in degrees if axis in AXES}


def test_tensor(run_ranks: Any) -> None:
    cases = [
        *(Case(LLAMA, changes) for changes in RECOMPUTED),
        Case(GPT2, compute=BF16),
        Case(SHARED_HEADS, {"accumulate": 1}, compute=BF16),
        Case(DOTS, {"recompute": "full"}, balance=0.1),
        Case(LLAMA, {"microbatch": 40, "accumulate": 1}),  # the loss in two chunks
    ]
    without = [replace(case, changes=case.changes | {"sequence_parallel": False}) for case in cases[2:]]
    check(2, run_ranks, {"tensor": 2}, cases + without)


def test_ring(run_ranks: Any) -> None:
    cases = [Case(LLAMA, changes, documents=True) for changes in RECOMPUTED]
    cases += [Case(MIXTRAL, {"recompute": "full"}, compute=BF16, balance=0.1)]
    check(2, run_ranks, {"context": 2, "context_kind": "ring"}, cases)
    check(4, run_ranks, {"context": 4, "context_kind": "ring", "zero": 3}, cases[:1])


def test_ulysses(run_ranks: Any) -> None:
    cases = [Case(SHARED_HEADS, changes, documents=True) for changes in RECOMPUTED]
    cases += [Case(LLAMA, compute=BF16)]
    check(2, run_ranks, {"context": 2, "context_kind": "ulysses"}, cases)
    kv_heads = replace(LLAMA, heads=12, kv_heads=6)  # repeated to 12
    check(4, run_ranks, {"context": 4, "context_kind": "ulysses"}, [Case(kv_heads)])


def test_pipeline(run_ranks: Any) -> None:
    untied = Case(LLAMA, {"schedule": "gpipe", "accumulate": 1}, compute=BF16)
    check(2, run_ranks, {"pipeline": 2}, [*scheduled(*SCHEDULES), untied])
    eight = replace(TIED, layers=8)
    check(4, run_ranks, {"pipeline": 4}, scheduled("1f1b", "interleaved", "zbv", spec=eight))


def test_experts(run_ranks: Any) -> None:
    full = {"recompute": "full"}
    cases = [Case(MIXTRAL), Case(DOTS, full, compute=BF16, balance=0.1)]
    check(2, run_ranks, {"shard": 2, "expert": 2, "zero": 1}, cases)
    zero = [Case(MIXTRAL, {"zero": 1}), Case(MIXTRAL, {"zero": 2}), Case(DOTS, {"zero": 3} | full)]
    check(4, run_ranks, {"shard": 4, "expert": 2, "zero": 1}, zero)


COMPOSITIONS: list[tuple[dict[str, Any], list[Case]]] = [
    (
        {"tensor": 2, "pipeline": 2},
        [
            *scheduled("1f1b", "interleaved-zero-bubble", "dualpipev"),
            Case(GPT2, {"sequence_parallel": False}, compute=BF16),
        ],
    ),
    ({"context": 2, "tensor": 2}, [Case(SHARED_HEADS, {"recompute": "full"}, compute=BF16, documents=True)]),
    ({"pipeline": 2, "context": 2}, [Case(TIED, documents=True)]),
    ({"pipeline": 2, "shard": 2, "zero": 1}, scheduled("1f1b", "zbv")),
    ({"pipeline": 2, "shard": 2, "expert": 2, "zero": 1}, [Case(MIXTRAL)]),
    ({"shard": 2, "tensor": 2, "zero": 3}, [Case(GPT2, compute=BF16), Case(LLAMA, {"recompute": "full"})]),
    ({"shard": 2, "expert": 2, "tensor": 2, "zero": 1}, [Case(DOTS, compute=BF16)]),
    ({"replicate": 2, "shard": 2, "expert": 2, "zero": 3}, [Case(MIXTRAL)]),
    ({"context": 2, "shard": 2, "expert": 4, "zero": 3}, [Case(MIXTRAL, balance=0.1)]),
    ({"tensor": 2, "pipeline": 2, "shard": 2, "zero": 1}, [Case(TIED, {"schedule": "zbv"}, compute=BF16)]),
]


@pytest.mark.parametrize(("degrees", "cases"), COMPOSITIONS)
def test_compositions(degrees: dict[str, Any], cases: list[Case], run_ranks: Any) -> None:
    check(layout_of(degrees, cases[0]).world, run_ranks, degrees, cases)


def test_experts_of_an_even_load() -> None:
    """Without a record of the routing, every rank is taken to send and receive as many rows."""
    layout = layout_of({"shard": 2, "expert": 2}, Case(MIXTRAL))
    traffic = expected_traffic(MIXTRAL, layout, 0, sequence=SEQUENCE, compute=BF16)
    rows_bytes = 2 * SEQUENCE * 2 * 32 * 2
    times = MIXTRAL.layers * layout.accumulate
    assert traffic["expert", "all-to-all"].payload_bytes == times * (4 * rows_bytes + 8 * 8)
    assert traffic["expert", "all-to-all"].sent_bytes == times * (4 * rows_bytes + 8 * 8) // 2
