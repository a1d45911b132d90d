"""Pipeline parallelism: stages of a model on the ranks of one axis, run by torch's schedules.

A stage is a module that takes tokens (B, T), or the hidden states (B, T, E) of the stage before it, as its first
argument, and targets, documents and positions besides; the last one returns the summed loss, or logits where it
gets no targets. What else is done to a stage (tensor parallelism, FSDP2) is not known here. All ranks of the axis
are given the same batch. Nothing but tensors of known shapes is sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import get_schedule_class

from muster.model.generate import greedy
from muster.model.transformer import positions_in_document
from muster.parallel.inputs import Inputs
from muster.parallel.schedules import SCHEDULES, rank_of_stage
from muster.parallel.simulate import Operation
from muster.parallel.timeline import Clock, OnPass, RecordedStage, Recorder, ignore_pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """The hidden states (B, T / divided, E) that travel between stages."""

    width: int
    dtype: torch.dtype
    device: torch.device
    divided: int = 1
    """Ranks among which sequence parallelism divides the tokens between stages."""

    def empty(self, rows: int, tokens: int, device: torch.device | None = None) -> Tensor:
        shape = (rows, tokens // self.divided, self.width)
        return torch.empty(shape, dtype=self.dtype, device=device or self.device)


class Pipeline:
    """This rank's stages, and the steps that it takes with the other ranks of its pipeline."""

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        *,
        schedule: str,
        microbatches: int,
        rows: int,
        tokens: int,
        activations: Activations,
        group: dist.ProcessGroup,
        on_pass: OnPass = ignore_pass,
    ) -> None:
        """`stages` by their index (`schedules.stages_of_rank`); a step has `microbatches` of `rows` sequences of
        `tokens` tokens, or another number of them. There must be no `schedules.schedule_problems`."""
        self._stages = dict(sorted(stages.items()))
        self._ranks, self._rank = dist.get_world_size(group), dist.get_rank(group)
        self._last = self._ranks * len(stages) - 1
        self._schedule_name, self._group, self._activations = schedule, group, activations
        self._rows, self._tokens = rows, tokens
        self._loss_scale = 1.0
        self._losses: list[Tensor] = []
        self._schedules: dict[int, tuple[list[RecordedStage], Any]] = {}
        self._on_pass = on_pass
        self._schedule_of(microbatches)

    @property
    def has_first(self) -> bool:
        return 0 in self._stages

    @property
    def has_last(self) -> bool:
        return self._last in self._stages

    def step(self, inputs: Inputs, *, loss_scale: float = 1.0) -> Tensor:
        """Forward and backward of a batch (B, T); the summed loss on the last stage's rank, elsewhere 0.

        Adds to the parameters' gradients those of loss_scale times the summed loss.
        """
        rows, tokens = inputs.tokens.shape
        if tokens != self._tokens or rows % self._rows or not rows:
            raise ValueError(
                f"a step of this pipeline takes tokens (n x {self._rows}, {self._tokens}), not {(rows, tokens)}"
            )
        inputs = self._placed(inputs)
        self._loss_scale, self._losses = loss_scale, []
        first = (inputs.tokens,) if self.has_first else ()
        _, schedule = self._schedule_of(rows // self._rows)
        schedule.step(*first, target=inputs.targets, return_outputs=False, **inputs.named())
        return sum(self._losses, torch.zeros((), device=inputs.tokens.device))

    def evaluate(self, inputs: Inputs) -> Tensor:
        """The summed loss of any number of rows (B, T), without gradients; on the last stage's rank, elsewhere 0."""
        losses = self._forward(self._placed(inputs))
        return sum(losses, torch.zeros((), device=inputs.tokens.device))

    def logits(self, tokens: Tensor) -> Tensor | None:
        """Logits (B, T, V) for tokens (B, T) of any shape, on the last stage's rank."""
        length = tokens.shape[1]
        # What follows a token does not change its logits.
        padded = F.pad(tokens, (0, -length % self._activations.divided))
        found = self._forward(self._placed(Inputs(padded)))
        return torch.cat(found)[:, :length] if found else None

    def generate(
        self, tokens: Tensor, new_tokens: int, choose: Callable[[Tensor], Tensor] = greedy
    ) -> Tensor:
        """Continue tokens (B, T) by `new_tokens` tokens, each chosen from its logits: the same on every rank.

        Every token costs a pass over the whole sequence; meant for a look at a model in training, not for serving.
        """
        for _ in range(new_tokens):
            logits = self.logits(tokens)
            fresh = tokens.new_empty(len(tokens)) if logits is None else choose(logits[:, -1])
            dist.broadcast(fresh, group=self._group, group_src=self._rank_of(self._last))
            tokens = torch.cat([tokens, fresh[:, None]], dim=1)
        return tokens

    def sum_tied(self, gradients: Sequence[Tensor]) -> None:
        """Sum the gradient of a weight that the first and the last stage share, in place.

        `gradients`: those of the copies on this rank, in order of their stages: two, one or none.
        """
        if len(gradients) == 2:
            gradients[0].add_(gradients[1])
            gradients[1].copy_(gradients[0])
        elif gradients:
            (own,) = gradients
            peer = self._rank_of(self._last if self.has_first else 0)
            other = torch.empty_like(own)
            both = [
                dist.P2POp(dist.isend, own, group=self._group, group_peer=peer),
                dist.P2POp(dist.irecv, other, group=self._group, group_peer=peer),
            ]
            for work in dist.batch_isend_irecv(both):
                work.wait()
            own.add_(other)

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Operation]]:
        """The list is filled, when the context ends, with what this rank's stages did in the steps within it."""
        recorder = Recorder(self._rank, Clock(self._activations.device))
        operations: list[Operation] = []
        stages = [stage for stages, _ in self._schedules.values() for stage in stages]
        for stage in stages:
            stage.recorder = recorder
        try:
            yield operations
        finally:
            for stage in stages:
                stage.recorder = None
        operations.extend(recorder.operations())

    def _rank_of(self, stage: int) -> int:
        return rank_of_stage(self._schedule_name, stage, self._ranks)

    def _placed(self, inputs: Inputs) -> Inputs:
        """With positions, where a later stage could not tell them from its part of the hidden states."""
        divided, tokens = self._activations.divided, inputs.tokens
        if tokens.shape[1] % divided:
            raise ValueError(f"{divided} ranks do not divide the {tokens.shape[1]} tokens of a sequence")
        if inputs.positions is not None or divided == 1:
            return inputs
        documents = torch.zeros_like(tokens) if inputs.documents is None else inputs.documents
        return replace(inputs, positions=positions_in_document(documents))

    def _schedule_of(self, microbatches: int) -> tuple[list[RecordedStage], Any]:
        """Torch's schedule, which is made for a number of microbatches, and its stages; kept for the next time."""
        if microbatches not in self._schedules:
            stages = [self._torch_stage(index) for index in self._stages]
            for stage in stages:
                stage.on_pass = self._on_pass
            kind = SCHEDULES[self._schedule_name]
            schedule: Any = get_schedule_class(kind.torch_name)(
                stages if kind.stages_per_rank > 1 else stages[0],
                microbatches,
                loss_fn=self._scaled_loss,
                scale_grads=False,
            )
            self._schedules[microbatches] = stages, schedule
        return self._schedules[microbatches]

    def _torch_stage(self, index: int) -> RecordedStage:
        rows, tokens = self._rows, self._tokens
        # Given both ends, torch sends no (pickled) description of them from stage to stage.
        meta = torch.device("meta")
        hidden = self._activations.empty(rows, tokens, meta).requires_grad_()
        ids = torch.empty((rows, tokens), dtype=torch.long, device=meta)
        loss = torch.empty((), device=meta, requires_grad=True)
        return RecordedStage(
            self._stages[index],
            index,
            self._last + 1,
            self._activations.device,
            input_args=ids if index == 0 else hidden,
            output_args=loss if index == self._last else hidden,
            group=self._group,
        )

    def _scaled_loss(self, loss: Tensor, _: Tensor) -> Tensor:
        self._losses.append(loss.detach().clone())
        return loss * self._loss_scale

    @torch.no_grad()
    def _forward(self, inputs: Inputs) -> list[Tensor]:
        """Send a batch through the stages, a piece after the other; what the last stage returns for each.

        Torch's schedules run forward too, but only for as many microbatches of the same shape as in training.
        """
        pieces = inputs.split(self._rows)
        outputs: list[Tensor] = []
        sent: list[tuple[dist.Work, Tensor]] = []
        for index, stage in self._stages.items():
            here = index - 1 in self._stages
            arriving = [] if index == 0 or here else self._receive(index - 1, pieces)
            given, outputs = outputs, []
            for number, piece in enumerate(pieces):
                if index == 0:
                    x = piece.tokens
                elif here:
                    x = given[number]
                else:
                    work, x = arriving[number]
                    work.wait()
                outputs.append(stage(x, **piece.named()))
                if index < self._last and index + 1 not in self._stages:
                    sent.append(self._send(outputs[-1], index + 1))
        for work, _ in sent:
            work.wait()
        return outputs if self.has_last else []

    def _receive(self, stage: int, pieces: Sequence[Inputs]) -> list[tuple[dist.Work, Tensor]]:
        """Begin to receive what a stage returns; for all pieces at once, lest two ranks wait for each other's."""
        buffers = [self._activations.empty(*piece.tokens.shape) for piece in pieces]
        source = self._rank_of(stage)
        return [(_begun(dist.irecv(x, group=self._group, group_src=source)), x) for x in buffers]

    def _send(self, hidden: Tensor, stage: int) -> tuple[dist.Work, Tensor]:
        hidden = hidden.contiguous()
        return _begun(dist.isend(hidden, group=self._group, group_dst=self._rank_of(stage))), hidden


def _begun(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank is in its own pipeline"
    return work
