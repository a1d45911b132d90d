"""Every pipeline schedule gives one process's losses and gradients, and sends nothing but tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from muster.model.generate import generate
from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer
from muster.parallel import world
from muster.parallel.inputs import Inputs
from muster.parallel.orders import orders
from muster.parallel.pipeline import Activations, Pipeline
from muster.parallel.schedules import SCHEDULES, stages_of_rank
from muster.parallel.simulate import Action, Operation, simulate
from muster.parallel.stages import explicit

TOLERANCE = 1e-5
ROWS, TOKENS = 2, 12


def spec(**changes: Any) -> TransformerSpec:
    shape: dict[str, Any] = {
        "family": "llama",
        "layers": 9,
        "width": 32,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "ffn": 48,
        "vocab": 61,
        "context": 32,
        "tied": False,
    }
    return TransformerSpec(**shape | changes)


def batch(rows: int, vocab: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets with some not scored, and documents that end within a row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (rows, TOKENS + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = -100
    borders = torch.rand((rows, TOKENS), generator=generator) < 0.15
    return tokens[:, :-1].contiguous(), targets, borders.cumsum(1)


def stage_modules(shape: TransformerSpec, split: list[range], mine: list[int]) -> dict[int, Transformer]:
    modules = {index: Transformer(shape, split[index]) for index in mine}
    for module in modules.values():
        module.init_weights(seed=3)
    return modules


def build(
    shape: TransformerSpec, schedule: str, microbatches: int, split: list[range], divided: int = 1
) -> tuple[dict[int, Transformer], Pipeline]:
    ranks = dist.get_world_size()
    mine = stages_of_rank(schedule, dist.get_rank(), ranks, len(split) // ranks)
    modules = stage_modules(shape, split, mine)
    assert dist.group.WORLD is not None
    return modules, Pipeline(
        modules,
        schedule=schedule,
        microbatches=microbatches,
        rows=ROWS,
        tokens=TOKENS,
        activations=Activations(
            width=shape.width, dtype=torch.float32, device=torch.device("cpu"), divided=divided
        ),
        group=dist.group.WORLD,
    )


def tied_gradients(modules: dict[int, Transformer]) -> list[Tensor]:
    ends = [module for module in modules.values() if module.embed is not None and module.spec.tied]
    return [module.embed.weight.grad for module in ends]


def train(shape: TransformerSpec, schedule: str, microbatches: int, layers: list[int]) -> dict[str, float]:
    """Some steps in the pipeline and in this process: the largest relative differences, by what differs."""
    forbid_objects()
    worst = {"loss": 0.0, "gradient": 0.0, "evaluation": 0.0}
    with world.join(60) as joined:
        modules, pipeline = build(shape, schedule, microbatches, explicit(layers))
        whole = Transformer(shape)
        whole.init_weights(seed=3)
        for step in range(2):
            tokens, targets, documents = batch(microbatches * ROWS, shape.vocab, seed=step)
            scale = 2.0 / int((targets != -100).sum())
            (held,) = joined.sum(float(pipeline.evaluate(Inputs(tokens, targets, documents))))
            (loss,) = joined.sum(float(pipeline.step(Inputs(tokens, targets, documents), loss_scale=scale)))
            if shape.tied:
                pipeline.sum_tied(tied_gradients(modules))
            reference = whole(tokens, targets, documents=documents)
            (reference * scale).backward()
            worst["loss"] = max(worst["loss"], relative(loss, float(reference)))
            worst["evaluation"] = max(worst["evaluation"], relative(held, float(reference)))
            expected = dict(whole.named_parameters())
            for module in modules.values():
                for name, parameter in module.named_parameters():
                    difference = (parameter.grad - expected[name].grad).norm() / expected[name].grad.norm()
                    worst["gradient"] = max(worst["gradient"], float(difference))
            descend([whole, *modules.values()])
    return worst


def relative(ours: float, reference: float) -> float:
    return abs(ours - reference) / abs(reference)


def descend(models: list[Transformer]) -> None:
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None


def forbid_objects() -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an object was sent")

    names = [name for name in dir(dist) if "object" in name]
    assert "send_object_list" in names
    for name in names:
        setattr(dist, name, refuse)
        setattr(dist.distributed_c10d, name, refuse)


UNEVEN = {2: [5, 4], 4: [3, 2, 2, 2], 8: [2, 1, 1, 1, 1, 1, 1, 1]}
CASES = [
    (schedule, ranks, microbatches, tied)
    for schedule, kind in SCHEDULES.items()
    for ranks, tied in ((2, True), (2, False), (4, True), (4, False))
    for microbatches in ([2 * ranks] if ranks == 4 or tied else sorted({kind.least_microbatches(2), 4, 6}))
]


@pytest.mark.parametrize(("schedule", "ranks", "microbatches", "tied"), CASES)
def test_same_as_one_process(
    schedule: str, ranks: int, microbatches: int, tied: bool, run_ranks: Any
) -> None:
    layers = UNEVEN[ranks * SCHEDULES[schedule].stages_per_rank]
    for worst in run_ranks(ranks, train, spec(tied=tied), schedule, microbatches, layers):
        assert max(worst.values()) < TOLERANCE, worst


def continue_greedily(
    shape: TransformerSpec, schedule: str, layers: list[int]
) -> tuple[list[Any], list[Any]]:
    with world.join(60):
        _, pipeline = build(shape, schedule, 4, explicit(layers))
        whole = Transformer(shape)
        whole.init_weights(seed=3)
        tokens, _, _ = batch(5, shape.vocab, seed=1)
        logits = pipeline.logits(tokens)
        if logits is not None:
            torch.testing.assert_close(logits, whole(tokens), rtol=1e-5, atol=1e-6)
        return pipeline.generate(tokens, 6).tolist(), generate(whole, tokens, 6).tolist()


@pytest.mark.parametrize(("schedule", "ranks"), [("1f1b", 4), ("interleaved", 2), ("zbv", 2)])
def test_generation_goes_through_the_same_stages(schedule: str, ranks: int, run_ranks: Any) -> None:
    shape = spec(tied=schedule == "1f1b", positions="learned" if schedule == "zbv" else "rope")
    for ours, reference in run_ranks(ranks, continue_greedily, shape, schedule, UNEVEN[4]):
        assert ours == reference


def record(shape: TransformerSpec, schedule: str, layers: list[int]) -> list[Operation]:
    with world.join(60):
        _, pipeline = build(shape, schedule, 4, explicit(layers))
        tokens, targets, _ = batch(4 * ROWS, shape.vocab, seed=1)
        pipeline.step(Inputs(tokens, targets))
        with pipeline.recording() as operations:
            pipeline.step(Inputs(tokens, targets))
        pipeline.step(Inputs(tokens, targets))
        return operations


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_recorded_is_what_is_planned(schedule: str, run_ranks: Any) -> None:
    stages_per_rank = SCHEDULES[schedule].stages_per_rank
    recorded = run_ranks(2, record, spec(), schedule, UNEVEN[2 * stages_per_rank])
    plan = orders(schedule, ranks=2, stages_per_rank=stages_per_rank, microbatches=4)
    assert [[Action(o.stage, o.kind, o.microbatch) for o in own] for own in recorded] == plan
    ends = {Action(o.stage, o.kind, o.microbatch): o.end_s for own in recorded for o in own}
    starts = {Action(o.stage, o.kind, o.microbatch): o.start_s for own in recorded for o in own}
    for action, start_s in starts.items():
        if action.kind == "F" and action.stage:
            assert start_s > ends[Action(action.stage - 1, "F", action.microbatch)]
    assert all(o.rank == rank for rank, own in enumerate(recorded) for o in own)
    assert len(simulate(plan, lambda action: ends[action] - starts[action])) == len(ends)


def test_tokens_divided_between_stages(run_ranks: Any) -> None:
    """Sequence parallelism: hidden states of half the tokens travel, and positions tell the whole length."""
    for ours, reference in run_ranks(2, halve):
        assert ours == pytest.approx(reference, rel=TOLERANCE)


class Halving(torch.nn.Module):
    """Stands for a stage under sequence parallelism whose other rank holds equal hidden states."""

    def __init__(self, stage: Transformer) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
        x = x if self.stage.is_first else torch.cat([x, x], dim=1)
        out = self.stage(x, targets, positions=positions)
        return out if self.stage.is_last else out[:, : out.shape[1] // 2]


def halve() -> tuple[float, float]:
    with world.join(60) as joined:
        shape = spec()
        modules = stage_modules(shape, explicit([5, 4]), [joined.rank])
        assert dist.group.WORLD is not None
        pipeline = Pipeline(
            {index: Halving(module) for index, module in modules.items()},
            schedule="1f1b",
            microbatches=2,
            rows=ROWS,
            tokens=TOKENS,
            activations=Activations(
                width=shape.width, dtype=torch.float32, device=torch.device("cpu"), divided=2
            ),
            group=dist.group.WORLD,
        )
        tokens, targets, _ = batch(2 * ROWS, shape.vocab, seed=1)
        (loss,) = joined.sum(float(pipeline.step(Inputs(tokens, targets))))
        stages = stage_modules(shape, explicit([5, 4]), [0, 1])
        hidden = stages[0](tokens)[:, : TOKENS // 2]
        return loss, float(stages[1](torch.cat([hidden, hidden], dim=1), targets))
