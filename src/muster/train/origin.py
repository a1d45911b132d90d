"""What `model.from` names: a folder in Hugging Face layout, or what another run has trained.

Of a run that is its newest sound checkpoint when this one begins. Its weights are taken, the optimizer begins anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from muster.checkpoint import manifest, shelf
from muster.checkpoint.manifest import Manifest
from muster.errors import CheckpointError, UsageError
from muster.model import config_json
from muster.model.spec import TransformerSpec

if TYPE_CHECKING:
    from muster.parallel.world import World
    from muster.train.plan import Plan
    from muster.train.report import Report
    from muster.train.trainee import Trainee


def is_ours(folder: Path) -> bool:
    """Whether it is the folder of a run or of a checkpoint."""
    return _is_run(folder) or _is_checkpoint(folder)


def read_spec(folder: Path) -> TransformerSpec:
    """The model that a run starts with; UsageError where `folder` has none."""
    if not is_ours(folder):
        return config_json.read_spec(folder)
    return TransformerSpec.from_dict(_newest(folder).model)


def tokenizer_of(folder: Path) -> Path:
    """The folder of the tokenizer that belongs to the model in `folder`."""
    if _is_checkpoint(folder):
        folder = folder.resolve().parent.parent  # the run's
    return folder / "tokenizer" if _is_run(folder) else folder


def begin(trainee: Trainee, plan: Plan, world: World, report: Report) -> None:
    """Take the weights that `model.from` names, where they are a run's."""
    if plan.trained is None:
        return
    kept = plan.trained / "checkpoints"
    step = 0
    if world.is_first:  # checks every byte, once; the others take its word
        step = _verified(plan.trained, report).step
    (step,) = map(int, world.sum(step))
    path = shelf.folder_of(kept, step) if _is_run(plan.trained) else plan.trained
    trainee.take_weights(path)
    report.note("started", f"started from the weights of {path}")


def _verified(folder: Path, report: Report) -> Manifest:
    if _is_checkpoint(folder):
        return manifest.verify(folder)
    found = shelf.newest_sound(
        folder / "checkpoints", on_damaged=lambda what: report.note("checkpoint-damaged", what)
    )
    if found is None:
        raise _empty(folder)
    return found[1]


def _newest(folder: Path) -> Manifest:
    """The manifest alone: whether the files are sound is checked when they are read."""
    if _is_checkpoint(folder):
        return manifest.read(folder)
    kept = folder / "checkpoints"
    damage: CheckpointError | None = None
    for step in reversed(shelf.steps(kept)):
        try:
            return manifest.read(shelf.folder_of(kept, step))
        except CheckpointError as error:
            damage = damage or error
    raise damage or _empty(folder)


def _empty(folder: Path) -> UsageError:
    return UsageError(f"{folder} has no checkpoint yet, so nothing can start from it: train it first")


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").is_file()


def _is_checkpoint(folder: Path) -> bool:
    return (folder / manifest.NAME).is_file()
