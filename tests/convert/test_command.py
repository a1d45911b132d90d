"""`muster convert`: from another trainer's files to a checked model folder, and to a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from muster.checkpoint import manifest, shelf
from muster.data.tokenizer import Tokenizer
from muster.export.trained import load_trained
from muster.model.config_json import read_spec
from muster.model.folder import open_weights, save_folder
from muster.model.transformer import named_tensors
from tests.conftest import Muster
from tests.convert.writers import STEPS, State, deepspeed, megatron, spec, state_of
from tests.toy import tiny, train_here, write_corpus


def like(folder: Path, **changes: Any) -> Path:
    """A model folder of the same shape, from which config.json and tokenizer are taken."""
    model = spec(**changes)
    tokenizer = Tokenizer.byte()
    save_folder(
        {name: torch.zeros_like(tensor) for name, tensor in state_of(model)["weights"].items()},
        model, folder, dtype=torch.float32, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id,
    )  # fmt: skip
    tokenizer.save(folder)
    return folder


def assert_weights(folder: Path, state: State) -> None:
    value = open_weights(folder)
    assert all(torch.equal(value(name, tensor.shape), tensor) for name, tensor in state["weights"].items())


def run_file(folder: Path, **train: Any) -> Path:
    """A run whose model is that of `spec()`."""
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    write_corpus(corpus)
    sizes = {"layers": 4, "width": 24, "heads": 4, "kv_heads": 2, "ffn": 20, "context": 32, "tied": False}
    plain = tiny(model={"family": "llama", **sizes}, checkpoint={"every": "1 steps", "keep": 9})
    plain["data"] = {"train": [{"files": "corpus/*.py"}], "held_out": 0.1}
    plain["train"] = plain["train"] | {"tokens": (STEPS + 2) * 256} | train
    path = folder / "run.yaml"
    YAML().dump(plain, path)
    return path


@pytest.mark.parametrize("trainer", ["deepspeed", "megatron"])
def test_weights_become_a_checked_folder(trainer: str, muster: Muster, tmp_path: Path) -> None:
    state = state_of(spec())
    if trainer == "deepspeed":
        source = deepspeed(tmp_path / "save", spec(), state, stage=3)
    else:
        source = megatron(tmp_path / "save", spec(), state, tensor=2, padded=260)
    code, said, error = muster("convert", source, tmp_path / "hf", "--like", like(tmp_path / "like"))
    assert (code, error) == (0, "")
    assert "top-1 agreement 100.00%" in said
    assert_weights(tmp_path / "hf", state)
    record = json.loads((tmp_path / "hf" / "muster.json").read_text())
    assert record["provenance"]["converted"] == str(source)


def test_what_lies_beside_the_checkpoint_is_used(muster: Muster, tmp_path: Path) -> None:
    """As transformers' Trainer leaves it: config.json and tokenizer around DeepSpeed's folder."""
    state = state_of(spec())
    source = deepspeed(like(tmp_path / "checkpoint-7"), spec(), state, stage=2)
    assert muster("convert", source, tmp_path / "hf")[0] == 0
    assert muster("convert", source / f"global_step{STEPS}", tmp_path / "hf2")[0] == 0
    assert_weights(tmp_path / "hf2", state)


def test_what_is_wanting_is_said(muster: Muster, tmp_path: Path) -> None:
    source = deepspeed(tmp_path / "save", spec(), state_of(spec()), stage=2)
    code, _, error = muster("convert", source, tmp_path / "hf")
    assert (code, error.count("\n")) == (2, 1)
    assert "--like FOLDER" in error
    other = megatron(tmp_path / "megatron", spec(), state_of(spec()))
    assert "no tokenizer beside it" in muster("convert", other, tmp_path / "hf")[2]
    code, _, error = muster(
        "convert", other, tmp_path / "hf", "--like", like(tmp_path / "like", norm_eps=1e-3)
    )
    assert "is of another model: it has norm_eps 1e-05 instead of 0.001" in error
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("trainer", ["deepspeed", "megatron"])
def test_a_run_goes_on_from_another_trainers_state(
    trainer: str, muster: Muster, run_ranks: Any, tmp_path: Path
) -> None:
    state = state_of(spec())
    if trainer == "deepspeed":
        source = deepspeed(tmp_path / "save", spec(), state, stage=2)
    else:
        source = megatron(tmp_path / "save", spec(), state, pipeline=2, tensor=2, padded=260)
    path, runs = run_file(tmp_path), tmp_path / "runs"
    code, said, error = muster("convert", source, path, "--runs", runs)
    assert code == 0, error
    assert f"resumes at step {STEPS} of {STEPS + 2}" in said
    folder = shelf.folder_of(runs / "tiny" / "checkpoints", STEPS)
    content = manifest.verify(folder)
    assert content.step == STEPS
    trained = load_trained(runs / "tiny")
    for name, tensor in named_tensors(trained.model):
        assert torch.equal(tensor, state["weights"][name])
    from tests.ranks.test_resume_matrix import assembled

    held = assembled(folder)
    for kind in ("exp_avg", "exp_avg_sq"):
        assert all(torch.equal(held[f"{kind}.{name}"], tensor) for name, tensor in state[kind].items())
    from muster.config.load import load_run

    run = load_run(path, ()).to_dict() | {"layout": {"shard": 2, "zero": 3}}
    metrics = run_ranks(2, train_here, run, str(tmp_path), str(runs / "tiny"))[0]
    assert [entry["step"] for entry in metrics if "loss" in entry] == [STEPS + 1, STEPS + 2]
    code, _, error = muster("convert", source, path, "--runs", runs)
    assert (code, "has checkpoints already" in error) == (2, True)


def test_a_run_that_cannot_go_on_is_refused(muster: Muster, tmp_path: Path) -> None:
    source, runs = deepspeed(tmp_path / "save", spec(), state_of(spec()), stage=2), tmp_path / "runs"

    def said(*arguments: object) -> str:
        code, _, error = muster("convert", *arguments, "--runs", runs)
        assert code == 2
        assert error.count("\n") == 1
        return error

    assert "muon" in said(source, run_file(tmp_path, optimizer={"kind": "muon"}))
    assert "ends after 6: set train.tokens to more than 1792" in said(
        source, run_file(tmp_path, tokens=6 * 256)
    )
    without = megatron(tmp_path / "megatron", spec(), state_of(spec()), optimizer=False)
    assert "saved without its optimizer" in said(without, run_file(tmp_path))
    assert "nowhere is no folder" in said(tmp_path / "nowhere", run_file(tmp_path))
    other = megatron(tmp_path / "other", spec(norm_eps=1e-3), state_of(spec()))
    assert "norm_eps" in said(other, run_file(tmp_path))
    assert not (runs / "tiny").exists()


def test_muster_to_a_folder_and_back_is_bitwise(muster: Muster, run_ranks: Any, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    run = tiny(layout={"shard": 2, "zero": 2})
    run_ranks(2, train_here, run, str(tmp_path), str(tmp_path / "runs" / "tiny"))
    trained = load_trained(tmp_path / "runs" / "tiny")
    expected = {name: tensor.detach().clone() for name, tensor in named_tensors(trained.model)}
    for number, source in enumerate((tmp_path / "runs" / "tiny", trained.checkpoint)):
        target = tmp_path / f"hf-{number}"
        assert muster("convert", source, target)[0] == 0
        assert read_spec(target) == trained.model.spec
        value = open_weights(target)
        assert all(torch.equal(value(name, tensor.shape), tensor) for name, tensor in expected.items())
