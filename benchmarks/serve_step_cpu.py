"""What a step of the serving engine takes besides its kernels: with all operations in one call, and one by one.

    python benchmarks/serve_step_cpu.py [--shape m160|1b] [--formats int8 int4] [--streams 1 32] [--json FILE]

Greedy requests decode in two engines over the same random weights, which take turns of a few steps each, so that a busy
machine slows both. The best turn of each counts. Time in the kernels is that of their calls; all else is Python, torch
and numpy: the scheduler, the batch's tensors, the calls themselves, the draw.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from cells import machine
from serve_kernels_cpu import SHAPES, random_weights

from muster.model.transformer import materialize
from muster.serve.engine.core import Core
from muster.serve.engine.network import TransformerNetwork
from muster.serve.engine.packed import PackedModel, pack_model
from muster.serve.kernels.build import load_library
from muster.serve.kernels.native import Native
from muster.serve.kernels.shape import Trunk
from muster.serve.protocol import Request, SamplingParams

BLOCK_TOKENS = 32
PROMPT_TOKENS = 64
CONTEXT_TOKENS = 1024


class Timed(Native):
    """Adds up the time of its calls."""

    def __init__(self, library: ctypes.CDLL, compute: torch.dtype) -> None:
        super().__init__(library, compute)
        self.kernel_s = 0.0
        for name, function in list(vars(self._library).items()):
            setattr(self._library, name, self._timed(function))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: object) -> Any:
            began_s = time.perf_counter()
            result = function(*arguments)
            self.kernel_s += time.perf_counter() - began_s
            return result

        return call


class OneByOne(Timed):
    """Without the stack."""

    def stack(self, trunk: Trunk) -> None:
        return None


@dataclass
class Side:
    """An engine, and its best turn so far."""

    core: Core
    kernels: Timed
    step_s: float = float("inf")
    outside_s: float = float("inf")

    def take_turn(self, steps: int) -> None:
        before_s, began_s = self.kernels.kernel_s, time.perf_counter()
        for _ in range(steps):
            self.core.step()
        step_s = (time.perf_counter() - began_s) / steps
        self.step_s = min(self.step_s, step_s)
        self.outside_s = min(self.outside_s, step_s - (self.kernels.kernel_s - before_s) / steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="m160")
    parser.add_argument("--formats", nargs="+", choices=("bf16", "int8", "int4"), default=["int8", "int4"])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = materialize(SHAPES[arguments.shape], random_weights, dtype=torch.bfloat16)
    print(f"{'format':>6}{'streams':>9}{'calls':>12}{'tok/s':>9}{'step ms':>9}{'outside of kernels ms':>23}")
    rows = []
    for format in arguments.formats:
        packed = pack_model(model, format)
        for streams in arguments.streams:
            sides = {"one": side(Timed, packed, streams), "one by one": side(OneByOne, packed, streams)}
            for _ in range(arguments.turns):
                for one in sides.values():
                    one.take_turn(arguments.steps)
            for name, one in sides.items():
                rows.append(
                    {
                        "format": format, "streams": streams, "calls": name, "step_s": one.step_s,
                        "outside_s": one.outside_s, "tokens_per_s": streams / one.step_s,
                    }
                )  # fmt: skip
                print(f"{format:>6}{streams:9}{name:>12}{streams / one.step_s:9.0f}{one.step_s * 1e3:9.2f}"
                      f"{one.outside_s * 1e3:23.2f}", flush=True)  # fmt: skip
    if arguments.json:
        result = {"machine": machine(), "date": date.today().isoformat(), "torch": torch.__version__}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")


def side(kind: type[Timed], packed: PackedModel, streams: int) -> Side:
    """An engine in which so many requests are past their prompts."""
    kernels = kind(load_library()[0], packed.compute)
    network = TransformerNetwork(packed, kernels)
    blocks = streams * CONTEXT_TOKENS // BLOCK_TOKENS + streams + 1
    core = Core(
        network, network.new_cache(blocks, BLOCK_TOKENS), streams=streams, step_tokens=512,
        context_tokens=CONTEXT_TOKENS,
    )  # fmt: skip
    params = SamplingParams(max_tokens=CONTEXT_TOKENS - PROMPT_TOKENS, temperature=0.0)
    for number in range(streams):
        prompt = tuple(torch.randint(packed.spec.vocab, (PROMPT_TOKENS,)).tolist())
        core.add(Request(id=str(number), prompt=prompt, params=params))
    while core.stats().generated_tokens < streams:
        core.step()
    return Side(core, kernels)


if __name__ == "__main__":
    main()
