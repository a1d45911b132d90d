"""Copies that train apart: against plain loops over models in one process, over layouts inside a copy, and resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muster.checkpoint import shelf
from muster.config.load import load_resolved
from muster.data.sampler import Sampler
from muster.model.transformer import Transformer, initial_value
from muster.observe.records import read_jsonl
from muster.train import plan as planning
from muster.train.forward import summed_loss
from muster.train.loop import microbatches
from muster.train.optimizer import make_optimizer
from muster.train.plan import Plan
from muster.train.rounds import fragment_of, unit_of
from muster.train.schedule import learning_rate
from tests.ranks.test_resume import EVERY_STEP, train_and_stop, weights_of
from tests.toy import STEPS, tiny, train_here, write_corpus

Weights = dict[str, Tensor]
SMOOTH = {"lr": 1e-2, "eps": 1e-3}
"""An optimizer that does not blow rounding errors up, as AdamW does where gradients are small beside eps."""
STREAMING = {"kind": "diloco", "every": 4, "fragments": 2, "overlap": 1}
KINDS: list[dict[str, Any]] = [
    {"kind": "local_sgd", "every": 2},
    {"kind": "local_sgd", "every": 4},  # the last round is shorter
    {"kind": "diloco", "every": 2},
    {"kind": "diloco", "every": 3, "outer": {"lr": 0.5, "momentum": 0.5}},
    STREAMING,
    {"kind": "diloco", "every": 6, "fragments": 2, "overlap": 2, "mix": 0.75},
    {"kind": "local_sgd", "every": 2, "warmup": 0.5},
    STREAMING | {"warmup": 0.5},  # ends in the middle of what would be a round
    {"kind": "delayed"},
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def synced(
    sync: dict[str, Any] | None, layout: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    run = tiny(layout=layout or {"replicate": 2}, **changes)
    run["train"] = run["train"] | {"sync": sync, "optimizer": SMOOTH}
    return run


def apart(ours: Weights, theirs: Weights) -> float:
    """The largest difference of any weight."""
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


def same(ours: Weights, theirs: Weights) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("sync", KINDS, ids=str)
def test_against_a_plain_loop(sync: dict[str, Any], corpus: Path, run_ranks: Any, tmp_path: Path) -> None:
    run = synced(sync)
    run_ranks(2, train_here, run, str(corpus), str(tmp_path / "run"))
    plan = planning.make(load_resolved(run), base=corpus, folder=tmp_path / "run", gpus=0, ranks=2)
    assert apart(weights_of(tmp_path / "run"), Reference(plan).train()) < 1e-6


class Reference:
    """Copies as models beside one another in this process; the outer optimizer is torch's."""

    def __init__(self, plan: Plan) -> None:
        assert plan.run.train.sync is not None
        self.plan, self.sync = plan, plan.run.train.sync
        first = Transformer(plan.spec)
        for name, parameter in first.named_parameters():
            parameter.data.copy_(initial_value(name, parameter.shape, plan.spec, plan.run.train.seed))
        self.anchor = {name: nn.Parameter(p.detach().clone()) for name, p in first.named_parameters()}
        self.models = [copy.deepcopy(first) for _ in range(plan.layout.replicate)]
        train = plan.run.train
        self.inner = [
            make_optimizer(dict(model.named_parameters()), train.optimizer, compute=torch.float32)
            for model in self.models
        ]
        self.outer = {
            name: torch.optim.SGD(
                [parameter],
                lr=self.sync.outer.lr,
                momentum=self.sync.outer.momentum,
                nesterov=self.sync.outer.momentum > 0,
            )
            for name, parameter in self.anchor.items()
        }

    def train(self) -> Weights:
        if self.sync.kind == "delayed":
            return self.delayed()
        sent: dict[str, Tensor] = {}
        due = 0
        warmup = round(self.sync.warmup * self.plan.steps)
        for step in range(1, self.plan.steps + 1):
            for number in range(len(self.models)):
                self.passes(number, step - 1)
            if step <= warmup:
                self.average_gradients()
            for number in range(len(self.models)):
                self.step(number, step - 1)
            if step <= warmup:
                for name, anchor in self.anchor.items():
                    anchor.data.copy_(self.models[0].get_parameter(name).data)
                continue
            if step % self.sync.interval == 0:
                turn = (step // self.sync.interval - 1) % self.sync.fragments
                names = [n for n in self.anchor if fragment_of(unit_of(n), self.sync.fragments) == turn]
                sent, due = {name: self.mean_change(name) for name in names}, step + self.sync.overlap
            if step == due:
                self.meet(sent)
                sent = {}
        self.meet(sent)
        if self.sync.overlap or self.plan.steps % self.sync.every:
            for name, anchor in self.anchor.items():
                anchor.data.sub_(self.mean_change(name))
        return {name: parameter.data for name, parameter in self.anchor.items()}

    def delayed(self) -> Weights:
        model = self.models[0]
        before: list[Tensor] | None = None
        for step in range(self.plan.steps):
            whole = [torch.zeros_like(p) for p in model.parameters()]
            batches = [batch for number in range(2) for batch in self.batches(number, step)]
            self.passes(0, step, batches)
            for total, parameter in zip(whole, model.parameters(), strict=True):
                assert parameter.grad is not None
                total.copy_(parameter.grad)
            model.zero_grad()
            if before is not None:
                for parameter, gradient in zip(model.parameters(), before, strict=True):
                    parameter.grad = gradient
                self.step(0, step - 1)
            before = whole
        return {name: parameter.data for name, parameter in model.named_parameters()}

    def batches(self, number: int, step: int) -> list[Any]:
        sampler = Sampler(self.plan.corpus, self.plan.sequence, self.plan.run.train.seed)
        return microbatches(sampler, self.plan, number, step)

    def passes(self, number: int, step: int, batches: list[Any] | None = None) -> None:
        batches = batches or self.batches(number, step)
        tokens = sum(batch.valid_tokens for batch in batches)
        for batch in batches:
            loss = summed_loss(self.models[number], batch, torch.device("cpu"), mask_documents=True)
            (loss / tokens).backward()

    def step(self, number: int, step: int) -> None:
        train = self.plan.run.train
        assert train.optimizer.clip is not None
        nn.utils.clip_grad_norm_(self.models[number].parameters(), train.optimizer.clip)
        self.inner[number].step(learning_rate(step, self.plan.steps, train.optimizer.lr, train.schedule))

    def average_gradients(self) -> None:
        for same in zip(*(model.parameters() for model in self.models), strict=True):
            mean = torch.stack([parameter.grad for parameter in same]).mean(0)
            for parameter in same:
                parameter.grad = mean.clone()

    @torch.no_grad()
    def mean_change(self, name: str) -> Tensor:
        changes = [self.anchor[name] - model.get_parameter(name) for model in self.models]
        return torch.stack(changes).mean(0)

    def meet(self, changes: Weights) -> None:
        for name, change in changes.items():
            self.anchor[name].grad = change
            if self.sync.kind == "local_sgd":
                self.anchor[name].data.sub_(change)
            else:
                self.outer[name].step()
            for model in self.models:
                model.get_parameter(name).data.lerp_(self.anchor[name].data, self.sync.share)


INSIDE = [
    ("shard 2, zero 3", {"shard": 2, "zero": 3}),
    ("tensor 2", {"tensor": 2}),
    ("pipeline 2", {"pipeline": 2, "microbatch": 1}),
    ("context 2", {"context": 2}),
]


@pytest.mark.parametrize("sync", [STREAMING, {"kind": "delayed"}], ids=["streaming", "delayed"])
@pytest.mark.parametrize("inside", [degrees for _, degrees in INSIDE], ids=[name for name, _ in INSIDE])
def test_any_layout_inside_a_copy(
    inside: dict[str, Any], sync: dict[str, Any], corpus: Path, run_ranks: Any, tmp_path: Path
) -> None:
    plain, divided = tmp_path / "plain", tmp_path / "divided"
    run_ranks(2, train_here, synced(sync), str(corpus), str(plain))
    run_ranks(4, train_here, synced(sync, {"replicate": 2} | inside), str(corpus), str(divided))
    assert apart(weights_of(divided), weights_of(plain)) < 1e-5


@pytest.mark.parametrize("compress", ["none", "fp16", "int8"])
def test_copies_are_equal_where_they_meet(
    compress: str, corpus: Path, run_ranks: Any, tmp_path: Path
) -> None:
    run = synced({"kind": "diloco", "every": 2, "compress": compress}, checkpoint=EVERY_STEP)
    run_ranks(2, train_here, run, str(corpus), str(tmp_path / "run"))
    shelf_ = tmp_path / "run" / "checkpoints"
    found = shelf.steps(shelf_)
    assert {2, STEPS} <= set(found) <= {2, 4, STEPS}  # saving waits until they meet, or for the save before
    for step in found:
        saved = tensors_of(shelf.folder_of(shelf_, step))
        weights, first, second = (
            of(saved, p) for p in ("weights.", "replica.0.weights.", "replica.1.weights.")
        )
        assert same(first, weights)
        assert same(second, weights)
        moments = [of(saved, f"replica.{copy_}.exp_avg.") for copy_ in range(2)]
        assert moments[0]
        assert not same(*moments)  # each copy's own


@pytest.mark.parametrize(
    ("sync", "least", "most", "words"),
    [
        ({"kind": "diloco", "every": 3}, 3.0, 3.0, "DiLoCo every 3 steps: a rank sends"),
        (
            {"kind": "diloco", "every": 6, "fragments": 2, "compress": "int8"},
            23.0,
            24.0,
            "2 fragments in turn in int8",
        ),
        (
            {"kind": "diloco", "every": 6, "warmup": 0.5, "compress": "int8"},
            3.6,  # half of the steps in fp16, and a twelfth of an exchange in int8
            3.8,
            "in int8, after 3 steps together",
        ),
        ({"kind": "delayed", "compress": "fp16"}, 2.0, 2.0, "during the next step's passes"),
    ],
    ids=str,
)
def test_what_is_saved_is_told_before_anything_runs(
    sync: dict[str, Any], least: float, most: float, words: str, corpus: Path, tmp_path: Path
) -> None:
    from muster.train.entry import describe
    from muster.train.savings import savings

    plan = planning.make(load_resolved(synced(sync)), base=corpus, folder=tmp_path / "run", gpus=0, ranks=2)
    assert least <= savings(plan).factor <= most
    (said,) = [line for line in describe(plan) if line.startswith("sync")]
    assert words in said
    assert said.endswith(f"1/{savings(plan).factor:.3g}")


def tensors_of(folder: Path) -> Weights:
    from safetensors.torch import load_file

    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def of(tensors: Weights, prefix: str) -> Weights:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


@pytest.mark.parametrize(
    ("sync", "layout", "after"),
    [
        ({"kind": "diloco", "every": 2}, {"replicate": 2}, 4),
        ({"kind": "diloco", "every": 2, "warmup": 0.5}, {"replicate": 2}, 2),
        (STREAMING, {"replicate": 2}, 2),  # in the middle of a fragment's round, an exchange under way
        (STREAMING | {"compress": "int8"}, {"replicate": 2, "shard": 2, "zero": 3}, 4),
        ({"kind": "delayed"}, {"replicate": 2}, 3),
        ({"kind": "delayed"}, {"replicate": 2, "pipeline": 2, "microbatch": 1}, 1),
    ],
    ids=str,
)
def test_resuming_is_bitwise(
    sync: dict[str, Any], layout: dict[str, Any], after: int, corpus: Path, run_ranks: Any, tmp_path: Path
) -> None:
    run = synced(sync, layout, checkpoint=EVERY_STEP)
    ranks = 2 if layout == {"replicate": 2} else 4
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run_ranks(ranks, train_here, run, str(corpus), str(straight))
    run_ranks(ranks, train_and_stop, run, str(corpus), str(broken), after)
    assert shelf.steps(broken / "checkpoints")[-1] == after
    run_ranks(ranks, train_here, run, str(corpus), str(broken))
    ends = [tensors_of(shelf.folder_of(folder / "checkpoints", STEPS)) for folder in (straight, broken)]
    assert same(*ends)


@pytest.mark.parametrize(("before", "now"), [(2, 4), (4, 2)])
@pytest.mark.parametrize("sync", [{"kind": "diloco", "every": 2}, STREAMING], ids=["diloco", "streaming"])
def test_resuming_with_another_number_of_copies(
    before: int, now: int, sync: dict[str, Any], corpus: Path, run_ranks: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    first = synced(sync, {"replicate": before}, checkpoint=EVERY_STEP)
    run_ranks(before, train_and_stop, first, str(corpus), str(folder), 4)
    second = synced(sync, {"replicate": now}, checkpoint=EVERY_STEP)
    run_ranks(now, train_here, second, str(corpus), str(folder))
    events = read_jsonl(folder / "events.jsonl")
    assert [event["step"] for event in events if event["event"] == "resumed"] == [4]
    losses = [row["held_out_loss"] for row in read_jsonl(folder / "metrics.jsonl") if "held_out_loss" in row]
    assert losses[-1] < losses[-2]
    copies = tensors_of(shelf.folder_of(folder / "checkpoints", STEPS))
    assert all(same(of(copies, f"replica.{n}.weights."), of(copies, "weights.")) for n in range(now))
