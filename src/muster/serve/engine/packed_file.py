"""Packed weights on disk: one safetensors file that is read at start as it lies, so that nothing is quantised then.

It lies beside the model that it was made from, knows that model by a digest and the kernels' layout by name, and
carries a checksum over all of it. Tensors begin at multiples of 64 bytes, which the kernels read fastest.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muster.errors import UsageError
from muster.model.folder import PACKED_PREFIX, load_folder
from muster.model.spec import TransformerSpec
from muster.serve.engine.hugepages import huge_bytes
from muster.serve.engine.packed import PackedModel, pack_model
from muster.serve.engine.part import Part
from muster.serve.kernels.packing import LAYOUT, Format, Weights

_ALIGNED = 64
_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_PIECE_BYTES = 4 << 20


def packed_path(folder: Path, format: Format) -> Path:
    """Where the packed weights of the model in `folder` are kept."""
    return folder / f"{PACKED_PREFIX}{format}.safetensors"


def open_packed(folder: Path, format: Format) -> tuple[PackedModel, str]:
    """The model of a folder in Hugging Face layout in a format, and where it came from.

    int8 and int4 come from the packed file; without a sound one they are quantised, and the file is written for the
    next start where the folder can be written to. Raises UsageError for folders that hold no model.
    """
    path, source = packed_path(folder, format), source_digest(folder)
    why = "it was not packed yet"
    if path.exists():
        try:
            return read_packed(path, source), f"read from {path.name}"
        except UsageError as error:
            why = str(error)
    dtype = torch.float32 if format == "fp32" else torch.bfloat16
    model = pack_model(load_folder(folder, dtype=dtype), format)
    if format not in ("int8", "int4"):
        return model, "read from the model's own files"
    try:
        write_packed(model, path, source)
    except OSError as error:
        return model, f"quantised now and not kept ({error})"
    return model, f"quantised now and kept as {path.name}: {why}"


def source_digest(folder: Path) -> str:
    """What tells a model from any other: its config, and of each file of weights size, beginning, and 64 samples.

    Not the whole content, which would take longer to read than to map; a trained model differs everywhere.
    """
    digest = hashlib.sha256()
    files = [path for path in folder.glob("*.safetensors") if not path.name.startswith(PACKED_PREFIX)]
    for path in [folder / "config.json", *sorted(files)]:
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{path.name}/{size}/".encode())
                for sample in range(_SAMPLES):
                    file.seek(sample * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({error.strerror}): a model's folder has one") from None
    return digest.hexdigest()


def write_packed(model: PackedModel, path: Path, source: str) -> None:
    """Write a packed model, made from what has the digest `source`; the file appears when it is complete."""
    tensors = dict(model.tensors)
    for name, weights in model.linears.items():
        assert weights.packed
        tensors |= {f"{name}.{part}": tensor for part, tensor in weights.tensors().items()}
    # Those whose size keeps the next one aligned come first.
    ordered = sorted(tensors.items(), key=lambda item: item[1].nbytes % _ALIGNED != 0)
    index, end = {}, 0
    for name, tensor in ordered:
        span = [end, end + tensor.nbytes]
        index[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        end = span[1]
    about = {
        "layout": LAYOUT, "format": model.format, "compute": _NAMES[model.compute], "source": source,
        "spec": asdict(model.spec),
        "linears": {name: [w.format, w.features, w.inputs] for name, w in model.linears.items()},
    }  # fmt: skip
    checksum = _checksum(about, index)
    for _, tensor in ordered:
        checksum = zlib.crc32(_bytes(tensor), checksum)
    metadata = {"muster": json.dumps(about), "crc32": f"{checksum:08x}"}
    header = json.dumps({"__metadata__": metadata} | index).encode()
    header += b" " * (-(len(header) + 8) % _ALIGNED)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(draft, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for _, tensor in ordered:
                file.write(_bytes(tensor))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def read_packed(path: Path, source: str | None = None) -> PackedModel:
    """A packed model, read into huge pages. UsageError where it is damaged, of another layout, or not from `source`."""
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            index = json.loads(file.read(min(header_bytes, size)))
            metadata = index.pop("__metadata__")
            about = json.loads(metadata["muster"])
            if max(entry["data_offsets"][1] for entry in index.values()) != size - 8 - header_bytes:
                raise ValueError("its size is not as its header says")
            data = huge_bytes(size - 8 - header_bytes)
            checksum = _checksum(about, index)
            with _bytes(data) as room:
                for begin in range(0, len(room), _PIECE_BYTES):  # summed while the cache still holds it
                    piece = room[begin : begin + _PIECE_BYTES]
                    if file.readinto(piece) != len(piece):
                        raise ValueError("it is cut off")
                    checksum = zlib.crc32(piece, checksum)
        if metadata["crc32"] != f"{checksum:08x}":
            raise ValueError("its checksum differs")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged ({error}): remove it, and it is made anew") from None
    if about["layout"] != LAYOUT:
        raise UsageError(f"{path} has the layout {about['layout']}, and the kernels have {LAYOUT}")
    if source is not None and about["source"] != source:
        raise UsageError(f"{path} was packed from other weights than are in its folder now")
    tensors: dict[str, Tensor] = {}
    for name, entry in index.items():
        first, last = entry["data_offsets"]
        part = data[first:last].view(_DTYPES[entry["dtype"]])
        tensors[name] = part.view(entry["shape"])
    linears = {
        name: Weights(
            format=format, features=features, inputs=inputs, packed=True, weight=tensors.pop(f"{name}.weight"),
            scale=tensors.pop(f"{name}.scale", None), bias=tensors.pop(f"{name}.bias", None),
        )
        for name, (format, features, inputs) in about["linears"].items()
    }  # fmt: skip
    return PackedModel(
        part=Part.of(TransformerSpec.from_dict(about["spec"])), format=about["format"],
        compute=_DTYPES[about["compute"]], linears=linears, tensors=tensors,
    )  # fmt: skip


def _checksum(about: dict[str, Any], index: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps([about, index], sort_keys=True).encode())


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
