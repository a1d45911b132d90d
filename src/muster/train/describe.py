"""The manifest of a run's state, in a checkpoint or in memory."""

from __future__ import annotations

import platform
from dataclasses import asdict

import torch

import muster
from muster.checkpoint import manifest
from muster.checkpoint.manifest import FileSum, Manifest
from muster.config.digest import digest, identity
from muster.train.plan import Training


def describe(plan: Training, step: int, files: dict[str, FileSum]) -> Manifest:
    """The manifest of a checkpoint of this run after `step` updates."""
    return Manifest(
        format=manifest.FORMAT,
        step=step,
        tokens=step * plan.run.train.batch_tokens,
        seed=plan.run.train.seed,
        digest=digest(plan.run),
        identity=identity(plan.run),
        layout=asdict(plan.layout),
        model=asdict(plan.spec),
        versions={
            "muster": muster.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        files=files,
    )
