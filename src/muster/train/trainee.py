"""The model being trained on one rank, with its optimizer: built on a layout, updated by a batch, saved, restored."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from muster.checkpoint.state import WEIGHTS, files_needed, read_shards
from muster.comm.averager import Averager
from muster.comm.meter import Meter
from muster.data.dataset import Corpus
from muster.data.evaluation import EvaluationBatches
from muster.data.packing import Batch
from muster.model.build import balance_from_config
from muster.model.folder import open_weights
from muster.model.transformer import initial_value, parameter_names
from muster.parallel.apply import Value
from muster.parallel.inputs import Inputs
from muster.parallel.mesh import Mesh
from muster.parallel.model import ParallelModel
from muster.parallel.world import World
from muster.resilience.beats import Beat
from muster.resilience.copies import Copies
from muster.resilience.guard import BadStep, Fault, Guard
from muster.train import gradients
from muster.train.evaluate import Evaluation, evaluate
from muster.train.forward import to_inputs
from muster.train.oom import explained
from muster.train.optimizer import make_optimizer
from muster.train.plan import Training
from muster.train.schedule import learning_rate
from muster.train.sync import OF_COPY, make_sync

_COPY = "copy of "
"""Marks a second copy of a parameter, which is trained like the first one, but neither counted nor saved."""
COMPUTE_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimizer step did."""

    loss: float
    """Mean cross entropy per valid token of the global batch, in nats."""
    gradient_norm: float
    learning_rate: float
    tokens: int
    """Valid target tokens of the global batch."""
    expert_load: Tensor | None = None
    """Tokens sent to each expert of each layer, (L, X); None in a model without experts."""
    spike: str | None = None
    """How this step stands out from those before it, where it does."""

    @property
    def imbalance(self) -> float | None:
        """The busiest expert's tokens over its layer's mean, in the layer where that is most; 1 is even."""
        if self.expert_load is None:
            return None
        load = self.expert_load.double()
        return float((load.amax(1) / load.mean(1)).max())


