"""The model section of a run file: sizes by family, presets and their overrides, and what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from muster.config.schema import SPARSE, Balance, Model
from muster.errors import ConfigError, UsageError
from muster.model.build import balance_from_config, spec_from_config
from muster.model.folder import save_folder
from muster.model.presets import PRESETS
from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer, named_tensors

SIZES: dict[str, Any] = {"layers": 2, "width": 96, "heads": 6, "context": 128}
EXPERTS = {"experts": 4, "experts_per_token": 2}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2", *SPARSE])
def test_each_family_gives_a_model_that_runs(family: Any, tmp_path: Path) -> None:
    sizes = SIZES | (EXPERTS if family in SPARSE else {})
    spec = spec_from_config(Model(family=family, **sizes), 300, tmp_path)
    assert (spec.vocab, spec.head_dim, spec.kv_heads) == (300, 16, 6)
    model = Transformer(spec)
    model.init_weights(0)
    assert model(torch.zeros(1, 128, dtype=torch.long)).shape == (1, 128, 300)
    save_folder(dict(named_tensors(model)), spec, tmp_path / "out", dtype=torch.float32, bos_id=0, eos_id=0)


def test_sizes_override_the_preset(tmp_path: Path) -> None:
    section = Model(preset="qwen3-0.6b", layers=4, width=512, heads=8, kv_heads=2, context=256, tied=False)
    spec = spec_from_config(section, 5000, tmp_path)
    expected = {"layers": 4, "width": 512, "heads": 8, "kv_heads": 2, "head_dim": 64, "context": 256}
    assert spec == replace(PRESETS["qwen3-0.6b"], **expected, tied=False, vocab=5000)


def test_default_feed_forward_width(tmp_path: Path) -> None:
    assert spec_from_config(Model(family="llama", **SIZES), 300, tmp_path).ffn == 256
    assert spec_from_config(Model(family="gpt2", **SIZES), 300, tmp_path).ffn == 384
    mixtral = spec_from_config(Model(family="mixtral", **SIZES, **EXPERTS), 300, tmp_path)
    assert (mixtral.ffn, mixtral.expert_ffn, mixtral.shared_ffn) == (0, 128, 0)
    dots1 = spec_from_config(Model(family="dots1", **SIZES, **EXPERTS, expert_ffn=48), 300, tmp_path)
    assert (dots1.ffn, dots1.expert_ffn, dots1.shared_ffn) == (0, 48, 48)


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        (
            {"preset": "llama-3-9b"},
            "model.preset: there is no preset 'llama-3-9b' - did you mean 'llama-3-8b'",
        ),
        ({"family": "llama", **SIZES, "window": 32}, "model.window: llama has no sliding window"),
        ({"preset": "llama-3-8b", "window": 32}, "model.window: llama has no sliding window"),
        ({"preset": "llama-3-8b", "heads": 24}, r"model.heads: 24 heads do not divide width \(4096\)"),
        ({"preset": "llama-3-8b", "kv_heads": 5}, r"model.kv_heads: 5 must divide heads \(32\)"),
        ({"preset": "llama-3-8b", "width": 32}, r"model.heads: width / heads \(1\) must be even"),
        ({"preset": "gpt2", "kv_heads": 4}, "model.kv_heads: gpt2 has one for each of its 12 heads"),
        (
            {"family": "llama", **SIZES, "experts": 4},
            "model.experts: llama has no experts; use family: mixtral, ",
        ),
        ({"preset": "mixtral-8x7b", "ffn": 64}, "model.ffn: every layer of a mixtral model has experts"),
        (
            {"preset": "mixtral-8x7b", "experts_per_token": 9},
            "model.experts_per_token: 9 exceeds the 8 experts",
        ),
        ({"preset": "qwen3-30b-a3b", "shared_ffn": 64}, "model.shared_ffn: qwen3_moe has no shared experts"),
        (
            {"family": "dots1", **SIZES, **EXPERTS, "expert_ffn": 64, "shared_ffn": 100},
            r"model.shared_ffn: 100 is not a multiple of expert_ffn \(64\): nearest legal values are 64 and 128",
        ),
        ({"family": "gpt2", **SIZES, "tied": False}, "model.tied: gpt2 always"),
        ({"family": "gpt2", **SIZES, "rope_theta": 1e4}, "model.rope_theta: gpt2 has learned positions"),
    ],
)
def test_impossible_models_are_refused(section: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem) as raised:
        spec_from_config(Model(**section), 300, tmp_path)
    assert len(raised.value.problems) == 1


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    section = Model(family="gpt2", **SIZES, tied=False, rope_theta=1e4, kv_heads=3, window=4)
    with pytest.raises(ConfigError) as raised:
        spec_from_config(section, 300, tmp_path)
    assert len(raised.value.problems) == 4


def test_balance_follows_the_family(tmp_path: Path) -> None:
    def spec(family: Any, **sizes: Any) -> TransformerSpec:
        return spec_from_config(Model(family=family, **SIZES, **sizes), 300, tmp_path)

    llama, mixtral, dots1 = spec("llama"), spec("mixtral", **EXPERTS), spec("dots1", **EXPERTS)
    assert balance_from_config(Balance(), llama) is None
    assert balance_from_config(Balance(), mixtral) == Balance(kind="aux_loss", coefficient=0.001)
    assert balance_from_config(Balance(coefficient=0.0), mixtral) == Balance(kind="aux_loss", coefficient=0.0)
    assert balance_from_config(Balance(), dots1) == Balance(kind="bias", rate=0.001)
    assert balance_from_config(Balance(kind="aux_loss", coefficient=0.1), dots1) == Balance(
        kind="aux_loss", coefficient=0.1
    )
    for said, shape, problem in (
        (Balance(kind="bias"), llama, "train.balance: llama has no experts"),
        (Balance(kind="bias"), mixtral, "train.balance.kind: a mixtral router has no bias"),
        (Balance(rate=0.1), mixtral, "train.balance.rate: aux_loss has none"),
        (Balance(coefficient=0.1), dots1, "train.balance.coefficient: bias has none"),
    ):
        with pytest.raises(ConfigError, match=problem):
            balance_from_config(said, shape)


def test_from_a_folder(spec: TransformerSpec, gpt2: TransformerSpec, tmp_path: Path) -> None:
    for name, shape in (("rope", spec), ("learned", gpt2)):
        model = Transformer(shape)
        model.init_weights(0)
        save_folder(
            dict(model.named_parameters()), shape, tmp_path / name, dtype=torch.float32, bos_id=0, eos_id=0
        )
    assert spec_from_config(Model(from_="rope"), 101, tmp_path) == spec
    assert spec_from_config(Model(from_="rope", context=32), 90, tmp_path) == replace(spec, context=32)
    for section, vocab, problem in (
        (Model(from_="rope"), 102, "102 tokens do not fit the model's vocabulary of 101"),
        (Model(from_="rope", context=65), 101, "model.context: 65 exceeds the 64 tokens"),
        (Model(from_="learned", context=32), 101, "position table of learned has 64 rows"),
    ):
        with pytest.raises(ConfigError, match=problem):
            spec_from_config(section, vocab, tmp_path)
    with pytest.raises(UsageError, match="no such file"):
        spec_from_config(Model(from_="nowhere"), 101, tmp_path)
