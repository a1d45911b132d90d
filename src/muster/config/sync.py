"""The `train.sync:` section of the run file: how often the copies on the replicate axis exchange what they learn."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from muster.config.fields import STRICT, Number, Positive
from muster.config.units import Fraction


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Outer:
    """DiLoCo's outer optimizer: SGD with Nesterov's momentum on the mean of what the copies changed."""

    lr: Annotated[Number, Field(gt=0)] = 0.7
    """Outer learning rate."""
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    """Decay of the outer momentum."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Sync:
    """How the copies of `layout.replicate` stay together where they do not sum their gradients every step."""

    kind: Literal["local_sgd", "diloco", "delayed"]
    """local_sgd: each copy takes steps of its own, then parameters are averaged (Stich 2019); diloco: an outer
    optimizer takes the mean change instead (Douillard et al. 2023); delayed: every step's gradients are
    summed during the next step's passes and applied after them."""
    every: Positive = 20
    """Steps between two exchanges of the same parameters (local_sgd, diloco)."""
    warmup: Fraction = 0.0
    """Share of the steps, at the beginning, in which copies take the mean of their gradients, before they train apart
    (local_sgd, diloco; Lin et al. 2020)."""
    fragments: Positive = 1
    """Groups of layers that diloco exchanges in turn (streaming, Douillard et al. 2025); must divide `every`."""
    overlap: Annotated[int, Field(ge=0, le=2**31 - 1, strict=True)] = 0
    """Steps that diloco goes on between the start of an exchange and the use of its result."""
    mix: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Share of diloco's result in a copy's parameters, the rest being its own.
    Default: 0.5 where `overlap` is 1 or more, else 1."""
    compress: Literal["none", "fp16", "int8"] = "none"
    """In what form changes (diloco) or gradients (delayed) travel."""
    outer: Outer = Field(default_factory=Outer)

    @property
    def is_local(self) -> bool:
        """Copies take steps of their own, and differ in between."""
        return self.kind != "delayed"

    @property
    def interval(self) -> int:
        """Steps between two exchanges of any parameters."""
        return self.every // self.fragments if self.is_local else 1

    @property
    def compress_gradients(self) -> Literal["none", "fp16", "int8"]:
        """In what form gradients travel. In a warm-up not as int8, which rounds the small ones to nothing, that AdamW
        makes as much of as of the large (measured: +0.25 of the loss after 40 steps)."""
        return "fp16" if self.is_local and self.compress == "int8" else self.compress

    def warmup_steps(self, steps: int) -> int:
        """Of a run of `steps`."""
        return round(self.warmup * steps)

    @property
    def share(self) -> float:
        """`mix`, decided."""
        return self.mix if self.mix is not None else 0.5 if self.overlap else 1.0

    @property
    def unfit_for_groups(self) -> str:
        """What of it does not go with replica groups that come and go; empty where all does."""
        fit = {"warmup": 0.0, "fragments": 1, "overlap": 0, "mix": None, "compress": "none"}
        said = [
            f"{name}: {getattr(self, name)}" for name, value in fit.items() if getattr(self, name) != value
        ]
        return said[0] if self.is_local and said else "" if self.is_local else f"kind: {self.kind}"

    @property
    def copies(self) -> float:
        """Size of what it keeps on a rank, in fp32 parameters of that rank: what is sent and what arrives, and under
        local training the anchor and its momentum."""
        kept = {"local_sgd": 1, "diloco": 2, "delayed": 0}[self.kind]
        return kept + 2 / self.fragments

    @model_validator(mode="after")
    def _fits(self) -> Sync:
        foreign = _FOREIGN[self.kind]
        default = {
            "every": 20,
            "warmup": 0.0,
            "fragments": 1,
            "overlap": 0,
            "mix": None,
            "compress": "none",
            "outer": Outer(),
        }
        said = [name for name in foreign if getattr(self, name) != default[name]]
        if said:
            raise ValueError(
                f"{' and '.join(said)} mean nothing to kind: {self.kind}: remove {'it' if len(said) == 1 else 'them'}"
                f"{', or write kind: diloco' if self.kind == 'local_sgd' else ''}"
            )
        if self.every % self.fragments:
            legal = [n for n in range(1, self.every + 1) if self.every % n == 0]
            near = min(legal, key=lambda n: abs(n - self.fragments))
            raise ValueError(
                f"fragments ({self.fragments}) must divide every ({self.every}): nearest legal value is {near}"
            )
        if self.overlap >= self.interval:
            raise ValueError(
                f"overlap ({self.overlap}) must be less than every / fragments ({self.interval}), because one exchange "
                f"is under way at a time: use {self.interval - 1} or less"
            )
        return self


_FOREIGN = {
    "local_sgd": ("fragments", "overlap", "mix", "compress", "outer"),
    "diloco": (),
    "delayed": ("every", "warmup", "fragments", "overlap", "mix", "outer"),
}
"""Keys that a kind does not have."""
