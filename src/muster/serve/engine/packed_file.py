"""Packed weights on disk: one safetensors file that is read at start as it lies, so that nothing is quantised or
rearranged then.

It lies beside the model that it was made from, knows that model by a digest and the kernels' layout by name, and
carries a checksum over all of it. Tensors begin at multiples of 64 bytes, which the kernels read fastest.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from muster.errors import UsageError
from muster.model.config_json import PACKED_PREFIX
from muster.model.folder import load_folder
from muster.model.spec import TransformerSpec
from muster.serve.engine.packed import PackedModel, pack_model
from muster.serve.engine.packed_bytes import PackedBytes, checksum, packed_path, read_bytes
from muster.serve.engine.part import Part
from muster.serve.kernels.packing import LAYOUT, TENSORS, Format, Weights

_ALIGNED = 64
_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8, "I8": torch.int8,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SAMPLES, _SAMPLE_BYTES = 64, 4096


Read = Callable[[Path], PackedBytes]
"""How a packed file's bytes are had: by `read_bytes`, or ahead of time."""


def open_packed(folder: Path, format: Format, read: Read = read_bytes) -> tuple[PackedModel, str]:
    """The model of a folder in Hugging Face layout in a format, and where it came from.

    All but fp32 come from the packed file; without a sound one they are packed, and the file is written for the next
    start where the folder can be written to. Raises UsageError for folders that hold no model.
    """
    path, source = packed_path(folder, format), source_digest(folder)
    why = "it was not packed yet"
    if path.exists():
        try:
            return read_packed(path, source, read), f"read from {path.name}"
        except UsageError as error:
            why = str(error)
    dtype = torch.float32 if format == "fp32" else torch.bfloat16
    model = pack_model(load_folder(folder, dtype=dtype), format)
    if format == "fp32":
        return model, "read from the model's own files"
    try:
        write_packed(model, path, source)
    except OSError as error:
        return model, f"packed now and not kept ({error})"
    return model, f"packed now and kept as {path.name}: {why}"


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
    sums = [zlib.crc32(_bytes(tensor)) for _, tensor in ordered]
    metadata = {"muster": json.dumps(about), "crc32": checksum(about, index, sums)}
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


def read_packed(path: Path, source: str | None = None, read: Read = read_bytes) -> PackedModel:
    """A packed model, in huge pages. UsageError where it is damaged, of another layout, or not from `source`."""
    found = read(path)
    about, data = found.about, torch.frombuffer(found.data, dtype=torch.uint8)
    if about["layout"] != LAYOUT:
        raise UsageError(f"{path} has the layout {about['layout']}, and the kernels have {LAYOUT}")
    if source is not None and about["source"] != source:
        raise UsageError(f"{path} was packed from other weights than are in its folder now")
    tensors: dict[str, Tensor] = {}
    for name, entry in found.index.items():
        first, last = entry["data_offsets"]
        part = data[first:last].view(_DTYPES[entry["dtype"]])
        tensors[name] = part.view(entry["shape"])
    linears = {
        name: Weights(
            format=format, features=features, inputs=inputs, packed=True, weight=tensors.pop(f"{name}.weight"),
            **{part: tensors.pop(f"{name}.{part}", None) for part in TENSORS if part != "weight"},
        )
        for name, (format, features, inputs) in about["linears"].items()
    }  # fmt: skip
    return PackedModel(
        part=Part.of(TransformerSpec.from_dict(about["spec"])), format=about["format"],
        compute=_DTYPES[about["compute"]], linears=linears, tensors=tensors,
    )  # fmt: skip


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
