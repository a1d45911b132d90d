"""When memory runs out: what a rank should need by the formulas beside what it held, and what would save most."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import psutil
import torch

from muster.errors import DoesNotFit
from muster.observe.format import size
from muster.observe.memory import held_bytes
from muster.parallel.savings import Device, needs, savings
from muster.parallel.world import usable_cores
from muster.train.plan import Training

_MOST_FIXES = 3
_WANTED = re.compile(r"[Tt]ried to allocate ([0-9.]+) ?(bytes|[KMG]iB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_COMPONENTS = ("parameters", "gathered", "optimizer", "gradients", "activations", "pipeline")

Method = TypeVar("Method", bound=Callable[..., Any])


def explained(method: Method) -> Method:
    """Of a trainee's method: DoesNotFit, with the report, where an allocator of torch or Python fails."""

    @functools.wraps(method)
    def wrapper(trainee: Any, *arguments: Any, **named: Any) -> Any:
        try:
            return method(trainee, *arguments, **named)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            world = trainee.world
            text = report(
                trainee.plan,
                rank=world.rank,
                on_gpu=world.device.type == "cuda",
                held=_held(trainee),
                total_bytes=_total_bytes(world.device),
                error=str(error),
            )
            raise DoesNotFit(text) from None

    return cast(Method, wrapper)


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def report(
    training: Training,
    *,
    rank: int,
    on_gpu: bool,
    total_bytes: int,
    held: Mapping[str, int] | None = None,
    error: str = "",
) -> str:
    """A sentence, then the components and the best changes, a line each.

    `total_bytes` is what the rank held in all, `held` that by component as far as it is known.
    """
    run, spec, layout, held = training.run, training.spec, training.layout, held or {}
    device: Device = "cuda" if on_gpu else "cpu"
    expected = needs(run, spec, layout, sequence=training.sequence, device=device, rank=rank)
    lines = [
        f"rank {rank} ran out of memory at {size(total_bytes)}{_asked(error)}; by the formulas its tensors need "
        f"{size(expected.total_bytes)} at their peak:"
    ]
    for name in _COMPONENTS:
        formula = getattr(expected, f"{name}_bytes")
        if formula or held.get(name):
            actual = f", held {size(held[name])}" if name in held else ""
            lines.append(f"  {name}: expected {size(formula)}{actual}")
    if held:
        rest = max(total_bytes - sum(held.values()), 0)
        lines.append(f"  all else, with activations and the program itself: held {size(rest)}")
    found = savings(
        run,
        spec,
        layout,
        sequence=training.sequence,
        device=device,
        cores=usable_cores(),
        gpus=torch.cuda.device_count(),
    )
    for number, saving in enumerate(found[:_MOST_FIXES], start=1):
        lines.append(f"  try {number}: {saving.change}, which saves {size(saving.saves_bytes)} of it")
    if not found:
        lines.append("  no other layout of these ranks needs less: use more of them, or a smaller model")
    return "\n".join(lines)


def _asked(error: str) -> str:
    wanted = _WANTED.search(error)
    return f", asking for {size(float(wanted[1]) * _UNITS[wanted[2]])} more" if wanted else ""


def _held(trainee: Any) -> dict[str, int]:
    """What this rank holds now, by component; gathered parameters and activations are among the rest."""
    if not hasattr(trainee, "optimizer"):
        return {}
    named = [parameter for _, parameter in [*trainee.model.named_parameters(), *trainee.model.copies()]]
    return {
        "parameters": held_bytes(named),
        "optimizer": held_bytes(trainee.optimizer.state().values()),
        "gradients": held_bytes(p.grad for p in named if p.grad is not None),
    }


def _total_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
