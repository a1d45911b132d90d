"""Packed weights on disk: what is read is what was written, and nothing else is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from muster.errors import UsageError
from muster.model.folder import save_folder
from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer, named_tensors
from muster.serve.engine import packed_file
from muster.serve.engine.packed import PackedModel, pack_model
from muster.serve.engine.packed_bytes import ReadAhead, packed_path
from muster.serve.engine.packed_file import open_packed, read_packed, source_digest, write_packed
from muster.serve.kernels.packing import FORMATS, Format

SPEC = TransformerSpec(
    family="qwen3", layers=2, width=40, heads=4, kv_heads=2, head_dim=10, ffn=72, vocab=101, context=64, tied=True,
    qk_norm=True,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = Transformer(SPEC)
    model.init_weights(0)
    path = tmp_path / "model"
    save_folder(dict(named_tensors(model)), SPEC, path, dtype=torch.float32, bos_id=0, eos_id=1)
    return path


def assert_same(found: PackedModel, written: PackedModel) -> None:
    assert (found.spec, found.format, found.compute) == (written.spec, written.format, written.compute)
    assert found.tensors.keys() == written.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in written.tensors.items())
    assert found.linears.keys() == written.linears.keys()
    for name, weights in written.linears.items():
        mine = found.linears[name]
        assert (mine.format, mine.features, mine.inputs) == (weights.format, weights.features, weights.inputs)
        assert mine.tensors().keys() == weights.tensors().keys()
        assert all(torch.equal(mine.tensors()[part], tensor) for part, tensor in weights.tensors().items())


@pytest.mark.parametrize("format", FORMATS)
def test_round_trip(format: Format, tmp_path: Path) -> None:
    model = Transformer(SPEC)
    model.init_weights(0)
    packed = pack_model(model, format)
    write_packed(packed, tmp_path / "packed", "source")
    assert_same(read_packed(tmp_path / "packed", "source"), packed)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_opened_again_it_is_read(folder: Path) -> None:
    first, reason = open_packed(folder, "int4")
    assert "packed now" in reason
    again, reason = open_packed(folder, "int4")
    assert "read from muster-packed-int4.safetensors" in reason
    assert_same(again, first)
    assert "own files" in open_packed(folder, "fp32")[1]
    assert not packed_path(folder, "fp32").exists()


def test_it_is_read_ahead(folder: Path) -> None:
    read = ReadAhead(folder, "bf16")  # there is nothing yet
    first, reason = open_packed(folder, "bf16", read)
    assert "packed now" in reason
    read = ReadAhead(folder, "bf16")
    assert_same(open_packed(folder, "bf16", read)[0], first)
    content = packed_path(folder, "bf16").read_bytes()
    packed_path(folder, "bf16").write_bytes(content[:-1])
    assert "damaged" in open_packed(folder, "bf16", read)[1], "what was read ahead is used once"
    packed_path(folder, "bf16").write_bytes(content[:-1])
    assert "damaged" in open_packed(folder, "bf16", ReadAhead(folder, "bf16"))[1]
    assert packed_path(folder, "bf16").read_bytes() == content


def test_any_safetensors_reader_can_open_it(folder: Path) -> None:
    from safetensors.torch import load_file

    model, _ = open_packed(folder, "int8")
    tensors = load_file(packed_path(folder, "int8"))
    assert torch.equal(tensors["layers.1.qkv.weight"], model.linears["layers.1.qkv"].weight)


def test_every_flipped_bit_is_found(folder: Path) -> None:
    open_packed(folder, "int4")
    path = packed_path(folder, "int4")
    sound = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = [*range(0, 200, 7), *torch.randint(len(sound), (150,), generator=generator).tolist()]
    for place in places:
        damaged = bytearray(sound)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="damaged"):
            read_packed(path)


def test_cut_off_and_too_long(folder: Path) -> None:
    open_packed(folder, "int8")
    path = packed_path(folder, "int8")
    sound = path.read_bytes()
    for content in (sound[:-1], sound + b"x", sound[: len(sound) // 2], sound[:5], b""):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="damaged"):
            read_packed(path)
    assert "damaged" in open_packed(folder, "int8")[1]
    assert path.read_bytes() == sound, "it is made anew"


def test_other_weights_are_noticed(folder: Path, tmp_path: Path) -> None:
    open_packed(folder, "int4")
    trained = Transformer(SPEC)
    trained.init_weights(1)
    other = tmp_path / "other"
    save_folder(dict(named_tensors(trained)), SPEC, other, dtype=torch.float32, bos_id=0, eos_id=1)
    assert source_digest(other) != source_digest(folder)
    shutil.copy(packed_path(folder, "int4"), packed_path(other, "int4"))
    _, reason = open_packed(other, "int4")
    assert "other weights" in reason
    assert "read from" in open_packed(other, "int4")[1]


def test_another_layout_is_made_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_packed(folder, "int4")
    monkeypatch.setattr(packed_file, "LAYOUT", "panels-of-48")
    assert "panels-of-48" in open_packed(folder, "int4")[1]


def test_a_folder_that_cannot_be_written_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed_path(folder, "int4").mkdir()  # as root, permissions would not stop it
    _, reason = open_packed(folder, "int4")
    assert "not kept" in reason
    assert not list(folder.glob(".*partial"))


def test_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(UsageError):
        open_packed(tmp_path, "int4")
