"""The table of tensor parallelism: along which dim each parameter is divided. `tensor.py` follows it."""

from __future__ import annotations

import fnmatch

PLAN: dict[str, int | str] = {
    "embed.weight": 0,
    "positions.weight": "between",
    "layers.*.attention.q.*": 0,
    "layers.*.attention.[kv].*": "heads",
    "layers.*.attention.[qk]_norm.weight": "inside",
    "layers.*.attention.o.weight": 1,
    "layers.*.attention.o.bias": "once",
    "layers.*.mlp.gate.*": 0,
    "layers.*.mlp.up.*": 0,
    "layers.*.mlp.down.weight": 1,
    "layers.*.mlp.down.bias": "once",
    "layers.*.mlp.router.weight": "inside",
    "layers.*.mlp.experts.gate": 1,
    "layers.*.mlp.experts.up": 1,
    "layers.*.mlp.experts.down": 2,
    "layers.*.mlp.shared.gate.*": 0,
    "layers.*.mlp.shared.up.*": 0,
    "layers.*.mlp.shared.down.weight": 1,
    "layers.*_norm.*": "between",
    "norm.*": "between",
    "head.weight": 0,
}
"""By name (the first match counts) the dim that is divided, or how a parameter that is not divided is used:

heads     divided by kv heads, or shared where there are fewer of them than ranks
between   on each rank's activations between regions
inside    on this rank's part of a region
once      added to a sum over ranks, so by the first rank only
"""


def plan_of(name: str) -> int | str:
    """The table's entry for a parameter; a parameter that it does not know must not be trained wrongly."""
    for pattern, kind in PLAN.items():
        if fnmatch.fnmatchcase(name, pattern):
            return kind
    raise LookupError(
        f"tensor parallelism has no entry for {name}: add it to PLAN in parallel/tensor_plan.py"
    )


def divided_dim(name: str, *, kv_heads: int, ranks: int) -> int | None:
    """The dim of a parameter that the tensor axis divides; None where every rank holds it whole."""
    kind = plan_of(name)
    if kind == "heads":
        return None if kv_heads % ranks else 0
    return kind if isinstance(kind, int) else None


def is_summed(name: str, *, kv_heads: int, ranks: int, sequence: bool) -> bool:
    """Whether every rank holds a parameter whole, but has only its part of the gradient."""
    if divided_dim(name, kv_heads=kv_heads, ranks=ranks) is not None:
        return False
    # Without sequence parallelism every rank computes with the same tokens, and so the same gradient.
    return sequence or plan_of(name) != "between"
