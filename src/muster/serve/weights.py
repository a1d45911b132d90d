"""From where weights lie to a network of them: a folder in Hugging Face layout, or a checkpoint of any layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from muster.checkpoint import manifest
from muster.model import folder as hf
from muster.model.spec import TransformerSpec
from muster.model.transformer import Value
from muster.serve.adapters import read_adapters
from muster.serve.engine.network import Total, TransformerNetwork, same
from muster.serve.engine.packed import pack_model
from muster.serve.engine.packed_file import open_packed
from muster.serve.engine.part import Part, load_part
from muster.serve.kernels.ops import choose_kernels
from muster.serve.kernels.packing import Format


def read_spec(folder: Path) -> TransformerSpec:
    """The model in a folder; UsageError or CheckpointError where there is none."""
    if _is_checkpoint(folder):
        return TransformerSpec.from_dict(manifest.read(folder).model)
    return hf.read_spec(folder)


def open_weights(folder: Path) -> Value:
    """Reads parameters of the model in a folder one at a time, whole, in fp32."""
    if not _is_checkpoint(folder):
        return hf.open_weights(folder)
    from muster.checkpoint.state import open_shards  # a second of imports, for checkpoints alone

    return open_shards(folder)


def load_network(
    folder: Path,
    format: Format,
    part: Part | None = None,
    total: Total = same,
    adapters: Mapping[str, str] = MappingProxyType({}),
) -> TransformerNetwork:
    """The network of a model in a format, or of one rank's part of it; `total` sums over the ranks of a layer.

    `adapters` are folders by name.
    Of a whole model in Hugging Face layout, int8 and int4 are kept in its folder for the next start.
    """
    compute = compute_dtype(format)
    if part is None and not _is_checkpoint(folder):
        packed, _ = open_packed(folder, format)
    else:
        part = part or Part.of(read_spec(folder))
        packed = pack_model(load_part(part, open_weights(folder), dtype=compute), format, part=part)
    added = read_adapters(adapters, packed.part.whole)
    return TransformerNetwork(packed, choose_kernels(compute)[0], total, added)


def compute_dtype(format: Format) -> torch.dtype:
    """What activations and the cache are, for weights in a format."""
    return torch.float32 if format == "fp32" else torch.bfloat16


def _is_checkpoint(folder: Path) -> bool:
    return (folder / manifest.NAME).is_file()
