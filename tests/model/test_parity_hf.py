"""Every family equals `transformers`: both directions of the conversion, and generation token for token.

`python tests/model/test_parity_hf.py` prints the table.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers

from muster.model.config_json import read_spec
from muster.model.folder import load_folder, save_folder
from muster.model.generate import generate
from muster.model.transformer import named_tensors

LIMIT = 1e-4
COMMON = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
QWEN3_MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 20}
DOTS1 = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "head_dim": 12,
}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, COMMON | {"tie_word_embeddings": False}),
    "llama-tied-bias": (
        transformers.LlamaConfig,
        COMMON | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-3.1-rope": (transformers.LlamaConfig, COMMON | {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": (
        transformers.LlamaConfig,
        COMMON | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "mistral-window": (transformers.MistralConfig, COMMON | {"sliding_window": 7}),
    "mistral-no-window": (transformers.MistralConfig, COMMON | {"sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, COMMON | {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, COMMON | {"head_dim": 20, "tie_word_embeddings": False}),
    "mixtral": (transformers.MixtralConfig, COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral-window": (transformers.MixtralConfig, COMMON | {"num_local_experts": 6, "sliding_window": 7}),
    "qwen3-moe": (transformers.Qwen3MoeConfig, COMMON | QWEN3_MOE | {"norm_topk_prob": True}),
    "qwen3-moe-bias": (
        transformers.Qwen3MoeConfig,
        COMMON | QWEN3_MOE | {"attention_bias": True, "tie_word_embeddings": True},
    ),
    "dots1": (transformers.Dots1Config, COMMON | DOTS1 | {"norm_topk_prob": True}),
    "dots1-two-shared": (transformers.Dots1Config, COMMON | DOTS1 | {"n_shared_experts": 2}),
    "gpt2": (
        transformers.GPT2Config,
        {"vocab_size": 131, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128},
    ),
}


@dataclass(frozen=True)
class Parity:
    loaded: float
    """Largest logit difference, transformers' folder loaded by us."""
    saved: float
    """Largest logit difference, our folder loaded by transformers."""
    generated: bool


def randomized(case: str) -> Any:
    kind, options = CASES[case]
    torch.manual_seed(0)
    config = kind(**options, bos_token_id=1, eos_token_id=2, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norm weights and biases away from ones and zeros, or a forgotten one would go unnoticed.
            parameter.normal_(1.0 if "norm" in name or "ln_" in name else 0.0, 0.15)
        for name, buffer in model.named_buffers():
            if "bias" in name:
                buffer.normal_(0.0, 0.15)
    return model


@torch.no_grad()
def measure(case: str, folder: Path, max_shard_bytes: int = 10**9) -> Parity:
    theirs = randomized(case)
    theirs.save_pretrained(folder / "theirs", max_shard_size=max_shard_bytes)
    tokens = torch.randint(3, 131, (2, 40))
    expected = theirs(tokens).logits

    ours = load_folder(folder / "theirs")
    loaded = float((ours(tokens) - expected).abs().max())

    save_folder(
        dict(named_tensors(ours)), ours.spec, folder / "ours",
        dtype=torch.float32, bos_id=1, eos_id=2, max_shard_bytes=max_shard_bytes,
    )  # fmt: skip
    assert read_spec(folder / "ours") == ours.spec
    back = transformers.AutoModelForCausalLM.from_pretrained(folder / "ours", dtype=torch.float32).eval()
    saved = float((back(tokens).logits - expected).abs().max())

    theirs.generation_config.eos_token_id = None
    continued = theirs.generate(tokens, max_new_tokens=24, do_sample=False, pad_token_id=0)
    return Parity(loaded, saved, bool(torch.equal(generate(ours, tokens, 24), continued)))


@pytest.mark.parametrize("case", CASES)
def test_family_equals_transformers(case: str, tmp_path: Path) -> None:
    parity = measure(case, tmp_path)
    assert parity.loaded <= LIMIT
    assert parity.saved <= LIMIT
    assert parity.generated


@pytest.mark.parametrize("case", ["llama", "gpt2", "qwen3-moe"])
def test_sharded_folders(case: str, tmp_path: Path) -> None:
    parity = measure(case, tmp_path, max_shard_bytes=40_000)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    assert parity == Parity(pytest.approx(0, abs=LIMIT), pytest.approx(0, abs=LIMIT), True)


if __name__ == "__main__":
    sys.stdout.write(
        f"{'family':20}{'loaded: max |dlogit|':>22}{'saved: max |dlogit|':>22}  generation equal\n"
    )
    for name in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            row = measure(name, Path(scratch))
        sys.stdout.write(f"{name:20}{row.loaded:22.2e}{row.saved:22.2e}  {row.generated}\n")
