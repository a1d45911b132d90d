"""LoRA adapters (Hu et al. 2021) in PEFT's layout: what a folder holds, or everything that is wrong with it.

A folder has `adapter_config.json` and `adapter_model.safetensors`. Whatever would make its model another one than the
base with W + s B A in place of W is refused by name, as ignoring it would serve a different model. Nothing is executed:
no pickle is read, and no regular expression of the config is matched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from muster.errors import ConfigError
from muster.model.families import FAMILIES
from muster.model.spec import TransformerSpec

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

_PREFIX = "base_model.model."
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MOST = 1 << 15
"""For ranks and scales; others are mistakes."""
_SHOWN = 3
"""Tensors that a problem names."""

_USED = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "layers_to_transform"})
_OF_TRAINING = frozenset({
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "lora_dropout", "fan_in_fan_out", "exclude_modules", "layers_pattern", "megatron_core", "megatron_config",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size",
    "ensure_weight_tying",
})  # fmt: skip
"""Keys that change nothing about what is computed from the tensors."""
_CAUSES = {
    "use_dora": "DoRA scales the merged weights, which would have to be made for each adapter",
    "modules_to_save": "whole layers of its own are another model: serve that merged",
    "trainable_token_indices": "embeddings are those of the base model",
    "bias": "biases are those of the base model",
    "lora_bias": "biases are those of the base model",
    "rank_pattern": "one rank has to hold for all layers",
    "alpha_pattern": "one scale has to hold for all layers",
    "use_qalora": "inputs are not pooled",
    "layer_replication": "layers are those of the base model",
    "target_parameters": "only linear layers are adapted",
}
_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")
"""`init_lora_weights` that leave the base weights as they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """What is added to some matrices W (N, K) of a model: B A."""

    name: str
    rank: int
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    """By our name of the matrix: A (rank, K) and B (N, rank) in fp32, the scale in B."""

    @property
    def parameters(self) -> int:
        return sum(a.numel() + b.numel() for a, b in self.pairs.values())


def read_adapters(folders: Mapping[str, str], spec: TransformerSpec) -> list[Adapter]:
    """The adapters of the model `spec`, by name and folder. Raises ConfigError with all problems of all of them."""
    problems: list[str] = []
    found: list[Adapter] = []
    for name, folder in folders.items():
        reading = _Reading(name, Path(folder).expanduser(), spec)
        adapter = reading.adapter()
        problems += [f"adapter {name}: {problem}" for problem in reading.problems]
        if adapter is not None:
            found.append(adapter)
    if problems:
        raise ConfigError(problems)
    return found


