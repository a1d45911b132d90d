"""`train.sync`: what cannot be is refused before anything runs, and the values that a refusal names work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from muster.config.load import load_resolved
from muster.errors import ConfigError
from muster.model.build import spec_from_config
from muster.parallel.layout import Layout, resolve
from tests.toy import STEPS, tiny

TWO = {"replicate": 2}


def decide(sync: dict[str, Any] | None, layout: dict[str, Any] | str) -> Layout:
    run = tiny(layout=layout)
    run["train"] = run["train"] | {"sync": sync}
    resolved = load_resolved(run)
    return resolve(resolved, spec_from_config(resolved.model, 500, Path()), cores=2, gpus=0)


def diloco(**keys: Any) -> dict[str, Any]:
    return {"kind": "diloco", "every": 6} | keys


@pytest.mark.parametrize(
    ("sync", "layout", "message"),
    [
        (diloco(fragments=4), TWO, r"fragments \(4\) must divide every \(6\): nearest legal value is 3"),
        (diloco(fragments=2, overlap=3), TWO, r"overlap \(3\) must be less than every / fragments \(3\).*use 2 or"),
        (diloco(every=20), TWO, rf"sync.every \(20\) is more than the {STEPS} steps of the run.*use {STEPS} or less"),
        (diloco(mix=0), TWO, r"train.sync.mix: should be more than 0 \(got 0\)"),
        (diloco(outer={"lr": -1}), TWO, r"train.sync.outer.lr: should be more than 0"),
        ({"kind": "dilocco"}, TWO, r"local_sgd, diloco or delayed .* did you mean 'diloco'\?"),
        ({"every": 3}, TWO, r"train.sync.kind: required"),
        ({"kind": "local_sgd", "every": 6, "compress": "int8"}, TWO, r"compress mean nothing.*write kind: diloco"),
        ({"kind": "delayed", "every": 3, "overlap": 1}, TWO, r"every and overlap mean nothing to kind: delayed"),
        (diloco(), {}, r"layout.replicate: train.sync diloco is between copies, but there is one: use 2 or more"),
        (diloco(), {"shard": 2}, r"layout.replicate: train.sync diloco is between copies"),
        (diloco(fragments=3), TWO, r"train.sync.fragments \(3\) are groups of layers, of which there are 2"),
        (diloco(), TWO | {"context": 2, "zero": 0}, r"layout.zero: under train.sync .* use zero: 1 or more"),
        (diloco(), TWO | {"compress": {"gradients": "powersgd"}}, r"remove it, or use train.sync.compress"),
        (diloco(), TWO | {"compress": {"gradients": "int8"}}, r"remove it, or use train.sync.compress"),
    ],
    ids=str,
)  # fmt: skip
def test_refusals(sync: dict[str, Any], layout: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decide(sync, layout)


def test_what_refusals_name_works() -> None:
    decide(diloco(fragments=2, overlap=2), TWO)
    decide(diloco(every=STEPS), TWO)
    decide(diloco(fragments=2), TWO)
    decide({"kind": "delayed", "compress": "fp16"}, "auto")
    assert decide(diloco(), TWO | {"context": 2}).zero == 1


def test_defaults_are_the_papers() -> None:
    from muster.config.sync import Sync

    sync = Sync(kind="diloco")
    assert (sync.outer.lr, sync.outer.momentum, sync.share) == (0.7, 0.9, 1.0)
    assert Sync(kind="diloco", overlap=1).share == 0.5


def test_the_layout_leaves_copies_out_of_what_a_step_averages() -> None:
    together, apart = (
        decide(None, {"replicate": 2, "shard": 2}),
        decide(diloco(), {"replicate": 2, "shard": 2}),
    )
    assert (together.averaged, apart.averaged, apart.is_local) == (4, 2, True)
    assert not decide({"kind": "delayed"}, TWO).is_local
