"""Where copies that train apart meet: an exchange that fails, the mean to the last bit, and what is sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from muster.model.transformer import initial_value


def test_a_meeting_that_fails_changes_nothing_and_may_be_repeated(run_ranks: Any) -> None:
    for overlap in (0, 1):
        for failures, final in run_ranks(2, meet_with_failures, overlap):
            assert failures == 2
            assert final < 1e-6


def meet_with_failures(overlap: int) -> tuple[int, float]:
    """An exchange of which the first two fail, as when a copy is lost; the distance from the mean in the end."""
    from concurrent.futures import Future

    import torch.distributed as dist

    from muster.comm.averager import GroupAverager
    from muster.config.sync import Outer, Sync
    from muster.parallel.world import join
    from muster.train.rounds import Rounds

    class Lossy:
        def __init__(self, honest: GroupAverager) -> None:
            self.honest, self.left = honest, 2

        def start(self, messages: Any) -> Future[list[Tensor]]:
            if self.left:
                self.left -= 1
                lost: Future[list[Tensor]] = Future()
                lost.set_exception(RuntimeError("a copy was lost"))
                return lost
            return self.honest.start(messages)

    with join() as world:
        weight = torch.zeros(3, 5)
        sync = Sync(kind="diloco", every=2, overlap=overlap, mix=1.0, outer=Outer(lr=1.0, momentum=0.0))
        rounds = Rounds(
            {"norm.weight": weight},
            {},
            sync,
            Lossy(GroupAverager(dist.new_group(), "none", in_background=False)),
            last=9,
        )
        weight.fill_(float(world.rank + 1))
        before = weight.clone()
        failures = 0
        for step in range(1, 4):
            while True:
                try:
                    rounds.after_step(step)
                    break
                except RuntimeError:
                    failures += 1
                    assert torch.equal(weight, before)
                    assert not rounds.anchors["norm.weight"].any()
        return failures, float((weight - 1.5).abs().max())


def test_local_sgd_every_step_is_the_mean_exactly(run_ranks: Any) -> None:
    found = run_ranks(2, values_and_mean)
    (mine, mean), (theirs, also) = found
    assert np.array_equal(mean, (mine + theirs) / 2)
    assert np.array_equal(mean, also)


def values_and_mean() -> tuple[np.ndarray, np.ndarray]:
    import torch.distributed as dist

    from muster.comm.averager import GroupAverager
    from muster.config.sync import Sync
    from muster.parallel.world import join
    from muster.train.rounds import Rounds

    with join() as world:
        weight = torch.zeros(7, 5)
        averager = GroupAverager(dist.new_group(), "none", in_background=False)
        rounds = Rounds({"norm.weight": weight}, {}, Sync(kind="local_sgd", every=1), averager, last=9)
        weight.normal_(generator=torch.Generator().manual_seed(world.rank))
        mine = weight.clone()
        rounds.after_step(1)
        return mine.numpy(), weight.numpy()


@pytest.mark.parametrize(
    ("family", "degrees"),
    [
        ("llama", {}),
        ("llama", {"shard": 2, "zero": 3}),
        ("gpt2", {"tensor": 2}),
        ("llama", {"pipeline": 2, "accumulate": 4, "microbatch": 1}),
        ("dots1", {"shard": 2, "expert": 2, "zero": 1}),
    ],
    ids=str,
)
def test_an_exchange_sends_what_the_formula_says(
    family: str, degrees: dict[str, Any], run_ranks: Any
) -> None:
    for pairs in run_ranks(4 if degrees else 2, measured_and_expected, family, degrees):
        for measured, expected in pairs:
            assert measured == expected
            assert any(axis == "replicate" for axis, _ in measured)


def measured_and_expected(family: str, degrees: dict[str, Any]) -> list[tuple[Any, Any]]:
    from muster.comm.averager import GroupAverager
    from muster.comm.meter import Meter
    from muster.config.sync import Sync
    from muster.parallel.layout import Layout
    from muster.parallel.mesh import Mesh
    from muster.parallel.model import ParallelModel
    from muster.parallel.traffic import expected_traffic, sync_traffic
    from muster.parallel.world import join
    from muster.train.rounds import Rounds
    from tests.ranks.test_traffic import DOTS, GPT2, SEQUENCE, TIED, Case, microbatches

    spec = {"llama": TIED, "gpt2": GPT2, "dots1": DOTS}[family]
    given = {"shard": 1, "zero": 0, "microbatch": 2, "accumulate": 2, "recompute": "none", "reason": ""}
    given |= {"replicate": 2, "sync": "diloco", "sequence_parallel": "tensor" in degrees} | degrees
    layout = Layout(**given)
    found = []
    with join() as world:
        mesh = Mesh(layout, world.device)
        model = ParallelModel(
            spec,
            mesh,
            sequence=SEQUENCE,
            compute=torch.float32,
            value=lambda name, shape: initial_value(name, shape, spec, 0),
        )
        batch = list(microbatches(mesh, Case(spec)))
        model.train(batch, 0.01)  # a pipeline's first step begins with a handshake
        with Meter(mesh.groups) as meter:
            model.train(batch, 0.01)
        expected = expected_traffic(spec, layout, world.rank, sequence=SEQUENCE, compute=torch.float32)
        if family != "dots1":  # whose tokens go where the router sends them
            assert meter.traffic == expected
        assert not any("replicate" in axis for axis, _ in meter.traffic)
        for form in ("none", "fp16", "int8"):
            averager = GroupAverager(mesh.copies_group(), form, in_background=False)
            parameters = dict(model.named_parameters()) | {f"copy of {name}": p for name, p in model.copies()}
            rounds = Rounds(
                parameters,
                dict(model.named_buffers()),
                Sync(kind="diloco", every=1, compress=form),
                averager,
                last=9,
            )
            with Meter({"replicate": mesh.groups["replicate"]}) as meter:
                rounds.after_step(1)
            expected = sync_traffic(spec, layout, world.rank, sequence=SEQUENCE, form=form)
            found.append((meter.traffic, expected))
        world.barrier()  # the first rank's store is everybody's
    return found
