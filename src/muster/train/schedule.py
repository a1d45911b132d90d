"""Learning-rate schedules as pure functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math

from muster.config import schema


def learning_rate(step: int, steps: int, peak: float, schedule: schema.Schedule) -> float:
    """The rate of optimizer step `step` (0-based) of `steps`.

    Warm-up is linear and reaches the peak at its last step; cosine follows Loshchilov & Hutter
    2017, wsd (warm-up, stable, decay) Hu et al. 2024 with a linear decay.
    """
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    # 0 at the first step after warm-up, 1 at the last step of the run
    progress = (step - warmup) / max(steps - 1 - warmup, 1)
    floor = schedule.floor
    if schedule.kind == "constant":
        share = 1.0
    elif schedule.kind == "linear":
        share = 1 - (1 - floor) * progress
    elif schedule.kind == "cosine":
        share = floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
    else:
        decay = max(round(schedule.decay * steps), 1)
        share = 1 - (1 - floor) * max(step - (steps - 1 - decay), 0) / decay
    return peak * share
