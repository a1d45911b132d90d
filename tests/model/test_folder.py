"""Folders: what is refused, and that a folder is there whole or not at all."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from muster.errors import UsageError
from muster.model import folder as folders
from muster.model.config_json import read_spec
from muster.model.folder import load_folder, save_folder
from muster.model.spec import TransformerSpec
from muster.model.staging import staged
from muster.model.transformer import Transformer

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
Q = "model.layers.1.self_attn.q_proj.weight"


def save(
    model: Transformer, folder: Path, max_shard_bytes: int = 10**9, dtype: torch.dtype = torch.float32
) -> None:
    save_folder(
        dict(model.named_parameters()),
        model.spec,
        folder,
        dtype=dtype,
        bos_id=1,
        eos_id=2,
        max_shard_bytes=max_shard_bytes,
    )


@pytest.fixture
def folder(spec: TransformerSpec, tmp_path: Path) -> Path:
    model = Transformer(spec)
    model.init_weights(0)
    save(model, tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000, 1])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_saved_is_loaded(
    spec: TransformerSpec, gpt2: TransformerSpec, tmp_path: Path, family: str, max_shard_bytes: int
) -> None:
    model = Transformer(spec if family == "llama" else gpt2)
    model.init_weights(0)
    save(model, tmp_path / "model", max_shard_bytes)
    loaded = load_folder(tmp_path / "model")
    assert loaded.spec == model.spec
    for (name, ours), (other, theirs) in zip(
        model.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs), name
    assert load_folder(tmp_path / "model", dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16


def test_bf16_files_are_half_the_size_and_rounded_once(spec: TransformerSpec, tmp_path: Path) -> None:
    model = Transformer(spec)
    model.init_weights(0)
    save(model, tmp_path / "model", dtype=torch.bfloat16)
    loaded = load_folder(tmp_path / "model")
    assert torch.equal(loaded.embed.weight, model.embed.weight.bfloat16().float())
    assert read_spec(tmp_path / "model") == spec


def test_only_pickle_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"only pytorch_model.bin, which is a pickle"):
        load_folder(folder)


def test_no_model_at_all(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UsageError, match="JSON object"):
        read_spec(tmp_path)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop(Q))
    with pytest.raises(UsageError, match=f"lacks tensor '{Q}'"):
        load_folder(folder)


def test_a_surplus_tensor_is_named(folder: Path) -> None:
    bias = Q.replace("weight", "bias")
    change(folder, lambda tensors: tensors.update({bias: torch.zeros(60)}))
    with pytest.raises(UsageError, match=f"also has tensor '{bias}'"):
        load_folder(folder)


def test_a_misshapen_tensor_is_named(folder: Path) -> None:
    for shape in ((60, 47), (60,), (), (3, 4, 5)):
        change(folder, lambda tensors, shape=shape: tensors.update({Q: torch.zeros(shape)}))  # type: ignore[misc]
        with pytest.raises(UsageError, match=f"'{Q}' gives .* shape"):
            load_folder(folder)


def test_misshapen_fused_tensors_are_named(gpt2: TransformerSpec, tmp_path: Path) -> None:
    model = Transformer(gpt2)
    model.init_weights(0)
    save(model, tmp_path / "model")
    name = "transformer.h.0.attn.c_attn.weight"
    for shape in ((24, 71), (24, 2), (72, 24)):
        change(tmp_path / "model", lambda tensors, shape=shape: tensors.update({name: torch.zeros(shape)}))  # type: ignore[misc]
        with pytest.raises(UsageError, match=name):
            load_folder(tmp_path / "model")


def test_buffers_and_names_of_older_files(
    spec: TransformerSpec, gpt2: TransformerSpec, tmp_path: Path
) -> None:
    model = Transformer(gpt2)
    model.init_weights(0)
    save(model, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    older = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    older["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(older, tmp_path / "model" / "model.safetensors")
    assert torch.equal(load_folder(tmp_path / "model").embed.weight, model.embed.weight)


def test_a_head_beside_a_tied_embedding(spec: TransformerSpec, tmp_path: Path) -> None:
    model = Transformer(replace(spec, tied=True))
    model.init_weights(0)
    folder = tmp_path / "model"
    save(model, folder)
    change(folder, lambda tensors: tensors.update({HEAD: tensors[EMBED].clone()}))
    assert load_folder(folder).head is None
    change(folder, lambda tensors: tensors[HEAD].mul_(2))
    with pytest.raises(UsageError, match="tie_word_embeddings"):
        load_folder(folder)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    for size in (0, 7, 100, len(content) - 1):
        (folder / "model.safetensors").write_bytes(content[:size])
        with pytest.raises(UsageError, match="cannot be read"):
            load_folder(folder)


@pytest.mark.parametrize(
    "weight_map", [None, [], {Q: 3}, {Q: "../model.safetensors"}, {Q: "gone.safetensors"}]
)
def test_an_index_that_leads_nowhere_is_refused(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UsageError, match="index"):
        load_folder(folder)


def test_saving_never_mixes_with_older_files(model: Transformer, tmp_path: Path) -> None:
    save(model, tmp_path / "model", 10_000)
    with pytest.raises(UsageError, match="already holds files"):
        save(model, tmp_path / "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        save(model, tmp_path / "file")


def test_a_failed_save_leaves_nothing(model: Transformer, tmp_path: Path) -> None:
    weights = dict(model.named_parameters())
    del weights["norm.weight"]
    with pytest.raises(KeyError):
        save_folder(weights, model.spec, tmp_path / "model", dtype=torch.float32, bos_id=1, eos_id=2)
    assert not list(tmp_path.iterdir())


def test_staging_replaces_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")

    def fail() -> None:
        with staged(target, replace=True) as draft:
            (draft / "new").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [path.name for path in target.iterdir()] == ["old"]
    with staged(target, replace=True) as draft:
        (draft / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_full_disk_is_an_oserror(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors words it as text only, and the command line knows OSError."""

    def full(*args: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(folders, "save_file", full)
    with pytest.raises(OSError, match="No space left") as raised:
        save(model, tmp_path / "model")
    assert raised.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())
