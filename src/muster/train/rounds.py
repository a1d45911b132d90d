"""Copies that train apart and meet every so many steps: local SGD, DiLoCo and streaming DiLoCo.

    local SGD  (Stich 2019)                 parameters become their mean over the copies
    DiLoCo     (Douillard et al. 2023)      the anchor, which is what the copies started from, takes a step of SGD with
                                            Nesterov's momentum along the mean of anchor - parameters; all go on from it
    streaming  (Douillard et al. 2025)      fragments of the layers do so in turn; the mean may arrive `overlap` steps
                                            later, and a copy's parameters then move only a share (`mix`) of the way

At first, for the steps of `warmup`, gradients are averaged in each step (post-local SGD, Lin et al. 2020), and the
anchor is what all copies hold.

The anchor is the trained model: it is the same on all copies at any time, and what is evaluated, saved and exported.
An outer step happens whole or not at all: it starts when every mean has arrived, and an exchange that fails may be
tried again. Compressed changes are sent without error feedback: int8 takes at most 1/254 of a block's largest change
(`comm/quantize.py`), the streaming paper loses nothing with four bits, and residuals would be state of each rank's own
that nobody can reshard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from muster.checkpoint.state import WEIGHTS
from muster.comm.averager import Averager
from muster.config import schema


@dataclass(frozen=True, slots=True)
class _Member:
    """One parameter or buffer on this rank: of DTensors, its shards."""

    name: str
    held: Tensor
    anchor: Tensor
    momentum: Tensor | None
    """None where the mean is taken as it is: of buffers, and in local SGD."""

    @property
    def value(self) -> Tensor:
        # Asked for each time, because FSDP2 moves shards that do not divide evenly before the first step.
        return local(self.held.detach())


@dataclass(slots=True)
class _Flight:
    """The exchange that is under way."""

    fragment: int
    sent: list[Tensor]
    means: Future[list[Tensor]] | None
    """None after a failure."""


class Rounds:
    """The shared state of copies that meet; the names of its tensors are the same at any time."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        config: schema.Sync,
        averager: Averager,
        *,
        last: int,
    ) -> None:
        """`parameters` and `buffers` are this rank's, by the undivided model's names, and equal on all copies now.

        `last`: the steps of the run.
        """
        self._config, self._averager = config, averager
        values = dict(parameters) | dict(buffers)
        self.anchors = {name: value.detach().clone() for name, value in values.items()}
        """The trained model, by name."""
        self._momenta: dict[str, Tensor] = {}
        if config.kind == "diloco":
            self._momenta = {name: torch.zeros_like(self.anchors[name]) for name in parameters}
        self._fragments: list[dict[str, list[_Member]]] = [{} for _ in range(config.fragments)]
        for name, value in values.items():
            momentum = self._momenta.get(name)
            member = _Member(
                name,
                value,
                local(self.anchors[name]),
                None if momentum is None else local(momentum),
            )
            unit = unit_of(name)
            self._fragments[fragment_of(unit, config.fragments)].setdefault(unit, []).append(member)
        # Memory for what arrives, where saving may come before its use.
        pending = self.anchors if config.overlap else {}
        self._pending = {name: torch.zeros_like(anchor) for name, anchor in pending.items()}
        self._buffers = [member for member in self._members() if member.name in buffers]
        self._last, self._begun, self._warmup = last, 0, config.warmup_steps(last)
        self._flight: _Flight | None = None

    def begin(self) -> None:
        """Start from the parameters as they are now, equal on all copies."""
        for member in self._members():
            member.anchor.copy_(member.value)

    def _members(self) -> Iterator[_Member]:
        return (member for fragment in self._fragments for unit in fragment.values() for member in unit)

    def after_step(self, step: int) -> None:
        """Meet, where that is due after `step` finished steps, and after the last one in any case.

        If that fails, the same call may be made again.
        """
        if step <= self._warmup:
            if step % self._config.interval == 0 or step in (self._warmup, self._last):
                self._follow()
            return
        if step % self._config.interval == 0 and step != self._begun:
            fragment = self._fragment_of(step)
            self._flight = _Flight(fragment, self._changes(fragment), None)
            self._begun = step
            self._flight.means = self._averager.start(self._flight.sent)
        is_due = step % self._config.interval >= self._config.overlap or step == self._last
        if self._flight is not None and is_due:
            self._apply(self._flight)
            self._flight = None
        if step == self._last:
            self._close(step)

    @torch.no_grad()
    def _follow(self) -> None:
        """The copies, which have the same parameters, become the anchor; their buffers are averaged."""
        if self._buffers:
            changes = [_flat([member.anchor - member.value for member in self._buffers])]
            (mean,) = self._averager.start(changes).result()
            parts = torch.split(mean, [member.value.numel() for member in self._buffers])
            for member, part in zip(self._buffers, parts, strict=True):
                member.value.copy_(member.anchor - part.view(member.value.shape))
        self.begin()

    def _fragment_of(self, step: int) -> int:
        """Whose exchange begins after `step` steps."""
        return (step // self._config.interval - 1) % self._config.fragments

    @torch.no_grad()
    def _close(self, step: int) -> None:
        """Have all copies hold the anchor. Where they have taken steps since they met, it becomes their mean, without
        an outer step: momentum is that of whole rounds."""
        if self._config.fragments == 1 and step % self._config.every == 0 and self._config.overlap == 0:
            return
        for fragment in range(self._config.fragments):
            means = self._averager.start(self._changes(fragment)).result()
            for member, mean in self._apart(fragment, means):
                self._take_mean(member, mean)
                member.value.copy_(member.anchor)

    @contextmanager
    def anchored(self) -> Iterator[None]:
        """Within, parameters are the anchor's, for evaluation."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def shared(self) -> dict[str, Tensor]:
        """State that is equal on all copies, by name: the anchor as `weights.X`, `outer.X`, and, where exchanges
        overlap, `pending.X`: what the one under way brings, for which this waits, and else zeros."""
        state = {WEIGHTS + name: anchor for name, anchor in self.anchors.items()}
        state |= {f"outer.{name}": momentum for name, momentum in self._momenta.items()}
        for tensor in self._pending.values():
            tensor.zero_()
        if self._flight is not None and self._pending:
            for member, mean in self._apart(self._flight.fragment, self._means(self._flight)):
                local(self._pending[member.name]).copy_(mean)
        return state | {f"pending.{name}": tensor for name, tensor in self._pending.items()}

    def loaded(self, step: int) -> None:
        """The tensors of `shared` have been filled with those of `step` steps."""
        self._flight, self._begun = None, step
        since = step % self._config.interval
        if step - since <= self._warmup or since >= self._config.overlap or step == self._last:
            return
        fragment, means = self._fragment_of(step), Future[list[Tensor]]()
        units = self._fragments[fragment].values()
        means.set_result([_flat([local(self._pending[m.name]) for m in unit]) for unit in units])
        self._flight = _Flight(fragment, [], means)

    @torch.no_grad()
    def _changes(self, fragment: int) -> list[Tensor]:
        """One message a unit, whole units together: a second copy of one then gets the same bits as the first."""
        units = self._fragments[fragment].values()
        if self._config.kind == "local_sgd":  # their mean to the last bit, which a change's would not be
            return [_flat([member.value for member in unit]) for unit in units]
        return [_flat([member.anchor - member.value for member in unit]) for unit in units]

    def _means(self, flight: _Flight) -> list[Tensor]:
        if flight.means is None:
            flight.means = self._averager.start(flight.sent)
        try:
            return flight.means.result()
        except BaseException:
            flight.means = None
            raise

    @torch.no_grad()
    def _apply(self, flight: _Flight) -> None:
        outer, share = self._config.outer, self._config.share
        for member, mean in self._apart(flight.fragment, self._means(flight)):
            anchor, momentum = member.anchor, member.momentum
            if momentum is None:
                self._take_mean(member, mean)
            else:
                momentum.mul_(outer.momentum).add_(mean)
                anchor.sub_(mean, alpha=outer.lr).sub_(momentum, alpha=outer.lr * outer.momentum)
            if share == 1:
                member.value.copy_(anchor)
            else:
                member.value.lerp_(anchor, share)

    @torch.no_grad()
    def _take_mean(self, member: _Member, mean: Tensor) -> None:
        if self._config.kind == "local_sgd":
            member.anchor.copy_(mean)
        else:
            member.anchor.sub_(mean)

    def _apart(self, fragment: int, means: Sequence[Tensor]) -> Iterator[tuple[_Member, Tensor]]:
        """Each member of a fragment with its part of a message."""
        for unit, message in zip(self._fragments[fragment].values(), means, strict=True):
            parts = torch.split(message, [member.value.numel() for member in unit])
            for member, part in zip(unit, parts, strict=True):
                yield member, part.view(member.value.shape)

    @torch.no_grad()
    def _swap(self) -> None:
        for member in self._members():
            kept = member.value.clone()
            member.value.copy_(member.anchor)
            member.anchor.copy_(kept)


def unit_of(name: str) -> str:
    """`layers.3` for a parameter of that block; else the parameter's own name."""
    return ".".join(name.split(".")[:2]) if name.startswith("layers.") else name


def fragment_of(unit: str, fragments: int) -> int:
    """Blocks are dealt in turn, so that each fragment has early and late ones; the embedding goes with the first
    fragment, what follows the blocks with the last."""
    if unit.startswith("layers."):
        return int(unit.removeprefix("layers.")) % fragments
    return 0 if "embed" in unit or "position" in unit else fragments - 1


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
