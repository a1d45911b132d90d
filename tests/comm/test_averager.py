"""Means over copies: in every form near the mean, the same bits on all, the messages untouched; failures arrive."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

FORMS = {"none": 1e-7, "fp16": 1e-3, "int8": 1.2e-2}
"""Largest error, as a share of a message's largest element."""


def means_of(form: str, in_background: bool) -> list[np.ndarray]:
    import torch
    import torch.distributed as dist

    from muster.comm.averager import GroupAverager
    from muster.parallel.world import join

    with join() as world:
        averager = GroupAverager(dist.new_group(), form, in_background=in_background)  # type: ignore[arg-type]
        messages = messages_of(world.rank)
        means = averager.start(messages).result()
        assert all(map(torch.equal, messages, messages_of(world.rank)))
        return [mean.numpy() for mean in means]


def messages_of(rank: int) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(size, generator=generator) * 10**-power for power, size in enumerate((1000, 1, 257))]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("in_background", [False, True])
def test_the_mean(form: str, in_background: bool, run_ranks: Any) -> None:
    found = run_ranks(3, means_of, form, in_background)
    for place, whole in enumerate(zip(*map(messages_of, range(3)), strict=True)):
        expected = sum(message.double() for message in whole).numpy() / 3
        largest = max(float(message.abs().max()) for message in whole)
        assert abs(found[0][place] - expected).max() <= FORMS[form] * largest
        assert all(np.array_equal(found[0][place], other[place]) for other in found[1:])


def fails_where_a_member_is_gone() -> str:
    import os

    import torch
    import torch.distributed as dist

    from muster.comm.averager import GroupAverager
    from muster.parallel.world import join

    with join() as world:
        averager = GroupAverager(dist.new_group(), "none", in_background=True)
        averager.start([torch.zeros(4)]).result()
        if world.rank == 1:
            os._exit(1)
        with pytest.raises(RuntimeError) as error:
            averager.start([torch.zeros(1 << 20)]).result()
        return str(error.value)


def test_a_member_that_dies_is_an_exception(run_ranks: Any) -> None:
    with pytest.raises(RuntimeError, match="rank 1 died"):
        run_ranks(2, fails_where_a_member_is_gone)
