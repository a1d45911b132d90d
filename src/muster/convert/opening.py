"""Which checkpoint a path means, and of which model it is."""

from __future__ import annotations

from pathlib import Path

from muster.convert import deepspeed, megatron
from muster.convert.source import Source, refuse_other_model, understood
from muster.errors import UsageError
from muster.model.config_json import read_spec
from muster.model.spec import TransformerSpec


def open_source(path: Path) -> Source:
    """The checkpoint of another trainer in `path`, or the newest one there; its tensors are not read yet."""
    if not path.is_dir():
        raise UsageError(f"{path} is no folder: give that of a checkpoint")
    if (found := megatron.folder_of(path)) is not None:
        with understood(found):
            return megatron.open_megatron(found)
    if (found := deepspeed.folder_of(path)) is not None:
        with understood(found):
            return deepspeed.open_deepspeed(found)
    if (path / "config.json").is_file():
        raise UsageError(
            f"{path} is in Hugging Face layout already: a run starts from it with `model: {{from: {path}}}`"
        )
    raise UsageError(
        f"{path} holds no checkpoint of DeepSpeed (mp_rank_00_model_states.pt, zero/) or Megatron-LM "
        f"(mp_rank_00/model_optim_rng.pt): give the folder that the trainer saved to"
    )


def model_folder(path: Path, like: Path | None) -> Path | None:
    """The folder with a model's config.json: `like`, or the checkpoint's own or the one around it."""
    if like is not None:
        return like
    return next((folder for folder in (path, path.parent) if (folder / "config.json").is_file()), None)


def spec_for(source: Source, described_in: Path | None) -> TransformerSpec:
    """The model of a checkpoint, by its own word and that of the config.json in `described_in`."""
    if described_in is None:
        if source.spec is None:
            raise UsageError(
                f"{source.label} does not say what its model is: name a folder with its config.json and tokenizer "
                f"(--like FOLDER)"
            )
        return source.spec
    spec = read_spec(described_in)
    if source.spec is not None:
        refuse_other_model(source.spec, spec, f"{source.label}, beside {described_in},")
    return spec