class Trainee:
    @explained
    def __init__(
        self, plan: Training, world: World, beat: Beat | None = None, averager: Averager | None = None
    ) -> None:
        """`averager` as for `make_sync`."""
        self.plan, self.world = plan, world
        self.beat = beat or Beat()
        self.before_change: list[Callable[[], None]] = []
        """Called once, before an update changes anything: who still reads the state is waited for."""
        self.mesh = Mesh(plan.layout, world.device)
        self.balance = balance_from_config(plan.run.train.balance, plan.spec)
        self.model = ParallelModel(
            plan.spec,
            self.mesh,
            sequence=plan.sequence,
            compute=COMPUTE_DTYPE[plan.run.train.precision],
            value=_first_values(plan),
            on_pass=self.beat.enter,
        )
        copies = {_COPY + name: copy for name, copy in self.model.copies()}
        self.optimizer = make_optimizer(
            dict(self.model.named_parameters()) | copies,
            plan.run.train.optimizer,
            compute=COMPUTE_DTYPE[plan.run.train.precision],
            scratch=plan.folder if plan.layout.offload == "disk" else None,
        )
        self.guard = Guard(plan.run.faults)
        self._copies = Copies(world)
        self.sync = make_sync(
            plan.run.train.sync,
            self.mesh,
            world,
            dict(self.model.named_parameters()) | copies,
            dict(self.model.named_buffers()),
            last=plan.steps,
            told_every=plan.run.train.log_every,
            averager=averager,
        )

    @explained
    def update(
        self, step: int, batches: Sequence[Batch], tokens: int, *, meter: Meter | None = None
    ) -> Update:
        """One optimizer step from this rank's microbatches; `tokens` are the valid ones of the global batch.

        The loss of a step is the summed cross entropy over the global batch divided by its
        valid tokens, never a mean of means, so no layout changes it. (Under local training the batch is that of this
        rank's copy.) A `meter` counts what the passes send. BadStep where the guard refuses the step, on all ranks
        that take it together.
        """
        with meter or contextlib.nullcontext():
            summed = self.accumulate(step, batches, 1 / tokens)
        return self.apply(step, summed, tokens, self.model.take_load())

    def accumulate(self, step: int, batches: Sequence[Batch], scale: float) -> float:
        """The passes of one step: gradients of the summed loss times `scale`, and this rank's share of that sum."""
        seed_step(self.plan.run.train.seed, step)
        coefficient = (self.balance.coefficient if self.balance else None) or 0.0
        return float(
            self.model.train(
                [self._inputs(batch) for batch in batches], self.sync.summed * scale, coefficient
            )
        )

    def apply(self, step: int, share: float, tokens: int, load: Tensor | None) -> Update:
        """The optimizer's part of a step, once the gradients are those of the mean over all `tokens`.

        `share` is this rank's of the summed loss.
        """
        self.beat.enter("optimizer")
        while self.before_change:
            self.before_change.pop()()
        self.sync.exchange()
        named, together = self.model.named_parameters(), self.mesh.together
        total, square = together.sum(share, gradients.squared_norm(named, self.mesh.copies_apart))
        loss, norm = total / tokens, math.sqrt(square)
        fault = self.guard.judge(loss, norm)
        if fault is not None and not fault.tolerated:
            raise self._refused(step, fault, share)
        train = self.plan.run.train
        if train.optimizer.clip is not None:
            gradients.clip(named + self.model.copies(), norm, train.optimizer.clip)
        lr = learning_rate(
            max(step - self.sync.delay, 0), self.plan.steps, train.optimizer.lr, train.schedule
        )
        if step >= self.sync.delay:
            self.optimizer.step(lr)
        if load is not None and self.balance and self.balance.rate:
            self.model.balance_by_bias(load, self.balance.rate)
        self.guard.applied(loss, norm)
        return Update(
            loss=loss, gradient_norm=norm, learning_rate=lr, tokens=tokens, expert_load=load,
            spike=None if fault is None else fault.said,
        )  # fmt: skip

    def _refused(self, step: int, fault: Fault, share: float) -> BadStep:
        """Drop what a refused step left behind, and say where it went wrong."""
        named = self.model.named_parameters()
        where = ""
        if fault.kind == "nan":
            names = parameter_names(self.plan.spec)
            where = f", first in {gradients.where_not_finite(named, names, self.mesh.together, share)}"
        for _, parameter in named + self.model.copies():
            parameter.grad = None
        self.model.forget_residuals()
        return BadStep(f"step {step + 1}: {fault.said}{where}", fault.kind)

    def check_copies(self, step: int) -> None:
        """Compare the bits of everything that several ranks hold; TrainingError where they differ."""
        if self.plan.run.faults.checksum_every is not None:
            named = self.sync.state(self._own()).items()
            self._copies.check([(name.replace(_COPY, ""), tensor) for name, tensor in named], step)

    @explained
    def evaluate(
        self,
        corpus: Corpus,
        limit_tokens: int | None = None,
        *,
        share: tuple[int, int] = (0, 1),
        asked: Callable[[], bool] | None = None,
    ) -> Evaluation:
        """Score the held-out documents of a corpus, or their first `limit_tokens`; of them share (index, out of).

        BrokenOff on all ranks as soon as one is `asked` to stop.
        """
        layout = self.plan.layout
        batches = EvaluationBatches(
            corpus.held_out, corpus.tokenizer, self.plan.sequence, layout.microbatch, limit_tokens
        )
        with self.sync.evaluating():
            try:
                return evaluate(
                    self._score,
                    batches,
                    self.world,
                    part=share[0] * layout.data + self.mesh.data_index,
                    parts=share[1] * layout.data,
                    at_once=layout.pipeline,  # so that the stages have something to do at the same time
                    counts_tokens=self.mesh.reads_first,
                    asked=asked,
                )
            finally:
                self.model.rest()

    def _score(self, batches: Sequence[Batch]) -> Tensor:
        self.beat.enter("evaluate")
        return self.model.score([self._inputs(batch) for batch in batches])

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint holds of this rank as tensors, by name; of second copies the first one's."""
        return {name: tensor for name, tensor in self.sync.state(self._own()).items() if _COPY not in name}

    def owned(self) -> dict[str, Tensor]:
        """What of `state` is this rank's to write, because no copy of the model before it holds the same."""
        state = self.state()
        if self.mesh.is_first_copy:
            return state
        return {name: tensor for name, tensor in state.items() if name.startswith(OF_COPY)}

    def restore(self, folder: Path, step: int) -> None:
        """Continue from a checkpoint taken after `step` updates, on any layout."""
        state = self.sync.loading(self._own(), folder)
        self._read(folder, state)
        self.sync.loaded(step)
        self.optimizer.set_steps(max(step - self.sync.delay, 0))

    def take_weights(self, folder: Path) -> None:
        """Begin with the weights of a checkpoint of the same model, from any layout; each rank reads its part."""
        own = self._own()
        self._read(folder, {name: tensor for name, tensor in own.items() if name.startswith(WEIGHTS)})
        self.sync.begin()

    def files_of(self, folder: Path) -> set[str]:
        """Names of the files of a checkpoint that `restore` would read on this rank."""
        parts = _apart(self.sync.loading(self._own(), folder))
        return set().union(*(files_needed(part, folder) for part in parts if part))

    def _read(self, folder: Path, chosen: Mapping[str, Tensor]) -> None:
        for part in _apart(chosen):
            if part:
                read_shards(part, folder)

    def shards(self) -> list[Tensor]:
        """Everything that training changes, as this rank's plain tensors: what another copy of it is filled from."""
        held = self.sync.state(self._own()).values()
        return [t.to_local() if isinstance(t, DTensor) else t for t in held]

    def _own(self) -> dict[str, Tensor]:
        weights = {WEIGHTS + name: parameter.data for name, parameter in self.model.named_parameters()}
        copies = {WEIGHTS + _COPY + name: copy.data for name, copy in self.model.copies()}
        buffers = {WEIGHTS + name: buffer for name, buffer in self.model.named_buffers()}
        return weights | buffers | copies | self.optimizer.state()

    def _inputs(self, batch: Batch) -> Inputs:
        return to_inputs(batch, self.world.device, mask_documents=self.plan.run.data.mask_documents)


def _apart(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Everything but second copies, and these by the names of the first ones."""
    first = {name: tensor for name, tensor in state.items() if _COPY not in name}
    return first, {name.replace(_COPY, ""): tensor for name, tensor in state.items() if _COPY in name}


def seed_step(seed: int, step: int) -> None:
    """Every random number of a step follows from the run's seed and the step, so resuming needs no RNG state."""
    torch.manual_seed((seed << 32) + step)


def _first_values(plan: Training) -> Value:
    if plan.model_folder is not None:
        return open_weights(plan.model_folder)
    if plan.trained is not None:  # read later, each rank its own part
        return lambda name, shape: torch.zeros(()).expand(shape)
    seed, spec = plan.run.train.seed, plan.spec
    return lambda name, shape: initial_value(name, shape, spec, seed)
