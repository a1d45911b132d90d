"""How the copies of a model stay together: what `train.sync` means to the loop and to a step.

Without it, gradients are summed over copies within the passes, and there is nothing left to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from muster.checkpoint import manifest
from muster.comm.averager import Averager, GroupAverager
from muster.config import schema
from muster.parallel.mesh import Mesh
from muster.parallel.world import World
from muster.train.delayed import DelayedGradients, MeanGradients
from muster.train.rounds import Rounds

if TYPE_CHECKING:
    from muster.train.trainee import Update

OF_COPY = "replica."
"""Prefix, before the copy's number and a dot, of the names of what copies do not hold alike."""

Tensors = Mapping[str, Tensor]


class Sync(Protocol):
    delay: int
    """Steps by which the applied gradients are late."""
    summed: int
    """Copies whose gradients are to be summed after the passes, by what takes their mean."""

    def agree(self, step: int, tokens: float, due: Sequence[bool], votes: Sequence[float]) -> list[float]:
        """One exchange before the step that follows `step` finished ones: sums of what the ranks say.

        The valid tokens that the loss of the coming step is divided by; which of the things called `due` are to be
        done after it; and the `votes` on the state as it is, or none where that is no place to hear them.
        """

    def begin(self) -> None:
        """The parameters were set anew, alike on all copies."""

    def exchange(self) -> None:
        """Between the passes and the optimizer: put the gradients in place that are applied now."""

    def after_step(self, step: int, update: Update) -> Update:
        """After `step` finished steps: meet, where that is due, and after the last one in any case: all copies hold the
        same parameters then. Returns what there is to tell of all copies."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Within, parameters are those of the trained model, on all copies alike."""

    def state(self, own: Tensors) -> dict[str, Tensor]:
        """What a checkpoint holds of this rank, by name, the same names at any time; `own` are its parameters, buffers
        and optimizer state."""

    def loading(self, own: Tensors, folder: Path) -> dict[str, Tensor]:
        """What to fill, by its name in the checkpoint in `folder`; call `loaded` then."""

    def loaded(self, step: int) -> None: ...


def make_sync(
    config: schema.Sync | None,
    mesh: Mesh,
    world: World,
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    *,
    last: int,
    told_every: int,
    averager: Averager | None = None,
) -> Sync:
    """What `config` asks for, in a run of `last` steps whose figures are told every `told_every`.

    `averager` replaces those over the mesh's axis `replicate`.
    """
    if config is None:
        return EveryStep(world)
    of_gradients = of_changes = averager
    if averager is None:
        group, in_background = mesh.copies_group(), config.kind == "delayed" or config.overlap > 0
        of_gradients = GroupAverager(group, config.compress_gradients, in_background=in_background)
        of_changes = GroupAverager(group, config.compress, in_background=in_background)
    assert of_gradients is not None
    assert of_changes is not None
    if config.kind == "delayed":
        return Delayed(world, DelayedGradients(parameters, of_gradients), mesh.layout.replicate)
    rounds = Rounds(parameters, buffers, config, of_changes, last=last)
    gradients = MeanGradients(parameters, of_gradients)
    warmup = config.warmup_steps(last)
    return Local(
        config, mesh, world, rounds, gradients, warmup, lambda step: step % told_every == 0 or step == last
    )


class EveryStep:
    """Gradients are summed over copies within the passes."""

    delay, summed = 0, 1

    def __init__(self, world: World) -> None:
        self._world = world

    def agree(self, step: int, tokens: float, due: Sequence[bool], votes: Sequence[float]) -> list[float]:
        return self._world.sum(tokens, *due, *votes)

    def begin(self) -> None:
        pass

    def exchange(self) -> None:
        pass

    def after_step(self, step: int, update: Update) -> Update:
        return update

    def evaluating(self) -> AbstractContextManager[None]:
        return nullcontext()

    def state(self, own: Tensors) -> dict[str, Tensor]:
        return dict(own)

    def loading(self, own: Tensors, folder: Path) -> dict[str, Tensor]:
        return dict(own)

    def loaded(self, step: int) -> None:
        pass


class Delayed(EveryStep):
    delay = 1

    def __init__(self, world: World, gradients: DelayedGradients, copies: int) -> None:
        super().__init__(world)
        self._gradients, self.summed = gradients, copies

    def exchange(self) -> None:
        self._gradients.exchange()

    def state(self, own: Tensors) -> dict[str, Tensor]:
        return {**own, **self._gradients.shared()}

    def loading(self, own: Tensors, folder: Path) -> dict[str, Tensor]:
        return self.state(own)

    def loaded(self, step: int) -> None:
        if step:
            self._gradients.loaded()


class Local:
    """Copies take steps of their own and meet every so often; until then they exchange nothing but, on the steps that
    are told of, their figures.

    What is due waits for the next meeting, and so does saving. A checkpoint holds every copy's parameters and moments
    beside what they share, so it is exact at any step, in the middle of a round too; with more copies than were
    saved, further ones begin as the saved ones were, and with fewer the last ones' steps since they met are lost.
    """

    delay, summed = 0, 1

    def __init__(
        self,
        config: schema.Sync,
        mesh: Mesh,
        world: World,
        rounds: Rounds,
        gradients: MeanGradients,
        warmup: int,
        is_told: Callable[[int], bool],
    ) -> None:
        self._config, self._world, self._together, self._rounds = config, world, mesh.together, rounds
        self._gradients, self._warmup, self._step = gradients, warmup, 0
        self._copy, self._copies, self._is_told = mesh.place.replicate, mesh.layout.replicate, is_told
        self._due: list[bool] = []

    def agree(self, step: int, tokens: float, due: Sequence[bool], votes: Sequence[float]) -> list[float]:
        self._step = step
        self._due = [now or before for now, before in zip(due, self._due or due, strict=True)]
        agreed = self._together.sum(tokens) + [0.0 for _ in due]
        if (step + 1) % self._config.interval == 0:
            agreed[1:] = self._world.sum(*self._due)
            self._due = []
        if step % self._config.interval == 0:
            agreed += self._world.sum(*votes)
        return agreed

    def begin(self) -> None:
        self._rounds.begin()

    def exchange(self) -> None:
        if self._step < self._warmup:
            self._gradients.exchange()

    def after_step(self, step: int, update: Update) -> Update:
        self._rounds.after_step(step)
        if self._is_told(step):
            # Every rank of a copy has the copy's figures, and all copies have as many ranks.
            loss, norm = self._world.sum(update.loss, update.gradient_norm)
            update = replace(update, loss=loss / self._world.size, gradient_norm=norm / self._world.size)
        return replace(update, tokens=update.tokens * self._copies)  # as many in each, but for a few

    def evaluating(self) -> AbstractContextManager[None]:
        return self._rounds.anchored()

    def state(self, own: Tensors) -> dict[str, Tensor]:
        return self._of(self._copy, own) | self._rounds.shared()

    def loading(self, own: Tensors, folder: Path) -> dict[str, Tensor]:
        saved = manifest.read(folder).layout["replicate"]
        return self._of(self._copy % saved, own) | self._rounds.shared()

    def loaded(self, step: int) -> None:
        self._rounds.loaded(step)

    def _of(self, copy: int, own: Tensors) -> dict[str, Tensor]:
        return {f"{OF_COPY}{copy}.{name}": tensor for name, tensor in own.items()}
