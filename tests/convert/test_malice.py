"""Nothing in a checkpoint of another trainer is ever executed, and damaged files end in one sentence."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from muster.convert.opening import open_source
from muster.convert.torchfile import StoredTensor, read_torch_file
from muster.errors import CheckpointError, MusterError
from tests.convert.writers import deepspeed, megatron, spec, state_of, universal, values


class Planted:
    """Pickles to a call of anything."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def plant(path: Path, mark: Path) -> None:
    """Put a call into a file that otherwise stays as it is."""
    content = torch.load(path, weights_only=False)
    torch.save({"planted": Planted(os.system, f"touch {mark}"), "kept": content}, path)


def trees(folder: Path) -> dict[str, Path]:
    model = spec(layers=2)
    state = state_of(model)
    return {
        "zero-2": deepspeed(folder / "zero-2", model, state, stage=2),
        "zero-3": deepspeed(folder / "zero-3", model, state, stage=3),
        "universal": universal(folder / "universal", model, state, is_flat=False),
        "megatron": megatron(folder / "megatron", model, state, tensor=2, pipeline=2),
    }


def read_all(folder: Path) -> None:
    """All that a conversion reads."""
    values(open_source(folder), spec(layers=2))


@pytest.mark.parametrize("kind", ["zero-2", "zero-3", "universal", "megatron"])
def test_a_planted_call_in_any_file_is_named_and_not_made(kind: str, tmp_path: Path) -> None:
    tree, mark = trees(tmp_path)[kind], tmp_path / "executed"
    files = sorted(tree.rglob("*.pt"))
    assert len(files) >= 3
    for path in files:
        honest = path.read_bytes()
        plant(path, mark)
        with pytest.raises(CheckpointError, match=rf"{path.name} holds the name posix\.system"):
            read_all(tree)
        path.write_bytes(honest)
    read_all(tree)
    assert not mark.exists()
    plant(files[0], mark)
    torch.load(files[0], weights_only=False)  # what the others do
    assert mark.exists()