class _Reading:
    """One folder, and what is wrong with it so far."""

    def __init__(self, name: str, folder: Path, spec: TransformerSpec) -> None:
        self.problems: list[str] = []
        self._name, self._folder, self._spec = name, folder, spec
        # By their name of a matrix: ours that are in it, in order.
        self._modules: dict[str, list[str]] = {}
        for ours, foreign in FAMILIES[spec.family].tensors(spec).items():
            if ours.startswith("layers.") and (".attention." in ours or ".mlp." in ours):
                theirs = foreign.name.removesuffix(".weight")
                if not foreign.stacked and foreign.name.endswith(".weight") and "norm" not in ours:
                    self._modules.setdefault(theirs, []).append(ours)
        if spec.experts:
            self._modules = {name: of for name, of in self._modules.items() if ".attention." in of[0]}

    def adapter(self) -> Adapter | None:
        """What the folder holds; None where there is a problem."""
        config = self._config()
        if config is None:
            return None
        rank, scale = self._scale(config)
        self._refuse(config)
        if rank is None:
            return None
        pairs = dict(self._pairs(config, rank, scale))
        return None if self.problems else Adapter(name=self._name, rank=rank, pairs=pairs)

    def _config(self) -> dict[str, Any] | None:
        folder = self._folder
        if not (folder / CONFIG).is_file():
            self._problem(f"{folder} has no {CONFIG}: give a folder in PEFT's layout")
            return None
        try:
            config = json.loads((folder / CONFIG).read_text("utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            self._problem(f"{folder / CONFIG} cannot be read ({error})")
            return None
        if not isinstance(config, dict):
            self._problem(f"{folder / CONFIG} should hold a JSON object")
            return None
        return config

    def _scale(self, config: Mapping[str, Any]) -> tuple[int | None, float]:
        rank, alpha, rooted = config.get("r"), config.get("lora_alpha"), config.get("use_rslora", False)
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= _MOST:
            self._problem(f"r: should be a whole number from 1 to {_MOST} (got {_shown(rank)})")
            rank = None
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha <= _MOST:
            self._problem(f"lora_alpha: should be a number above 0, up to {_MOST} (got {_shown(alpha)})")
            alpha = 1
        if not isinstance(rooted, bool):
            self._problem(f"use_rslora: should be true or false (got {_shown(rooted)})")
        # Rank-stabilised (Kalajdzievski 2023): by the root of the rank.
        return rank, alpha / (math.sqrt(rank or 1) if rooted is True else rank or 1)

    def _refuse(self, config: Mapping[str, Any]) -> None:
        kind = config.get("peft_type")
        if kind != "LORA":
            self._problem(f"peft_type: only LORA is served (got {_shown(kind)})")
        initial = config.get("init_lora_weights")
        if not any(initial is one or (isinstance(one, str) and initial == one) for one in _INITIAL):
            cause = "that changes the base weights: convert it to plain LoRA"
            self._problem(f"init_lora_weights: {_shown(initial)} is not served: {cause}")
        for key, value in config.items():
            if key in _USED or key in _OF_TRAINING or key == "init_lora_weights":
                continue
            if value and not (key == "bias" and value == "none"):
                cause = _CAUSES.get(key, "what it does is not known here")
                self._problem(f"{key}: {_shown(value)} is not served: {cause}")

    def _pairs(
        self, config: Mapping[str, Any], rank: int, scale: float
    ) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """By our names, A and scaled B."""
        path = self._folder / WEIGHTS
        if not path.is_file():
            pickled = (self._folder / PICKLE).is_file()
            instead = f"only {PICKLE}, a pickle that could run anything: convert it to safetensors"
            self._problem(f"{self._folder} has {instead}" if pickled else f"{self._folder} has no {WEIGHTS}")
            return
        try:
            with safe_open(path, framework="pt") as file:
                stored = set(file.keys())
                modules = self._modules_of(stored, config)
                missing = [name for module in modules for name in _names(module) if name not in stored]
                if missing:
                    self._problem(f"{WEIGHTS} lacks {_listed(missing)}: copy it again")
                for module in modules:
                    if stored.issuperset(_names(module)):
                        yield from self._fitted(file, module, rank, scale)
        except (SafetensorError, OSError) as error:
            self._problem(f"{path} cannot be read ({error}): copy it again")

    def _modules_of(self, stored: set[str], config: Mapping[str, Any]) -> list[str]:
        """Their names of the matrices that are adapted; what else there is, is a problem."""
        known = {name: module for module in self._modules for name in _names(module)}
        unknown = sorted(stored - known.keys())
        if unknown:
            blocks = "" if self._spec.experts else " and of the feed-forward blocks"
            self._problem(
                f"{WEIGHTS} has {_listed(unknown)}, but adapted are only the linear layers of attention{blocks} of "
                f"this model's {self._spec.layers} layers"
            )
        if not stored:
            self._problem(f"{WEIGHTS} has no tensors")
        found = {known[name] for name in stored & known.keys()}
        targets = config.get("target_modules")
        if isinstance(targets, list):
            # What the config says is adapted must be there; PEFT's other ways to say it are for it to understand.
            some = config.get("layers_to_transform") is not None or config.get("exclude_modules")
            for target in map(str, targets):
                matched = {one for one in self._modules if one == target or one.endswith(f".{target}")}
                if not matched and not unknown:
                    self._problem(f"target_modules: '{target[:80]}' is nothing that can be adapted here")
                found |= set() if some else matched
        return sorted(found)

    def _fitted(
        self, file: Any, module: str, rank: int, scale: float
    ) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """Of a matrix of theirs, which may be several of ours."""
        parts = self._modules[module]
        shapes = [_shape(self._spec, ours) for ours in parts]
        rows = [shape[0] for shape in shapes]
        a, b = (
            self._tensor(file, name, shape)
            for name, shape in zip(_names(module), ((rank, shapes[0][1]), (sum(rows), rank)), strict=True)
        )
        if a is not None and b is not None:
            for ours, part in zip(parts, torch.split(b * scale, rows), strict=True):
                yield ours, (a, part)

    def _tensor(self, file: Any, name: str, shape: tuple[int, int]) -> Tensor | None:
        tensor: Tensor = file.get_tensor(name)
        if tuple(tensor.shape) != shape:
            self._problem(
                f"{WEIGHTS}: '{name}' has the shape {tuple(tensor.shape)}, but r and this model ask for {shape}"
            )
        elif tensor.dtype not in _FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            self._problem(f"{WEIGHTS}: '{name}' is {kind}, but should be float32, bfloat16 or float16")
        elif not tensor.isfinite().all():
            self._problem(f"{WEIGHTS}: '{name}' holds nan or inf")
        else:
            return tensor.float()
        return None

    def _problem(self, sentence: str) -> None:
        self.problems.append(sentence)


def _shape(spec: TransformerSpec, ours: str) -> tuple[int, int]:
    """(outputs, inputs) of a matrix of a layer."""
    heads, kv_heads = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    name = ours.split(".")[-2]
    if name in "qkvo":
        return {"q": (heads, spec.width), "o": (spec.width, heads)}.get(name, (kv_heads, spec.width))
    return (spec.width, spec.ffn) if name == "down" else (spec.ffn, spec.width)


def _names(module: str) -> tuple[str, str]:
    """Where PEFT keeps A and B."""
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"'{name[:120]}'" for name in names[:_SHOWN]) + more


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
