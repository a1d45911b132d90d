"""Files of `torch.save` as plain data and tensors that are read when they are asked for, nothing executed.

Such a file is a zip archive whose entries are not compressed: `data.pkl`, and the bytes of each storage. The file is
mapped into memory; a tensor is a view of its bytes there, checked against the archive's CRC-32 on first use.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muster.convert.unpickle import Refused, unpickle
from muster.errors import CheckpointError

_MAX_PICKLE_BYTES = 256 << 20
_MAX_DIMS = 16
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip
_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *_STORAGES.values(),
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    )
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: where its elements lie in a storage."""

    file: TorchFile
    key: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def read(self) -> Tensor:
        """The tensor, as a view of the mapped file."""
        return torch.as_strided(self.file.storage(self.key, self.dtype), self.shape, self.stride, self.offset)


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: torch.dtype | None
    """None where the tensor says it."""
    size_bytes: int


def read_torch_file(path: Path) -> Any:
    """What `torch.save` wrote to `path`: containers and plain values, and StoredTensor for each tensor.

    CheckpointError where the file is damaged, or holds anything that would have to be executed, which it names.
    """
    return TorchFile(path).content()


class TorchFile:
    """One mapped file; stays mapped for as long as a tensor of it is in use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                if not zipfile.is_zipfile(file):
                    raise CheckpointError(_not_zip(path))
                self._map = mmap.mmap(
                    file.fileno(), 0, access=mmap.ACCESS_COPY
                )  # private: views may be written
                archive = zipfile.ZipFile(file)
                entries = archive.infolist()
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: copy the checkpoint again") from None
        # `zipfile` lets struct.error and others through where an archive is damaged.
        except (
            zipfile.BadZipFile,
            OSError,
            ValueError,
            struct.error,
            NotImplementedError,
            EOFError,
        ) as error:
            raise self._damaged(error) from None
        roots = [entry.filename.removesuffix("data.pkl") for entry in entries if _is_pickle(entry.filename)]
        if len(roots) != 1:
            raise CheckpointError(
                f"{path} is a zip archive, but not one of torch.save (it has {len(roots)} data.pkl)"
            )
        self._entries = {
            entry.filename.removeprefix(roots[0]): entry
            for entry in entries
            if entry.filename.startswith(roots[0])
        }
        self._checked: set[str] = set()

    def content(self) -> Any:
        if (size := self._entries["data.pkl"].file_size) > _MAX_PICKLE_BYTES:
            raise CheckpointError(
                f"{self.path}: its data.pkl has {size} bytes, and {_MAX_PICKLE_BYTES} are the most that is read"
            )
        if "byteorder" in self._entries and self._bytes("byteorder") != b"little":
            raise CheckpointError(
                f"{self.path} was written on a big-endian machine: save it again on another"
            )
        builders: dict[str, Callable[..., Any]] = {
            "torch.Size": _size,
            "torch.device": lambda *names: ":".join(map(str, names)),
            "torch.Tensor": _type_only,
            "torch.nn.parameter.Parameter": _type_only,
            "torch.storage.UntypedStorage": _type_only,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor_v3,
            "torch._utils._rebuild_parameter": lambda tensor, *rest: tensor,
            "torch._utils._rebuild_parameter_with_state": lambda tensor, *rest: tensor,
            "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
            **{f"torch.{name}Storage": _type_only for name in _STORAGES},
            **dict.fromkeys(_DTYPES, _type_only),
        }
        try:
            return unpickle(self._bytes("data.pkl"), builders, self._storage)
        except Refused as refused:
            raise CheckpointError(
                f"{self.path} holds {refused}, which is more than tensors and plain data and could run anything: "
                f"it is not read"
            ) from None
        except ValueError as error:
            raise self._damaged(error) from None

    def storage(self, key: str, dtype: torch.dtype) -> Tensor:
        """All elements of a storage (N,)."""
        start, size = self._span(f"data/{key}")
        if not size:
            return torch.empty(0, dtype=dtype)
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=size - size % dtype.itemsize, offset=start)
        return (raw if start % dtype.itemsize == 0 else raw.clone()).view(dtype)

    def _storage(self, said: Any) -> _Storage:
        kind, of, key, _, count = said
        if kind != "storage" or not isinstance(key, str) or not isinstance(count, int):
            raise Refused(f"a persistent id of kind {str(kind)[:40]!r}")
        dtype = _STORAGES.get(of.name.removeprefix("torch.").removesuffix("Storage"))
        entry = self._entries.get(f"data/{key}")
        needed = count * (1 if dtype is None else dtype.itemsize)
        if entry is None or not 0 <= needed <= entry.file_size:
            raise ValueError(f"storage {key[:40]!r} has not the {needed} bytes that it should have")
        return _Storage(key, dtype, needed)

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
        return self._placed(storage, storage.dtype, offset, shape, stride)

    def _tensor_v3(
        self, storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
    ) -> StoredTensor:
        return self._placed(storage, _DTYPES[dtype.name], offset, shape, stride)

    def _placed(self, storage: Any, dtype: Any, offset: Any, shape: Any, stride: Any) -> StoredTensor:
        shape, stride = _size(shape), _size(stride)
        if not isinstance(storage, _Storage) or dtype is None or len(shape) != len(stride):
            raise ValueError("a tensor is put together wrongly")
        if not isinstance(offset, int) or offset < 0:
            raise ValueError(f"a tensor begins at {offset!r}")
        available = storage.size_bytes // dtype.itemsize
        end = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
        # An expanded tensor may claim any size: one that is larger than its storage would not fit in memory.
        if prod(shape) > available or (prod(shape) and end > available):
            raise ValueError(f"a tensor of shape {shape} exceeds its storage of {available} elements")
        return StoredTensor(self, storage.key, dtype, offset, shape, stride)

    def _bytes(self, name: str) -> bytes:
        start, size = self._span(name)
        return self._map[start : start + size]

    def _span(self, name: str) -> tuple[int, int]:
        """Where an entry's bytes lie; they are the ones that were written."""
        entry = self._entries[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise CheckpointError(
                f"{self.path}: its entry {name} is compressed or encrypted, which torch.save never does: it is not read"
            )
        begin = entry.header_offset
        try:
            magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(self._map, begin)
        except struct.error as error:
            raise self._damaged(error) from None
        start, size = begin + _LOCAL_HEADER.size + name_bytes + extra_bytes, entry.file_size
        if magic != b"PK\x03\x04" or size != entry.compress_size or start + size > len(self._map):
            raise self._damaged(f"its entry {name} does not lie where the archive says")
        # torch.save can be told to write 0 in place of checksums.
        if name not in self._checked and entry.CRC:
            with memoryview(self._map) as view, view[start : start + size] as piece:
                if zlib.crc32(piece) != entry.CRC:
                    raise self._damaged(f"its entry {name} does not match its CRC-32: flipped bits")
            self._checked.add(name)
        return start, size

    def _damaged(self, why: object) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged ({why}): copy it again")


def _is_pickle(name: str) -> bool:
    return name == "data.pkl" or (name.endswith("/data.pkl") and name.count("/") == 1)


def _not_zip(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"\x80\x02":
        return f"{path} is in the format that torch.save wrote before 1.6: save it again with a newer torch"
    return f"{path} is no file of torch.save, or it is truncated: copy it again"


def _size(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, tuple | list) or len(sizes) > _MAX_DIMS:
        raise ValueError("a tensor's sizes are no short list")
    if not all(isinstance(size, int) and 0 <= size < 1 << 62 for size in sizes):
        raise ValueError("a tensor's sizes are not positive numbers")
    return tuple(sizes)


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """How a tensor with attributes is pickled; the attributes are left out."""
    return function.build(*arguments)


def _type_only(*_: Any) -> Any:
    raise Refused("a call of a type that is only a mark")
