"""Which run is this: the digest of its resolved run file, and the part that resuming must not change."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from muster.config.schema import Run

_FREE_IN_TRAIN = ("log_every", "eval_every", "eval_tokens")


def digest(run: Run) -> str:
    """SHA-256 (hex) of the resolved run file in canonical JSON."""
    return hashlib.sha256(json.dumps(run.to_dict(), sort_keys=True).encode()).hexdigest()


def identity(run: Run) -> dict[str, Any]:
    """What decides the numbers of a run: model, data and training, but not where or how it is watched."""
    plain = run.to_dict()
    train = {key: value for key, value in plain["train"].items() if key not in _FREE_IN_TRAIN}
    return {"model": plain["model"], "data": plain["data"], "train": train}


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """What changed from one piece of plain data to another, as `train.optimizer.lr: 0.003 -> 0.001`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        found = [
            differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key)) for key in keys
        ]
        return [line for lines in found for line in lines]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        found = [
            differences(a, b, f"{path}.{index}") for index, (a, b) in enumerate(zip(old, new, strict=True))
        ]
        return [line for lines in found for line in lines]
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]
