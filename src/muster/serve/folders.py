"""Which folder a path means, and what its run says about serving. Knows no torch: errors come at once."""

from __future__ import annotations

from pathlib import Path

from muster.config.load import load_resolved
from muster.config.schema import Serve
from muster.errors import UsageError
from muster.serve.template import read_json


def find_folder(path: Path) -> tuple[Path, str]:
    """(folder in Hugging Face layout, model's name) of a model folder or an exported run's folder."""
    path = path.expanduser()
    if not path.exists():
        raise UsageError(f"{path} does not exist: give a run folder (runs/NAME) or a Hugging Face folder")
    if (path / "config.json").is_file():
        whole = path.resolve()
        name = whole.parent.name if whole.name == "hf" and _is_run(whole.parent) else whole.name
        return path, name
    if (path / "hf" / "config.json").is_file():
        return path / "hf", path.resolve().name
    if _is_run(path):
        raise UsageError(f"{path} has no export yet: run `muster export {path}` first")
    raise UsageError(
        f"{path} is neither a run folder nor a model folder: it has no run.json and no config.json"
    )


def serve_section(folder: Path) -> Serve:
    """The `serve` section of the run that exported a folder in Hugging Face layout; else the defaults."""
    run = folder.resolve().parent
    plain = read_json(run / "run.json").get("run")
    return load_resolved(plain).serve if isinstance(plain, dict) else Serve()


def _is_run(path: Path) -> bool:
    return (path / "run.json").is_file()
