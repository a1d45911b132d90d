"""A folder in Hugging Face layout as llama.cpp's GGUF file: `write_gguf.py FOLDER FILE bf16|f32`.

For Llama models of ours, whose tokenizers llama.cpp's own converter does not know. Needs its `gguf` package.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}  # fmt: skip
LAYER_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def main() -> None:
    folder, path, format = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    describe(writer, config)
    add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()), config)
    narrow = gguf.GGMLQuantizationType.BF16
    for name, tensor in load_file(folder / "model.safetensors").items():
        ours, tensor = renamed(name, tensor, config)
        if tensor.dim() == 1 or format == "f32":
            writer.add_tensor(ours, tensor.float().numpy())
        else:
            raw = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(ours, raw, raw_dtype=narrow)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])


def add_tokenizer(writer: Any, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    ids = dict(tokenizer["model"]["vocab"])
    special = {added["content"]: added["id"] for added in tokenizer["added_tokens"] if added["special"]}
    tokens = sorted((ids | special).items(), key=lambda item: item[1])
    tokens += [(f"[unused {id}]", id) for id in range(len(tokens), config["vocab_size"])]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe" if tokenizer["pre_tokenizer"]["type"] == "Sequence" else "gpt-2")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([kinds.CONTROL if token in special else kinds.NORMAL for token, _ in tokens])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def renamed(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> tuple[str, torch.Tensor]:
    """A tensor under llama.cpp's name; it turns neighbours of a query or key where others turn halves."""
    if name in NAMES:
        return NAMES[name], tensor
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    if part in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = config["num_attention_heads" if part == "self_attn.q_proj" else "num_key_value_heads"]
        tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
    return f"blk.{layer}.{LAYER_NAMES[part]}.{kind}", tensor


if __name__ == "__main__":
    main()
