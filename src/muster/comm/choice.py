"""Which compression a run file asks for, and when it has no effect.

gradients   over the shard axis                 over copies (the replicate axis)
none        reduce-scatter in fp32              FSDP2's own all-reduce in fp32
bf16, fp16  the same in that dtype              the same
int8        int8 all-to-all, summed in fp32     int8 all-reduce
powersgd    reduce-scatter in fp32              low-rank factors

parameters  over the shard axis
none        all-gather in the compute dtype
int8        all-gather of int8
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


Form = Literal["none", "fp16", "int8"]
"""In what form copies that train apart send each other fp32 messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """`layout.compress` of a run file."""

    gradients: Literal["none", "bf16", "fp16", "int8", "powersgd"] = "none"
    parameters: Literal["none", "int8"] = "none"
    rank: int = 4
    """Of PowerSGD's factors."""

    @property
    def reduce_dtype(self) -> torch.dtype:
        """The dtype in which FSDP2 reduces gradients, or in which received int8 chunks are summed."""
        import torch  # plans are made without it

        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.gradients, torch.float32)

    @property
    def takes_over_copies(self) -> bool:
        """Whether FSDP2 must be given the shard axis alone."""
        return self.gradients in ("int8", "powersgd")


def problems(choice: Choice, *, replicate: int, shard: int) -> list[str]:
    """What of a choice has no effect on such a layout, each as a sentence for the run file's author."""
    found = []
    if choice.gradients != "none" and replicate * shard == 1:
        found.append(
            f"layout.compress.gradients: {choice.gradients} has nothing to compress on one rank; remove it"
        )
    elif choice.gradients == "powersgd" and replicate == 1:
        found.append(
            "layout.compress.gradients: powersgd compresses between copies, but layout.replicate is 1; "
            "use int8, or replicate 2 or more"
        )
    if choice.parameters == "int8" and shard == 1:
        found.append(
            "layout.compress.parameters: int8 compresses the gathering of shards, but layout.shard is 1; remove it, "
            "or use shard 2 or more"
        )
    return found
