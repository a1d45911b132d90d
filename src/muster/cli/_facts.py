"""What a run, a checkpoint or a model folder holds, and whether its files are sound. Needs no torch.

Facts are plain data: `*_bytes` are sizes, None is unknown.
"""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

from muster.checkpoint import manifest, shelf
from muster.cli._verify import damage
from muster.errors import CheckpointError, UsageError
from muster.observe.view import view

Facts = dict[str, Any]

_HEADER_LIMIT_BYTES = 100_000_000  # as the safetensors library has it
_WEIGHTS = "weights."  # prefix of parameters in a checkpoint; the rest is optimizer state


def facts_of(folder: Path, *, verify: bool) -> Facts:
    """Facts about a folder; with `verify`, CheckpointError names each file that its checksum disowns."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder: give a run, a checkpoint or a model in Hugging Face layout")
    known = [(folder / name).is_file() for name in ("run.json", manifest.NAME, "muster.json")]
    if verify and (folder / "config.json").is_file() and not any(known):
        raise UsageError(
            f"{folder} has no muster.json with checksums: only exports of muster can be verified"
        )
    if verify and any(known) and (bad := damage(folder)):
        raise CheckpointError("\n".join([f"{len(bad)} files are not sound:", *bad] if len(bad) > 1 else bad))
    if (folder / "run.json").is_file():
        return _run(folder, verify)
    if (folder / manifest.NAME).is_file():
        return _checkpoint(folder, verify)
    if (folder / "config.json").is_file():
        return _model(folder, verify)
    raise UsageError(
        f"{folder} is no run (run.json), checkpoint (manifest.json) or model (config.json) folder: "
        f"`muster runs` lists the runs"
    )


def _run(folder: Path, verify: bool) -> Facts:
    seen = view(folder)
    if seen is None:
        raise UsageError(f"{folder / 'run.json'} is damaged, so the folder holds no run: restore that file")
    kept = folder / "checkpoints"
    checkpoints = [_checkpoint(shelf.folder_of(kept, step), verify) for step in shelf.steps(kept)]
    export = folder / "hf"
    return {
        "kind": "run",
        "name": seen.name,
        "state": seen.state,
        "step": seen.step,
        "steps": seen.steps,
        "loss": seen.loss,
        "held_out_bits_per_byte": seen.bits_per_byte,
        "tokens_per_s": seen.tokens_per_s,
        "size_bytes": seen.size_bytes,
        "checkpoints": [
            {"step": found["step"], "size_bytes": found["size_bytes"], "layout": found["layout"]}
            for found in checkpoints
        ],
        "export": str(export) if (export / "config.json").is_file() else None,
        "checksums": _checksums(verify),
    }


def _checkpoint(folder: Path, verify: bool) -> Facts:
    content = manifest.read(folder)
    tensors: Facts = {}
    for name in content.files:
        if name.endswith(".safetensors") and (folder / name).is_file():
            for tensor, entry in _header(folder / name).items():
                tensors[f"{name}/{tensor}"] = entry  # a tensor's shards lie in several files
    weights = [entry for name, entry in tensors.items() if name.split("/", 1)[1].startswith(_WEIGHTS)]
    layout = [f"{axis} {degree}" for axis, degree in content.layout.items() if isinstance(degree, int)]
    return {
        "kind": "checkpoint",
        "step": content.step,
        "trained_tokens": content.tokens,
        "layout": ", ".join(layout),
        "family": content.model.get("family"),
        "parameters": _parameters(weights),
        "dtype": _dtypes(weights),
        "run_digest": content.digest,
        "versions": content.versions,
        "size_bytes": sum(entry.bytes for entry in content.files.values()),
        "files": {name: entry.bytes for name, entry in content.files.items()},
        "checksums": _checksums(verify),
    }


def _model(folder: Path, verify: bool) -> Facts:
    config = _json(folder / "config.json")
    record = _json(folder / "muster.json") if (folder / "muster.json").is_file() else None
    tensors = [entry for file in sorted(folder.glob("*.safetensors")) for entry in _header(file).values()]
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    return {
        "kind": "model in Hugging Face layout",
        "family": config.get("model_type"),
        "parameters": _parameters(tensors),
        "dtype": _dtypes(tensors),
        "context": config.get("max_position_embeddings", config.get("n_positions")),
        "vocabulary": config.get("vocab_size"),
        "provenance": record.get("provenance") if record else None,
        "parity": record.get("parity") if record else None,
        "size_bytes": sum(files.values()),
        "files": files,
        "checksums": _checksums(verify),
    }


def _checksums(verified: bool) -> str:
    return "all match" if verified else "not checked (--verify does)"


def _parameters(tensors: list[Facts]) -> int | None:
    return sum(prod(entry["shape"]) for entry in tensors) if tensors else None


def _dtypes(tensors: list[Facts]) -> str | None:
    return ", ".join(sorted({entry["dtype"] for entry in tensors})) or None


def _header(path: Path) -> Facts:
    """The header of a safetensors file by tensor name: 8 bytes of its length, then JSON."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > min(_HEADER_LIMIT_BYTES, path.stat().st_size):
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(file.read(size))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            return {
                name: {"dtype": entry["dtype"], "shape": entry["shape"]} for name, entry in tensors.items()
            }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): use an older checkpoint, or export again"
        ) from None


def _json(path: Path) -> Facts:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({error}): restore that file") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no JSON object: restore that file")
    return content
