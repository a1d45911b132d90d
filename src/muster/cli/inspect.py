"""`muster inspect`: what a run, a checkpoint or a model folder holds, and whether its files are sound. No torch needed."""

from __future__ import annotations

import json
import struct
import sys
from math import prod
from pathlib import Path
from typing import Any

from muster.errors import CheckpointError, UsageError

_HEADER_LIMIT = 100_000_000


def inspect(path: Path, *, verify: bool = False, json_: bool = False) -> None:
    """Say what a folder is: a run, a checkpoint, or a model in Hugging Face layout.

    Parameters
    ----------
    path
        The folder.
    verify
        Also check every file against its checksum; exit code 1 names the first that is not sound.
    json_
        Print JSON instead of text.
    """
    if (path / "run.json").is_file():
        facts = _run(path, verify)
    elif (path / "manifest.json").is_file():
        facts = _checkpoint(path, verify)
    elif (path / "config.json").is_file():
        facts = _model(path, verify)
    else:
        raise UsageError(f"{path} is no run (run.json), checkpoint (manifest.json) or model (config.json) folder")
    if json_:
        sys.stdout.write(json.dumps(facts, indent=1) + "\n")
        return
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        lines = value if isinstance(value, list) else [value]
        for line in lines or ["none"]:
            sys.stdout.write(f"{key:{width}}  {line}\n")
            key = ""


def _run(folder: Path, verify: bool) -> dict[str, Any]:
    from muster.checkpoint import shelf
    from muster.observe.format import count
    from muster.observe.view import view

    seen = view(folder)
    if seen is None:
        raise UsageError(f"{folder / 'run.json'} cannot be read: the folder holds no run")
    checkpoints = [shelf.folder_of(folder / "checkpoints", step) for step in shelf.steps(folder / "checkpoints")]
    described = [f"{path.name}{'  sound' if verify and _sound(path) else ''}" for path in checkpoints]
    return {
        "kind": "run",
        "name": seen.name,
        "state": seen.state,
        "step": f"{seen.step} of {seen.steps}",
        "loss": seen.loss,
        "bits per byte": seen.bits_per_byte,
        "tokens/s": None if seen.tokens_per_s is None else count(seen.tokens_per_s),
        "checkpoints": described,
        "export": "hf" if (folder / "hf" / "muster.json").exists() else "none; `muster export` makes one",
    }


def _sound(folder: Path) -> bool:
    from muster.checkpoint import manifest

    manifest.verify(folder)
    return True


def _checkpoint(folder: Path, verify: bool) -> dict[str, Any]:
    from muster.checkpoint import manifest

    content = manifest.verify(folder) if verify else manifest.read(folder)
    return {
        "kind": "checkpoint",
        "step": content.step,
        "tokens": content.tokens,
        "layout": f"replicate {content.layout['replicate']} x shard {content.layout['shard']}, zero {content.layout['zero']}",
        "model": f"{content.model['family']}, {content.model['layers']} layers of width {content.model['width']}",
        "written by": ", ".join(f"{name} {version}" for name, version in content.versions.items()),
        "files": [f"{name}  {entry.bytes} bytes  {entry.sha256[:16]}" for name, entry in content.files.items()],
        "checksums": "all match" if verify else "not checked (--verify)",
    }


def _model(folder: Path, verify: bool) -> dict[str, Any]:
    from muster.checkpoint.manifest import sum_file

    config = json.loads((folder / "config.json").read_text())
    tensors = [entry for file in sorted(folder.glob("*.safetensors")) for entry in _header(file).values()]
    provenance: dict[str, Any] = {}
    if (folder / "muster.json").is_file():
        provenance = json.loads((folder / "muster.json").read_text())
    if verify:
        if not provenance:
            raise UsageError(f"{folder} has no muster.json with checksums: only exports of muster can be verified")
        for name, entry in provenance["files"].items():
            file = folder / name
            if not file.is_file() or sum_file(file).sha256 != entry["sha256"]:
                raise CheckpointError(f"{file} does not match its SHA-256: export the run again")
    return {
        "kind": "model in Hugging Face layout",
        "family": config.get("model_type"),
        "parameters": sum(prod(entry["shape"]) for entry in tensors),
        "dtype": sorted({entry["dtype"] for entry in tensors}),
        "tensors": len(tensors),
        "from": f"{provenance['checkpoint']}, {provenance['tokens']} tokens" if provenance else "unknown (no muster.json)",
        "parity": json.dumps(provenance["parity"]) if provenance else "unknown",
        "checksums": "all match" if verify else "not checked (--verify)",
    }


def _header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: 8 bytes of length, then JSON."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _HEADER_LIMIT:
                raise ValueError(f"a header of {length} bytes")
            header: dict[str, Any] = json.loads(stream.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{file} is damaged ({error}): copy or export it again") from None
    header.pop("__metadata__", None)
    return header
