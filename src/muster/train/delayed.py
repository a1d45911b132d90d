"""Gradients that copies average between the passes and the optimizer: at once, or one step late.

One-step-delayed gradients: the copies sum step t's gradients during step t + 1's passes, and apply them after those.
The delayed parameter update of ZeRO-Offload (Ren et al. 2021) and of SWARM (Ryabinin et al. 2023), for the exchange
between copies: the parameters stay the same bits on every copy, one update behind. What the last step's gradients
say is not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor, nn

from muster.comm.averager import Averager
from muster.train.rounds import local, unit_of


class MeanGradients:
    """The mean over copies in the place of each copy's own gradients."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], averager: Averager) -> None:
        """`parameters` are this rank's, second copies included, equal on all copies."""
        self._parameters, self._averager = parameters, averager
        self._units: dict[str, list[str]] = {}
        for name in parameters:
            self._units.setdefault(unit_of(name), []).append(name)

    @torch.no_grad()
    def exchange(self) -> None:
        self._replace(self._averager.start(self._gradients()).result())

    def _gradients(self) -> list[Tensor]:
        """One message a unit."""
        return [self._flat(unit) for unit in self._units.values()]

    def _replace(self, means: Sequence[Tensor]) -> None:
        for unit, mean in zip(self._units.values(), means, strict=True):
            for name, part in self._apart(unit, mean):
                gradient = self._parameters[name].grad
                assert gradient is not None
                local(gradient).copy_(part)

    def _flat(self, unit: Sequence[str]) -> Tensor:
        gradients = [self._parameters[name].grad for name in unit]
        return torch.cat([local(gradient).reshape(-1) for gradient in gradients if gradient is not None])

    def _apart(self, unit: Sequence[str], mean: Tensor) -> list[tuple[str, Tensor]]:
        shapes = [local(self._parameters[name].detach()).shape for name in unit]
        parts = torch.split(mean, [shape.numel() for shape in shapes])
        return [(name, part.view(shape)) for name, shape, part in zip(unit, shapes, parts, strict=True)]


class DelayedGradients(MeanGradients):
    def __init__(self, parameters: Mapping[str, nn.Parameter], averager: Averager) -> None:
        super().__init__(parameters, averager)
        self._pending = {name: torch.zeros_like(p.detach()) for name, p in parameters.items()}
        self._flight: Future[list[Tensor]] | None = None

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the mean gradients of the step before in the place of this step's, which are sent off; none in the first
        step."""
        mine = self._gradients()
        before = None if self._flight is None else self._flight.result()
        self._flight = self._averager.start(mine)
        if before is not None:
            self._replace(before)
            return
        for parameter in self._parameters.values():
            parameter.grad = None

    def shared(self) -> dict[str, Tensor]:
        """The gradients under way, by name (`pending.X`), for which this waits; zeros before the first step."""
        if self._flight is not None:
            for unit, mean in zip(self._units.values(), self._flight.result(), strict=True):
                for name, part in self._apart(unit, mean):
                    local(self._pending[name]).copy_(part)
        return {f"pending.{name}": tensor for name, tensor in self._pending.items()}

    def loaded(self) -> None:
        """The tensors of `shared` have been filled with those of a run that has begun."""
        self._flight = Future()
        units = self._units.values()
        self._flight.set_result(
            [torch.cat([local(self._pending[name]).reshape(-1) for name in unit]) for unit in units]
        )
