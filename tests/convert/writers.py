"""Checkpoints as DeepSpeed and Megatron-LM lay them out, made from a model of ours with random state.

Of DeepSpeed the layout is compared with the real thing in `test_deepspeed_real.py`.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muster.data.tokenizer import Tokenizer
from muster.model.families import FAMILIES
from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer, named_tensors

KINDS = ("weights", "exp_avg", "exp_avg_sq")
STEPS = 7
State = dict[str, dict[str, Tensor]]
VOCAB = Tokenizer.byte().vocab


def spec(**changes: Any) -> TransformerSpec:
    sizes = {
        "family": "llama", "layers": 4, "width": 24, "heads": 4, "kv_heads": 2, "head_dim": 6, "ffn": 20,
        "vocab": VOCAB, "context": 32, "tied": False,
    }  # fmt: skip
    return TransformerSpec(**(sizes | changes))


GPT2 = {
    "family": "gpt2", "kv_heads": 4, "tied": True, "norm": "layer", "positions": "learned", "mlp": "gelu",
    "qkv_bias": True, "out_bias": True, "mlp_bias": True,
}  # fmt: skip


def state_of(spec: TransformerSpec) -> State:
    """By kind and name of ours."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in named_tensors(Transformer(spec))}
    generator = torch.Generator().manual_seed(1)
    state = {
        kind: {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
        for kind in KINDS
    }
    for tensor in state["exp_avg_sq"].values():
        tensor.square_()
    return state


def values(source: Any, spec: TransformerSpec) -> State:
    """All that a source gives."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in named_tensors(Transformer(spec))}
    return {
        kind: {name: source.values(kind, spec)(name, shape) for name, shape in shapes.items()}
        for kind in KINDS
    }


def assert_same(found: State, expected: State) -> None:
    for kind in expected:
        different = [
            name for name, tensor in expected[kind].items() if not torch.equal(found[kind][name], tensor)
        ]
        assert different == []


def deepspeed(folder: Path, spec: TransformerSpec, state: State, *, stage: int, ranks: int = 2) -> Path:
    """ZeRO files of `ranks` ranks; a folder as `save_checkpoint` leaves it."""
    theirs = FAMILIES[spec.family].tensors(spec)
    named = {kind: {theirs[name].name: tensor for name, tensor in state[kind].items()} for kind in KINDS}
    names = list(named["weights"])
    tag = folder / f"global_step{STEPS}"
    tag.mkdir(parents=True)
    (folder / "latest").write_text(tag.name)
    groups = [
        names[: len(names) // 2],
        names[len(names) // 2 :],
    ]  # two groups of parameters, or two sub-groups
    shapes = [OrderedDict((name, named["weights"][name].shape) for name in group) for group in groups]
    model = {
        "module": OrderedDict((name, tensor.bfloat16()) for name, tensor in named["weights"].items()),
        "buffer_names": [],
        "param_shapes": shapes,
        "frozen_param_shapes": None,
        "shared_params": {"lm_head.weight": "model.embed_tokens.weight"} if spec.tied else {},
        "global_steps": STEPS + 2,
        "skipped_steps": 2,
        "ds_version": "0.19.8",
        "args": argparse.Namespace(lr=0.1, names=["a", "b"]),
    }
    if stage < 3:
        torch.save(model, tag / "mp_rank_00_model_states.pt")
    flat = _flat_by_group if stage < 3 else _flat_by_parameter
    for rank in range(ranks):
        vectors = {kind: [flat(named[kind], group, rank, ranks) for group in groups] for kind in KINDS}
        moments = {
            index: {kind: vectors[kind][index] for kind in KINDS[1:]} | {"step": torch.tensor(float(STEPS))}
            for index in range(len(groups))
        }
        optimizer: dict[str, Any] = {"zero_stage": stage}
        if stage < 3:
            optimizer["base_optimizer_state"] = {"state": moments, "param_groups": [{"lr": 0.1}]}
            optimizer["single_partition_of_fp32_groups"] = vectors["weights"]
            optimizer["partition_count"] = [ranks, ranks]
        else:
            torch.save(model, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
            optimizer["optimizer_state_dict"] = {"state": moments, "param_groups": [{"lr": 0.1}]}
            optimizer["fp32_flat_groups"] = vectors["weights"]
            optimizer["partition_count"] = ranks
        torch.save(
            {"optimizer_state_dict": optimizer}, tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )
    return folder


def _flat_by_group(tensors: dict[str, Tensor], names: list[str], rank: int, ranks: int) -> Tensor:
    whole = torch.cat([tensors[name].flatten() for name in names])
    padded = torch.cat([whole, torch.zeros(-len(whole) % (2 * ranks))])
    return padded.chunk(ranks)[rank].clone()


def _flat_by_parameter(tensors: dict[str, Tensor], names: list[str], rank: int, ranks: int) -> Tensor:
    return torch.cat([_part(tensors[name], rank, ranks) for name in names])


def _part(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    size = -(-tensor.numel() // ranks)
    padded = torch.cat([tensor.flatten(), torch.zeros(size * ranks - tensor.numel())])
    return padded[rank * size : (rank + 1) * size]


def universal(folder: Path, spec: TransformerSpec, state: State, *, is_flat: bool) -> Path:
    """As `ds_to_universal` writes it: of stages 1 and 2 whole tensors, of stage 3 flat ones."""
    theirs = FAMILIES[spec.family].tensors(spec)
    for kind, name in zip(KINDS, ("fp32", "exp_avg", "exp_avg_sq"), strict=True):
        for ours, tensor in state[kind].items():
            place = folder / "zero" / theirs[ours].name
            place.mkdir(parents=True, exist_ok=True)
            torch.save(tensor.flatten() if is_flat else {"param": tensor, "cat_dim": 0}, place / f"{name}.pt")
    shapes = OrderedDict((theirs[ours].name, tensor.shape) for ours, tensor in state["weights"].items())
    model = {"global_steps": STEPS, "skipped_steps": 0, "param_shapes": [shapes], "shared_params": {}}
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if is_flat else "mp_rank_00_model_states.pt"
    torch.save(model, folder / name)
    return folder


def megatron(
    folder: Path, spec: TransformerSpec, state: State, *, tensor: int = 1, pipeline: int = 1, virtual: int = 1,
    names: str = "core", padded: int = 0, precision: torch.dtype = torch.bfloat16, optimizer: bool = True,
) -> Path:  # fmt: skip
    """As Megatron-LM saves in its torch format on tensor x pipeline ranks, interleaved where `virtual` > 1."""
    iteration = folder / f"iter_{STEPS:07d}"
    iteration.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(STEPS))
    arguments = _arguments(spec, tensor, pipeline, padded)
    chunks = pipeline * virtual
    layers = spec.layers // chunks
    for stage in range(pipeline):
        for rank in range(tensor):
            parts: dict[str, list[dict[str, Tensor]]] = {}
            for kind in KINDS:
                parts[kind] = []
                for chunk in range(virtual):
                    position = chunk * pipeline + stage
                    of = range(position * layers, (position + 1) * layers)
                    is_last = position == chunks - 1
                    whole = _theirs(spec, state[kind], of, position == 0, is_last, rank, tensor, padded)
                    if is_last and spec.tied and chunks > 1:
                        whole["output_layer.weight"] = _vocabulary(state[kind]["embed.weight"], padded).chunk(
                            tensor
                        )[rank]
                    parts[kind].append({name: part.clone() for name, part in whole.items()})
            content: dict[str, Any] = {
                "args": arguments, "checkpoint_version": 3.0, "iteration": STEPS,
                "rng_state": [{"torch_rng_state": torch.get_rng_state(), "np_rng_state": None}],
            }  # fmt: skip
            for chunk, part in enumerate(parts["weights"]):
                low = {name: value.to(precision) for name, value in part.items()}
                content["model" if virtual == 1 else f"model{chunk}"] = _spelt(low, names)
            if optimizer:
                content["optimizer"] = _optimizer(parts)
            name = f"mp_rank_{rank:02d}" if pipeline == 1 else f"mp_rank_{rank:02d}_{stage:03d}"
            (iteration / name).mkdir()
            torch.save(content, iteration / name / "model_optim_rng.pt")
    return folder


def _theirs(
    spec: TransformerSpec, state: dict[str, Tensor], of: range, first: bool, last: bool,
    rank: int, ranks: int, padded: int,
) -> dict[str, Tensor]:  # fmt: skip
    """One rank's tensors by Megatron-Core's names."""

    def rows(tensor: Tensor) -> Tensor:
        return tensor.chunk(ranks)[rank]

    kinds = ("weight", "bias") if spec.norm == "layer" else ("weight",)
    found: dict[str, Tensor] = {}
    if first:
        found["embedding.word_embeddings.weight"] = rows(_vocabulary(state["embed.weight"], padded))
        if spec.positions == "learned":
            found["embedding.position_embeddings.weight"] = state["positions.weight"]
    for number, layer in enumerate(of):
        ours, here = f"layers.{layer}", f"decoder.layers.{number}"
        for kind in kinds:
            found[f"{here}.input_layernorm.{kind}"] = state[f"{ours}.attention_norm.{kind}"]
        found[f"{here}.self_attention.linear_proj.weight"] = state[f"{ours}.attention.o.weight"].chunk(
            ranks, dim=1
        )[rank]
        if spec.out_bias:
            found[f"{here}.self_attention.linear_proj.bias"] = state[f"{ours}.attention.o.bias"]
        for kind in ("weight", "bias") if spec.qkv_bias else ("weight",):
            found[f"{here}.self_attention.linear_qkv.{kind}"] = rows(
                _fused_qkv(spec, state, f"{ours}.attention", kind)
            )
        for which in "qk" if spec.qk_norm else "":
            found[f"{here}.self_attention.{which}_layernorm.weight"] = state[
                f"{ours}.attention.{which}_norm.weight"
            ]
        for kind in kinds:
            found[f"{here}.pre_mlp_layernorm.{kind}"] = state[f"{ours}.mlp_norm.{kind}"]
        for kind in ("weight", "bias") if spec.mlp_bias else ("weight",):
            up = rows(state[f"{ours}.mlp.up.{kind}"])
            gate = [rows(state[f"{ours}.mlp.gate.{kind}"])] if spec.mlp == "swiglu" else []
            found[f"{here}.mlp.linear_fc1.{kind}"] = torch.cat([*gate, up])
        found[f"{here}.mlp.linear_fc2.weight"] = state[f"{ours}.mlp.down.weight"].chunk(ranks, dim=1)[rank]
        if spec.mlp_bias:
            found[f"{here}.mlp.linear_fc2.bias"] = state[f"{ours}.mlp.down.bias"]
    if last:
        for kind in kinds:
            found[f"decoder.final_layernorm.{kind}"] = state[f"norm.{kind}"]
        if not spec.tied:
            found["output_layer.weight"] = rows(_vocabulary(state["head.weight"], padded))
    return found


def _fused_qkv(spec: TransformerSpec, state: dict[str, Tensor], prefix: str, kind: str) -> Tensor:
    """For each group of heads that share keys and values: the rows of its queries, of its keys, of its values."""
    q, k, v = (state[f"{prefix}.{which}.{kind}"] for which in "qkv")
    shared = spec.heads // spec.kv_heads * spec.head_dim
    pieces = []
    for group in range(spec.kv_heads):
        pieces.append(q[group * shared : (group + 1) * shared])
        pieces.append(k[group * spec.head_dim : (group + 1) * spec.head_dim])
        pieces.append(v[group * spec.head_dim : (group + 1) * spec.head_dim])
    return torch.cat(pieces)


def _vocabulary(table: Tensor, padded: int) -> Tensor:
    return torch.cat([table, torch.full((max(padded - len(table), 0), table.shape[1]), 9.0)])


def _optimizer(parts: dict[str, list[dict[str, Tensor]]]) -> dict[str, Any]:
    """Float16OptimizerWithFloat16Params: matrices decay and come first, then the vectors; numbered in that order."""
    groups, state, masters, number = [], {}, [], 0
    for is_matrix in (True, False):
        members = [
            (chunk, name) for chunk, part in enumerate(parts["weights"]) for name in part
            if (part[name].dim() > 1) is is_matrix
        ]  # fmt: skip
        for chunk, name in members:
            state[len(state)] = {kind: parts[kind][chunk][name] for kind in KINDS[1:]}
        count = len(members)
        groups.append(
            {"params": list(range(number, number + count)), "wd_mult": float(is_matrix), "step": STEPS}
        )
        masters.append([parts["weights"][chunk][name] for chunk, name in members])
        number += count
    return {"optimizer": {"state": state, "param_groups": groups}, "fp32_from_fp16_params": masters}


_TE = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_LEGACY = {
    "embedding.": "language_model|embedding|", "decoder.": "language_model|encoder|",
    "output_layer.": "language_model|output_layer|", "linear_qkv": "query_key_value", "linear_proj": "dense",
    "linear_fc1": "dense_h_to_4h", "linear_fc2": "dense_4h_to_h", "pre_mlp_layernorm": "post_attention_norm",
    "input_layernorm": "input_norm", "final_layernorm": "final_norm",
}  # fmt: skip


def _spelt(model: dict[str, Tensor], names: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, tensor in model.items():
        for core, other in ({"te": _TE, "legacy": _LEGACY, "core": {}}[names]).items():
            name = name.replace(core, other)
        table = found
        *folders, leaf = name.split("|")
        for folder in folders:
            table = table.setdefault(folder, {})
        table[leaf] = tensor
    if names == "te":
        found["decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    return found


def _arguments(spec: TransformerSpec, tensor: int, pipeline: int, padded: int) -> argparse.Namespace:
    gpt2 = spec.norm == "layer"
    return argparse.Namespace(
        num_layers=spec.layers, hidden_size=spec.width, num_attention_heads=spec.heads, kv_channels=spec.head_dim,
        group_query_attention=spec.kv_heads != spec.heads, num_query_groups=spec.kv_heads, ffn_hidden_size=spec.ffn,
        vocab_size=spec.vocab, padded_vocab_size=max(padded, spec.vocab), max_position_embeddings=spec.context,
        untie_embeddings_and_output_weights=not spec.tied, norm_epsilon=spec.norm_eps,
        normalization="LayerNorm" if gpt2 else "RMSNorm",
        position_embedding_type="learned_absolute" if gpt2 else "rope",
        rotary_base=int(spec.rope_theta), rotary_percent=1.0, swiglu=not gpt2, add_bias_linear=spec.mlp_bias,
        add_qkv_bias=spec.qkv_bias, qk_layernorm=spec.qk_norm, num_experts=None, bf16=True, params_dtype=torch.bfloat16,
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, data_path=None, betas=(0.9, 0.95),
    )  # fmt: skip
