"""Folders in Hugging Face layout to a model and back: config.json, and safetensors in one file or several.

Pickled weights are refused: loading them could run anything. The tokenizer's files are the data room's.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from muster.errors import UsageError
from muster.model.config_json import read_object, read_spec
from muster.model.families import FAMILIES, config_of
from muster.model.hf_tensors import Foreign
from muster.model.spec import TransformerSpec
from muster.model.staging import staged
from muster.model.transformer import Transformer, Value, materialize

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HEAD = "lm_head.weight"


def open_weights(folder: Path) -> Value:
    """Reads tensors of the model in `folder` one at a time, by our names, in fp32.

    Missing, surplus and misshapen tensors are UsageErrors that name them; the first two come at once.
    """
    spec = read_spec(folder)
    files = _files_of(folder)
    return values_from(spec, files.keys(), lambda name: _read(files[name], name), str(folder))


def values_from(
    spec: TransformerSpec, names: Collection[str], read: Callable[[str], Tensor], where: str
) -> Value:
    """Tensors by our names, in fp32, out of those that `read` finds by their Hugging Face `names`.

    They have to be the tensors of `spec`, no more and no fewer; UsageErrors name others, and say `where` they are.
    """
    foreign = FAMILIES[spec.family].tensors(spec)
    stored = _stored_names(names, spec, read, where)

    def value(name: str, shape: torch.Size) -> Tensor:
        whole = torch.empty(shape)
        parts = whole.unbind() if foreign[name].stacked else [whole]
        for part, theirs in zip(parts, foreign[name].names, strict=True):
            source = stored[theirs]
            tensor = _import(read(source), foreign[name])
            if tensor.shape != part.shape:
                raise UsageError(
                    f"{where}: '{source}' gives {name} the shape {tuple(tensor.shape)}, but config.json "
                    f"asks for {tuple(part.shape)}: they do not belong together"
                )
            part.copy_(tensor)
        return whole

    return value


def load_folder(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Transformer:
    """The model in `folder`; one tensor at a time, so that memory holds the model once."""
    return materialize(read_spec(folder), open_weights(folder), dtype=dtype, device=device)


def save_folder(
    weights: Mapping[str, Tensor],
    spec: TransformerSpec,
    folder: Path,
    *,
    dtype: torch.dtype,
    bos_id: int,
    eos_id: int,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Make `folder`: config.json, generation_config.json, and safetensors of at most `max_shard_bytes` each.

    It appears when it is complete; one that already holds files is refused.
    """
    with staged(folder) as draft:
        write_files(
            weights, spec, draft, dtype=dtype, bos_id=bos_id, eos_id=eos_id, max_shard_bytes=max_shard_bytes
        )