CALLS: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    (eval, ("1/0",)),
    (exec, ("1/0",)),
    (os.system, ("false",)),
    (subprocess.call, (["false"],)),
    (getattr, (os, "system")),
    (torch.load, ("x",)),
    (torch.hub.load, ("x", "y")),
    (pickle.loads, (b"",)),
    (torch.nn.Linear, (2, 2)),
    (io.open, ("/dev/null",)),
    (__import__, ("os",)),
]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(("function", "arguments"), CALLS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_name_but_those_of_data_is_refused(
    function: Any, arguments: tuple[Any, ...], protocol: int, tmp_path: Path
) -> None:
    path = tmp_path / "planted.pt"
    pickled = pickle.dumps(Planted(function, *(a for a in arguments if a is not os)), protocol)
    write_zip(path, pickled)
    with pytest.raises(
        CheckpointError, match=r"planted\.pt holds (the name|the opcode) [\w.]+, which is more than"
    ):
        read_torch_file(path)


def write_zip(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in entries.items():
            archive.writestr(f"archive/{name.replace('__', '/')}", content)


def test_other_opcodes_are_refused(tmp_path: Path) -> None:
    for pickled, said in (
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"(ios\nsystem\n.", "INST"),
        (b"(I1\no.", "OBJ"),
        (b"Pname\n.", "PERSID"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
        (b"\x80\x02]q\x00(K\x01K\x02e)R.", "a call of something"),
        (b"\x80\x02}q\x00]K\x01s.", "a key of type list"),
    ):
        write_zip(tmp_path / "a.pt", pickled)
        with pytest.raises(CheckpointError, match=said):
            read_torch_file(tmp_path / "a.pt")


def test_plain_data_is_read_as_it_is(tmp_path: Path) -> None:
    content = {
        "numbers": [1, -(2**70), 2.5, True, None, (1, (2,), ())],
        "text": ("a", b"bytes", {3, 4}),
        "nested": defaultdict(list, {"a": [1]}),
        1: torch.float16,
        "device": torch.device("cpu"),
    }
    torch.save(content, tmp_path / "a.pt")
    found = read_torch_file(tmp_path / "a.pt")
    assert found["numbers"] == content["numbers"]
    assert found["text"] == content["text"]
    assert found["nested"] == {"a": [1]}


def test_tensors_of_every_kind_are_read_as_they_are(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    tensors = {
        str(dtype): base.to(dtype)
        for dtype in (torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.uint16, torch.float8_e5m2)
    } | {
        "transposed": base.t(), "part": base[1:3, 2:], "empty": torch.empty(0, 3), "scalar": torch.tensor(3.0),
        "parameter": torch.nn.Parameter(base),
    }  # fmt: skip
    torch.save(tensors, tmp_path / "a.pt")
    found = read_torch_file(tmp_path / "a.pt")
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].read().float(), tensor.detach().float()), name


def test_formats_that_are_not_read_say_so(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save([1], path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before 1\.6"):
        read_torch_file(path)
    for content in (b"", b"no zip at all", bytes(1000)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is truncated"):
            read_torch_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b", "c")
    with pytest.raises(CheckpointError, match=r"0 data\.pkl"):
        read_torch_file(path)
    with pytest.raises(CheckpointError, match="missing"):
        read_torch_file(tmp_path / "b.pt")


def tensor_pickle(
    storage_elements: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> bytes:
    """What torch.save writes of a tensor in storage 0, with sizes of our choice."""

    class Storage:
        pass

    class Pickler(pickle._Pickler):  # type: ignore[misc,name-defined]
        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, Storage):
                return ("storage", torch.FloatStorage, "0", "cpu", storage_elements)
            return None

    out = io.BytesIO()
    call = (torch._utils._rebuild_tensor_v2, (Storage(), offset, shape, stride, False, {}))
    Pickler(out, 2).dump(Planted(*(call[0], *call[1])))
    return out.getvalue()


@pytest.mark.parametrize(
    ("elements", "offset", "shape", "stride"),
    [
        (4, 0, (1 << 40,), (0,)),  # a bomb: one element said to be a terabyte
        (4, 0, (8,), (1,)),
        (4, 3, (2,), (1,)),
        (4, 0, (2, 2), (4, 1)),
        (1 << 40, 0, (4,), (1,)),
        (-4, 0, (4,), (1,)),
        (4, -1, (2,), (1,)),
        (4, 0, (-2,), (1,)),
        (4, 0, (2,), (-1,)),
        (4, 0, (2,), ()),
    ],
)
def test_a_tensor_never_exceeds_its_storage(
    elements: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], tmp_path: Path
) -> None:
    write_zip(tmp_path / "a.pt", tensor_pickle(4, 0, (2, 2), (2, 1)), data__0=bytes(16))
    assert read_torch_file(tmp_path / "a.pt").read().tolist() == [[0, 0], [0, 0]]
    write_zip(tmp_path / "a.pt", tensor_pickle(elements, offset, shape, stride), data__0=bytes(16))
    with pytest.raises(CheckpointError, match="damaged"):
        read_torch_file(tmp_path / "a.pt")


def test_bombs_are_refused_without_unfolding(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write_zip(path, pickle.dumps([0] * 2_000_000, 2), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match="compressed"):
        read_torch_file(path)
    # The same long list made into a set again and again: work that the size of the pickle does not bound.
    many = b"".join(b"K%c" % (i % 256) for i in range(100_000))
    again = b"c__builtin__\nset\nh\x00\x85R0" * 10_000
    write_zip(path, b"\x80\x02]q\x00(" + many + b"e" + again + b"h\x00.")
    with pytest.raises(CheckpointError, match="copied entries"):
        read_torch_file(path)
    write_zip(path, b"\x80\x02" + b"(" * 1_000_000 + b"t" * 1_000_000 + b"}h\x00K\x01s.")
    with pytest.raises(CheckpointError):  # deep enough to overflow the stack, were it hashed
        read_torch_file(path)


def outcome(path: Path) -> str:
    try:
        content = read_torch_file(path)
        walk(content)
    except CheckpointError:
        return "refused"
    return "read"


def walk(value: Any) -> None:
    if isinstance(value, StoredTensor):
        value.read().clone()
    elif isinstance(value, dict):
        for entry in value.values():
            walk(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            walk(entry)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(100.0), "b": [1, "x"]}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    path = tmp_path / "a.pt"
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        assert outcome(path) == "refused"


def test_flipped_bits_are_found(tmp_path: Path) -> None:
    """All but those in bytes that nobody reads, such as the archive's dates, change nothing or are refused."""
    tensor = torch.arange(100.0)
    torch.save({"a": tensor}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    random.seed(0)
    path, refused = tmp_path / "a.pt", 0
    for _ in range(600):
        damaged, bit = bytearray(whole), random.randrange(8 * len(whole))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        if outcome(path) == "refused":
            refused += 1
        else:
            assert torch.equal(read_torch_file(path)["a"].read(), tensor)
    assert refused > 100


def test_random_pickles_end_in_a_sentence(tmp_path: Path) -> None:
    """Neither another exception nor much memory comes of whatever the pickle holds."""
    honest = pickle.dumps({"a": [1, 2.5, "x", (None, True)], "b": {b"c": {1, 2}}}, 2)
    random.seed(1)
    path = tmp_path / "a.pt"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(1000):
        if number % 2:
            pickled = b"\x80\x02" + random.randbytes(random.randrange(1, 200))
        else:
            changed = bytearray(honest)
            for _ in range(random.randrange(1, 6)):
                changed[random.randrange(len(changed))] = random.randrange(256)
            pickled = bytes(changed)
        write_zip(path, pickled)
        outcome(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_damaged_trees_end_in_a_sentence(tmp_path: Path) -> None:
    """Whole checkpoints with entries of other kinds than a trainer writes."""
    random.seed(2)
    survived = set()
    for kind, tree in trees(tmp_path / "trees").items():
        files = sorted(tree.rglob("*.pt"))
        for _ in range(25):
            copy = tmp_path / "copy"
            shutil.copytree(tree, copy)
            path = copy / random.choice(files).relative_to(tree)
            content = torch.load(path, weights_only=False)
            torch.save(mutated(content, random.randrange(1, 5)), path)
            with contextlib.suppress(MusterError):  # and no other exception
                read_all(copy)
                survived.add(kind)
            shutil.rmtree(copy)
    assert survived  # of entries that nobody needs


def mutated(content: Any, depth: int) -> Any:
    """Something of another kind somewhere in a table."""
    wrong = [None, 3, -1, "text", [], {}, torch.zeros(2, 3), [torch.zeros(1)], {"a": 1}, (1, 2)]
    if depth == 0 or not isinstance(content, dict | list) or not content:
        return random.choice(wrong)
    copied = content.copy()
    key = random.choice(list(content)) if isinstance(content, dict) else random.randrange(len(content))
    if random.random() < 0.2 and isinstance(content, dict):
        del copied[key]
    else:
        copied[key] = mutated(content[key], depth - 1)
    return copied


def test_the_reader_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes of trainers are kept by their names, even where their modules could be loaded."""
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    write_zip(tmp_path / "a.pt", b"\x80\x02cdeepspeed.runtime.config\nThing\n)\x81}b.")
    assert read_torch_file(tmp_path / "a.pt").name == "deepspeed.runtime.config.Thing"
    assert "deepspeed" not in sys.modules
