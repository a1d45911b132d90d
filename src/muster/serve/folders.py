"""What a path means: which weights, which tokenizer, and what the run says about serving. Knows no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from muster.checkpoint import manifest, shelf
from muster.errors import CheckpointError, UsageError
from muster.model import config_json
from muster.model.spec import TransformerSpec
from muster.serve.template import read_json

if TYPE_CHECKING:
    from muster.config.schema import Serve


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A model to serve."""

    name: str
    weights: Path
    """A folder in Hugging Face layout, or a checkpoint of any layout."""
    tokenizer: Path
    run: Path | None = None
    """The folder of the run that was asked for, or that this is of."""
    step: int = 0
    """Training steps behind the weights; 0 where unknown."""


def find_source(path: Path, on_damaged: Callable[[str], None] = lambda _: None) -> Source:
    """The model of a folder in Hugging Face layout, of a checkpoint, or of a run.

    Of a run that is its newest sound checkpoint, or its export where that is as new. UsageError where there is
    nothing to serve, CheckpointError where nothing is sound; what is wrong with newer checkpoints is reported.
    """
    path = path.expanduser()
    if not path.exists():
        raise UsageError(f"{path} does not exist: give a run folder (runs/NAME) or a Hugging Face folder")
    if (path / "config.json").is_file():
        whole = path.resolve()
        run = whole.parent if whole.name == "hf" and _is_run(whole.parent) else None
        name = whole.name if run is None else run.name
        return Source(name=name, weights=path, tokenizer=path, run=run, step=_export_step(path))
    if (path / manifest.NAME).is_file():
        return _checkpoint(path.resolve().parent.parent, path, manifest.verify(path).step)
    if _is_run(path):
        return _newest(path, on_damaged)
    raise UsageError(
        f"{path} is neither a run folder nor a model folder: it has no run.json and no config.json"
    )


def read_spec(weights: Path) -> TransformerSpec:
    """The model in a folder of weights; UsageError or CheckpointError where there is none."""
    if is_checkpoint(weights):
        return TransformerSpec.from_dict(manifest.read(weights).model)
    return config_json.read_spec(weights)


def is_checkpoint(weights: Path) -> bool:
    """Whether weights are a checkpoint's, and not in Hugging Face layout."""
    return (weights / manifest.NAME).is_file()


def is_whole(folder: Path) -> bool:
    """Whether weights are there; of a checkpoint that is deleted the manifest goes first."""
    return any((folder / name).is_file() for name in ("config.json", manifest.NAME))


def serve_section(folder: Path) -> Serve:
    """The `serve` section of the run that a folder is, or that it is the export of; else the defaults."""
    from muster.config.load import load_resolved  # not needed where the engine runs
    from muster.config.schema import Serve

    folder = folder.resolve()
    run = folder if _is_run(folder) else folder.parent
    plain = read_json(run / "run.json").get("run")
    return load_resolved(plain).serve if isinstance(plain, dict) else Serve()


def _newest(run: Path, on_damaged: Callable[[str], None]) -> Source:
    kept, export = run / "checkpoints", run / "hf"
    exported = (export / "config.json").is_file()
    name, step = run.resolve().name, _export_step(export)
    served = Source(name=name, weights=export, tokenizer=export, run=run, step=step)
    if exported and step >= max(shelf.steps(kept), default=0):
        return served
    try:
        found = shelf.newest_sound(kept, on_damaged)
    except CheckpointError as error:
        if not exported:
            raise
        on_damaged(f"{error} (its older export is served)")
        return served
    if found is None:
        raise UsageError(f"{run} has no checkpoint and no export yet: train it first")
    # Newer ones may have been damaged.
    return served if exported and step >= found[1].step else _checkpoint(run, found[0], found[1].step)


def _checkpoint(run: Path, folder: Path, step: int) -> Source:
    return Source(name=run.resolve().name, weights=folder, tokenizer=run / "tokenizer", run=run, step=step)


def _export_step(folder: Path) -> int:
    provenance = read_json(folder / "muster.json").get("provenance")
    step = provenance.get("step") if isinstance(provenance, dict) else None
    return step if isinstance(step, int) else 0


def _is_run(path: Path) -> bool:
    return (path / "run.json").is_file()
