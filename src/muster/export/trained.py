"""What a run has trained so far: the model and tokenizer of its newest sound checkpoint, in one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from muster.checkpoint import manifest, shelf
from muster.checkpoint.manifest import Manifest
from muster.checkpoint.state import WEIGHTS, read_shards
from muster.data.tokenizer import Tokenizer
from muster.errors import CheckpointError
from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer, named_tensors


@dataclass(frozen=True, slots=True)
class Trained:
    model: Transformer
    """In fp32, as it was trained."""
    tokenizer: Tokenizer
    checkpoint: Path
    manifest: Manifest
    damaged: list[str]
    """What is wrong with newer checkpoints, one sentence each."""


def is_ours(folder: Path) -> bool:
    """Whether it is the folder of a run, or of a checkpoint, of muster."""
    return (folder / "run.json").is_file() or (folder / manifest.NAME).is_file()


def load_trained(folder: Path) -> Trained:
    """The model of a run, or of one of its checkpoints, whatever layout it was trained on.

    CheckpointError where there is no sound checkpoint.
    """
    damaged: list[str] = []
    run_folder = folder
    if (folder / manifest.NAME).is_file():
        run_folder = folder.resolve().parent.parent
        checkpoint, content = folder, manifest.verify(folder)
    else:
        found = shelf.newest_sound(folder / "checkpoints", on_damaged=damaged.append)
        if found is None:
            raise CheckpointError(f"{folder} has no checkpoint yet: `muster train` writes them")
        checkpoint, content = found
    with torch.device("meta"):
        model = Transformer(TransformerSpec.from_dict(content.model))
    model = model.to_empty(device="cpu").eval()
    read_shards({WEIGHTS + name: tensor.data for name, tensor in named_tensors(model)}, checkpoint)
    return Trained(model, Tokenizer.from_file(run_folder / "tokenizer"), checkpoint, content, damaged)
