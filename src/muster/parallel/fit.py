"""The largest layout that a number of ranks can train: model axes stay, data axes shrink. Pure.

The global batch is the run's, so fewer ranks accumulate more. Whole copies (replicate) go first, because a smaller
shard axis means more memory on each rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from muster.config import schema
from muster.errors import ConfigError
from muster.model.spec import TransformerSpec
from muster.parallel.layout import Layout, resolve


def fit(run: schema.Run, spec: TransformerSpec, ranks: int, *, cores: int, gpus: int) -> Layout | None:
    """The layout of most ranks, `ranks` at most, that is legal; never larger than the run file's. None if none is."""
    for world, layout in _candidates(run.layout, ranks):
        try:
            return resolve(replace(run, layout=layout), spec, cores=cores, gpus=gpus, ranks=world)
        except ConfigError:
            continue
    return None


def least(said: schema.Layout | Literal["auto"]) -> int:
    """Ranks below which no layout can be: the product of the model axes."""
    return 1 if isinstance(said, str) else said.context * said.tensor * said.pipeline


def _candidates(
    said: schema.Layout | Literal["auto"], ranks: int
) -> list[tuple[int, schema.Layout | Literal["auto"]]]:
    if isinstance(said, str):
        return [(world, said) for world in range(ranks, 0, -1)]
    model = least(said)
    sizes = [
        (replicate, shard)
        for replicate in range(1, said.replicate + 1)
        for shard in range(1, said.shard + 1)
        if replicate * shard * model <= ranks
    ]
    sizes.sort(key=lambda size: (size[0] * size[1], size[1]), reverse=True)
    # zero: 0 goes with shard: 1 only, and the others need no change: `resolve` takes 0 where nothing is sharded.
    return [(r * s * model, replace(said, replicate=r, shard=s)) for r, s in sizes]
