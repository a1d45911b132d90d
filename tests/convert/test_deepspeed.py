"""DeepSpeed's checkpoints arrive bit for bit, or are refused with what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from muster.convert.opening import open_source
from muster.errors import CheckpointError, UsageError
from tests.convert.writers import GPT2, STEPS, assert_same, deepspeed, spec, state_of, universal, values


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"tied": True, "family": "qwen2", "qkv_bias": True}], ids=str)
def test_zero_bit_for_bit(stage: int, ranks: int, changes: dict[str, Any], tmp_path: Path) -> None:
    model = spec(**changes)
    state = state_of(model)
    source = open_source(deepspeed(tmp_path / "save", model, state, stage=stage, ranks=ranks))
    assert source.steps == STEPS
    assert source.missing_moments is None
    assert_same(values(source, model), state)


@pytest.mark.parametrize("is_flat", [False, True])
def test_universal_bit_for_bit(is_flat: bool, tmp_path: Path) -> None:
    model = spec()
    state = state_of(model)
    source = open_source(universal(tmp_path / "save", model, state, is_flat=is_flat))
    assert "universal" in source.label
    assert_same(values(source, model), state)


def test_a_model_of_other_names_is_refused(tmp_path: Path) -> None:
    source = open_source(deepspeed(tmp_path, spec(), state_of(spec()), stage=2))
    with pytest.raises(UsageError, match=r"lacks tensor 'transformer.h.0"):
        source.values("weights", spec(**GPT2))
    with pytest.raises(UsageError, match=r"also has tensor 'model.layers.3"):
        source.values("weights", spec(layers=3))
    with pytest.raises(UsageError, match="shape"):
        source.values("weights", spec(vocab=9))("embed.weight", torch.Size((9, 24)))


def files(folder: Path) -> Path:
    return folder / f"global_step{STEPS}"


def change(path: Path, **changes: Any) -> None:
    torch.save(torch.load(path, weights_only=False) | changes, path)


def test_incomplete_and_mixed_up_checkpoints_are_refused(tmp_path: Path) -> None:
    model, state = spec(), state_of(spec())

    def saved(name: str, stage: int = 2) -> Path:
        return deepspeed(tmp_path / name, model, state, stage=stage)

    lost = saved("lost")
    (files(lost) / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="1 ranks, but they say 2"):
        open_source(lost)
    lost = saved("first")
    (files(lost) / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="rank 0 of 2"):
        open_source(lost)
    mixed = saved("mixed")
    change(files(mixed) / "mp_rank_00_model_states.pt", global_steps=90)
    with pytest.raises(CheckpointError, match="says 88 updates, its optimizer's 7"):
        open_source(mixed)
    for stage in (2, 3):
        grown = saved(f"grown-{stage}", stage)
        path = min(files(grown).glob("*_model_states.pt"))
        change(path, param_shapes=[{"model.embed_tokens.weight": torch.Size((400, 24))}])
        with pytest.raises(CheckpointError, match="laid out in no way"):
            open_source(grown)
    divided = saved("divided")
    (files(divided) / "mp_rank_01_model_states.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="2 model-parallel ranks"):
        open_source(divided)
    (divided / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="latest"):
        open_source(divided)
    empty = saved("empty")
    for path in files(empty).glob("*optim*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="no optimizer files"):
        open_source(empty)


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no checkpoint of DeepSpeed"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"model: \{from"):
        open_source(tmp_path)
