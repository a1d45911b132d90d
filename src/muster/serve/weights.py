"""From where weights lie to a network of them: a folder in Hugging Face layout, or a checkpoint of any layout."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import psutil
import torch

from muster.checkpoint import manifest
from muster.model import folder as hf
from muster.model.transformer import Value
from muster.serve.adapters import read_adapters
from muster.serve.engine.graphs import GraphedNetwork
from muster.serve.engine.network import Total, TransformerNetwork, same
from muster.serve.engine.packed import pack_model
from muster.serve.engine.packed_bytes import read_bytes
from muster.serve.engine.packed_file import Read, open_packed, source_digest
from muster.serve.engine.part import Part, load_part
from muster.serve.folders import is_checkpoint, is_whole, read_spec
from muster.serve.kernels.ops import choose_kernels
from muster.serve.kernels.packing import Format


def open_weights(folder: Path) -> Value:
    """Reads parameters of the model in a folder one at a time, whole, in fp32."""
    if not is_checkpoint(folder):
        return hf.open_weights(folder)
    from muster.checkpoint.state import open_shards  # a second of imports, for checkpoints alone

    return open_shards(folder)


def load_network(
    folder: Path,
    format: Format,
    part: Part | None = None,
    total: Total = same,
    read: Read = read_bytes,
    device: torch.device | str = "cpu",
    adapters: Mapping[str, str] = MappingProxyType({}),
) -> TransformerNetwork:
    """The network of a model in a format, or of one rank's part of it; `total` sums over the ranks of a layer.

    `adapters` are folders by name. Of a whole model in Hugging Face layout, weights packed for the CPU are kept in its
    folder for the next start; `read` reads those.
    """
    compute = compute_dtype(format)
    kernels, _ = choose_kernels(compute, device)
    on_cpu = kernels.device.type == "cpu"
    if on_cpu and part is None and not is_checkpoint(folder):
        packed, _ = open_packed(folder, format, read)
    else:
        part = part or Part.of(read_spec(folder))
        model = load_part(part, open_weights(folder), dtype=compute)
        packed = pack_model(model, format, part=part, packed=on_cpu)
    added = read_adapters(adapters, packed.part.whole)
    return (TransformerNetwork if on_cpu else GraphedNetwork)(packed, kernels, total, added)


def digest_of(folder: Path) -> str:
    """What tells the weights in a folder from any others. UsageError or OSError where they are gone."""
    if is_checkpoint(folder):
        return hashlib.sha256((folder / manifest.NAME).read_bytes()).hexdigest()
    return source_digest(folder)


def load_if_there(
    load: Callable[[str], TransformerNetwork], folder: str, *, may_go: bool
) -> TransformerNetwork | None:
    """None for a folder that is deleted before it has been read, if it `may_go`."""
    try:
        return load(folder)
    except Exception:
        if not may_go or is_whole(Path(folder)):
            raise
        return None


def choose_device(ranks: int) -> str:
    """Where to compute: on a GPU if there is one. Several ranks exchange hidden states between hosts' memories."""
    return "cuda" if ranks == 1 and torch.cuda.is_available() else "cpu"


def free_memory(device: str) -> int:
    """Bytes, of a GPU or of the host."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


def compute_dtype(format: Format) -> torch.dtype:
    """What activations and the cache are, for weights in a format."""
    return torch.float32 if format == "fp32" else torch.bfloat16
