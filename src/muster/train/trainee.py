"""The model being trained on one rank, with its optimizer: built on a layout, updated by a batch, saved, restored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from muster.checkpoint.state import WEIGHTS, read_shards
from muster.data.evaluation import EvaluationBatches
from muster.data.packing import Batch
from muster.errors import TrainingError
from muster.model.folder import open_weights
from muster.model.transformer import Transformer, initial_value
from muster.parallel import data
from muster.parallel.apply import Value, apply
from muster.parallel.world import World
from muster.train import gradients
from muster.train.evaluate import Evaluation, evaluate
from muster.train.forward import summed_loss
from muster.train.optimizer import make_optimizer
from muster.train.plan import Plan
from muster.train.schedule import learning_rate

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


class Trainee:
    def __init__(self, plan: Plan, world: World) -> None:
        self.plan, self.world = plan, world
        with torch.device("meta"):
            self.model = Transformer(plan.spec)
        apply(
            self.model,
            list(self.model.layers.values()),
            plan.layout,
            data.build_mesh(plan.layout, world.device),
            compute=COMPUTE_DTYPE[plan.run.train.precision],
            value=_first_values(plan),
        )
        self.optimizer = make_optimizer(
            self.model,
            plan.run.train.optimizer,
            compute=COMPUTE_DTYPE[plan.run.train.precision],
            scratch=plan.folder if plan.layout.offload == "disk" else None,
        )

    def update(self, step: int, batches: Sequence[Batch], tokens: int) -> Update:
        """One optimizer step from this rank's microbatches; `tokens` are the valid ones of the global batch.

        The loss of a step is the summed cross entropy over the global batch divided by its
        valid tokens, never a mean of means, so no layout changes it.
        """
        seed_step(self.plan.run.train.seed, step)
        summed = torch.zeros((), device=self.world.device)
        for index, batch in enumerate(batches):
            data.begin_microbatch(self.model, self.plan.layout, is_last=index == len(batches) - 1)
            loss = self.loss(batch)
            data.sum_over_ranks(loss / tokens, self.plan.layout).backward()  # type: ignore[no-untyped-call]
            summed += loss.detach()
        norm = gradients.global_norm(self.model)
        (total,) = self.world.sum(float(summed))
        if norm != norm or norm == float("inf"):
            raise TrainingError(
                f"step {step + 1}: loss {total / tokens:.4g}, gradient norm {norm}: not finite, first in "
                f"{gradients.first_bad_parameter(self.model)}; lower train.optimizer.lr, or look at this step's data"
            )
        train = self.plan.run.train
        if train.optimizer.clip is not None:
            gradients.clip(self.model, norm, train.optimizer.clip)
        lr = learning_rate(step, self.plan.steps, train.optimizer.lr, train.schedule)
        self.optimizer.step(lr)
        return Update(loss=total / tokens, gradient_norm=norm, learning_rate=lr, tokens=tokens)

    def loss(self, batch: Batch) -> Tensor:
        """Summed cross entropy of one microbatch, in nats."""
        return summed_loss(
            self.model, batch, self.world.device, mask_documents=self.plan.run.data.mask_documents
        )

    def evaluate(self, limit_tokens: int | None = None) -> Evaluation:
        """Score the held-out documents, or their first `limit_tokens`."""
        corpus = self.plan.corpus
        batches = EvaluationBatches(
            corpus.held_out, corpus.tokenizer, self.plan.sequence, self.plan.layout.microbatch, limit_tokens
        )
        evaluation = evaluate(self.loss, batches, self.world)
        data.free_gathered(self.model)
        return evaluation

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint holds as tensors, by name; shards of this rank."""
        weights = {WEIGHTS + name: parameter.data for name, parameter in self.model.named_parameters()}
        return weights | self.optimizer.state()

    def restore(self, folder: Path, step: int) -> None:
        """Continue from a checkpoint taken after `step` updates, on any layout."""
        read_shards(self.state(), folder)
        self.optimizer.set_steps(step)


def seed_step(seed: int, step: int) -> None:
    """Every random number of a step follows from the run's seed and the step, so resuming needs no RNG state."""
    torch.manual_seed((seed << 32) + step)


def _first_values(plan: Plan) -> Value:
    if plan.model_folder is not None:
        return open_weights(plan.model_folder)
    seed, spec = plan.run.train.seed, plan.spec
    return lambda name, shape: initial_value(name, shape, spec, seed)