def write_files(
    weights: Mapping[str, Tensor],
    spec: TransformerSpec,
    folder: Path,
    *,
    dtype: torch.dtype,
    bos_id: int,
    eos_id: int,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """What `save_folder` writes, into a folder that somebody else stages."""
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id}
    _write_json(
        folder / "config.json", config_of(spec) | ids | {"torch_dtype": str(dtype).removeprefix("torch.")}
    )
    _write_json(folder / "generation_config.json", ids)
    groups = list(_shards(weights, spec, dtype, max_shard_bytes))
    names = [_SINGLE]
    if len(groups) > 1:
        names = [
            f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)
        ]
        weight_map = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
        total_bytes = sum(_numel(pieces) for group in groups for pieces in group.values()) * dtype.itemsize
        _write_json(folder / _INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    for name, group in zip(names, groups, strict=True):
        _save({theirs: _export(pieces, dtype) for theirs, pieces in group.items()}, folder / name)


Pieces = list[tuple[Foreign, Tensor]]
"""What one of their tensors is made of: views of ours."""


def _shards(
    weights: Mapping[str, Tensor], spec: TransformerSpec, dtype: torch.dtype, max_bytes: int
) -> Iterator[dict[str, Pieces]]:
    """Their tensors in groups that fit one file."""
    merged: dict[str, Pieces] = {}
    for ours, source in FAMILIES[spec.family].tensors(spec).items():
        weight = weights[ours].detach()
        for theirs, piece in zip(source.names, weight if source.stacked else [weight], strict=True):
            merged.setdefault(theirs, []).append((source, piece))
    group: dict[str, Pieces] = {}
    group_bytes = 0
    for theirs, pieces in merged.items():
        size = _numel(pieces) * dtype.itemsize
        if group and group_bytes + size > max_bytes:
            yield group
            group, group_bytes = {}, 0
        group[theirs] = pieces
        group_bytes += size
    yield group


def _numel(pieces: Pieces) -> int:
    return sum(piece.numel() for _, piece in pieces)


def _import(tensor: Tensor, source: Foreign) -> Tensor:
    index, parts = source.part
    if tensor.dim() not in (1, 2):
        return tensor  # misshapen, which the caller reports
    if source.transposed:
        tensor = tensor.t()
    return tensor.chunk(parts, dim=0)[index] if len(tensor) % parts == 0 else tensor


def _export(pieces: Pieces, dtype: torch.dtype) -> Tensor:
    ordered = sorted(pieces, key=lambda piece: piece[0].part)
    tensor = torch.cat([piece.cpu().to(dtype) for _, piece in ordered], dim=0)
    return (tensor.t() if ordered[0][0].transposed else tensor).contiguous()


def _stored_names(
    names: Collection[str], spec: TransformerSpec, read: Callable[[str], Tensor], where: str
) -> dict[str, str]:
    """What each tensor that the model needs is called among `names`; refuses any other set of tensors."""
    family = FAMILIES[spec.family]
    foreign = family.tensors(spec)
    needed = {name for source in foreign.values() for name in source.names}
    found = {name: name if name in names else name.removeprefix(family.optional_prefix) for name in needed}
    missing = sorted(name for name in needed if found[name] not in names)
    if missing:
        raise UsageError(
            f"{where} lacks {_named(missing)}, which config.json asks for: it is incomplete, copy it again"
        )
    surplus = {name for name in set(names) - set(found.values()) if not name.endswith(family.buffers)}
    if spec.tied and _HEAD in surplus:
        surplus.remove(_HEAD)
        embedding = found[foreign["embed.weight"].name]
        if not torch.equal(read(_HEAD), read(embedding)):
            raise UsageError(
                f"{where}: config.json says tie_word_embeddings, but {_HEAD} differs from {embedding}: "
                f"set it to false"
            )
    if surplus:
        raise UsageError(
            f"{where} also has {_named(sorted(surplus))}, which a {spec.family} model as in its config.json "
            f"does not have: they do not belong together"
        )
    return found


def _named(tensors: list[str]) -> str:
    more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
    return f"tensor '{tensors[0]}'{more}"


def _files_of(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor."""
    if (folder / _INDEX).exists():
        weight_map = read_object(folder / _INDEX, "").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UsageError(f"{folder / _INDEX} has no weight_map of names: copy it again")
        for name in sorted(set(weight_map.values())):
            if Path(name).name != name or not (folder / name).is_file():
                raise UsageError(
                    f"{folder / _INDEX} names '{name}', which is not in the folder: copy it again"
                )
        return {tensor: folder / name for tensor, name in weight_map.items()}
    single = folder / _SINGLE
    if not single.is_file():
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if pickled:
            raise UsageError(
                f"{folder} has only {pickled[0]}, which is a pickle and could run anything: convert it to "
                f"safetensors first"
            )
        raise UsageError(f"{folder} has no {_SINGLE}: it is not a model in Hugging Face layout")
    try:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{single} cannot be read ({error}): copy it again") from None


def _read(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} cannot be read ({error}): copy it again") from None
    return tensor


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # It words a full disk as text only; callers handle OSError.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
