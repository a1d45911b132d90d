"""From the `model:` section of a run file to a specification."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from muster.config import schema
from muster.errors import ConfigError
from muster.model.config_json import read_spec
from muster.model.presets import PRESETS
from muster.model.spec import TransformerSpec

_FFN_MULTIPLE = 64


def spec_from_config(
    section: schema.Model, vocab: int, base: Path, read: Callable[[Path], TransformerSpec] = read_spec
) -> TransformerSpec:
    """The model that a run file asks for, with a tokenizer of `vocab` tokens.

    `base` is the run file's folder, and `read` gives the model in the folder that `from` names. Raises ConfigError,
    and UsageError where that cannot be read.
    """
    if section.from_ is not None:
        spec = read(base / Path(section.from_).expanduser())
        if vocab > spec.vocab:
            raise ConfigError(
                [
                    f"data.tokenizer: its {vocab} tokens do not fit the model's vocabulary of {spec.vocab}; "
                    f"leave data.tokenizer out to use the model's own"
                ]
            )
        return _with_context(spec, section)
    if section.preset is not None:
        if section.preset not in PRESETS:
            close = difflib.get_close_matches(section.preset, PRESETS, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(PRESETS)}"
            raise ConfigError([f"model.preset: there is no preset '{section.preset}' - {hint}"])
        return _sized(PRESETS[section.preset], section, vocab)
    return _sized(_family_defaults(section), section, vocab)


def _family_defaults(section: schema.Model) -> TransformerSpec:
    # The schema has made sure of these.
    assert section.family is not None
    assert section.layers is not None
    assert section.width is not None
    assert section.heads is not None
    assert section.context is not None
    gpt2 = section.family == "gpt2"
    sparse = section.family in schema.SPARSE
    ffn = 4 * section.width if gpt2 else _round_up(8 * section.width / 3, _FFN_MULTIPLE)
    family: dict[str, dict[str, Any]] = {
        "llama": {},
        "mistral": {},
        "qwen2": {"qkv_bias": True, "norm_eps": 1e-6, "rope_theta": 1e6},
        "qwen3": {"qk_norm": True, "norm_eps": 1e-6, "rope_theta": 1e6},
        "mixtral": {"router_renormalize": True, "rope_theta": 1e6},
        "qwen3_moe": {"qk_norm": True, "norm_eps": 1e-6, "rope_theta": 1e6, "router_renormalize": True},
        "dots1": {
            "qk_norm": True, "norm_eps": 1e-6, "rope_theta": 1e6, "router": "sigmoid", "router_renormalize": True,
            "router_bias": True,
        },
        "gpt2": {
            "norm": "layer", "positions": "learned", "mlp": "gelu", "qkv_bias": True, "out_bias": True,
            "mlp_bias": True, "tied": True,
        },
    }  # fmt: skip
    common: dict[str, Any] = {"tied": False} | family[section.family]
    if sparse:
        assert section.experts_per_token is not None
        common["expert_ffn"] = section.expert_ffn or _round_up(ffn / section.experts_per_token, _FFN_MULTIPLE)
        common["shared_ffn"] = common["expert_ffn"] if section.family == "dots1" else 0
    return TransformerSpec(
        family=section.family,
        layers=section.layers,
        width=section.width,
        heads=section.heads,
        kv_heads=section.heads,
        head_dim=section.width // section.heads,
        ffn=0 if sparse else ffn,
        vocab=0,
        context=section.context,
        **common,
    )


def _sized(spec: TransformerSpec, section: schema.Model, vocab: int) -> TransformerSpec:
    """The sizes written in the run file win over the preset's or the family's."""
    sizes = ("layers", "width", "heads", "kv_heads", "ffn", "context", "tied", "rope_theta", "window")
    names = (*sizes, *schema.EXPERT_SIZES)
    said = {name: getattr(section, name) for name in names if getattr(section, name) is not None}
    sized = replace(spec, **said, vocab=vocab)
    if "width" in said or "heads" in said:
        if sized.width % sized.heads:
            raise ConfigError(
                [f"model.heads: {sized.heads} heads do not divide width ({sized.width}); change one of them"]
            )
        sized = replace(sized, head_dim=sized.width // sized.heads)
    problems = [*_problems(sized, said), *_expert_problems(sized, said)]
    if problems:
        raise ConfigError(problems)
    return sized


def _problems(spec: TransformerSpec, said: Mapping[str, Any]) -> Iterator[str]:
    family = spec.family
    if spec.window is not None and family not in ("mistral", "mixtral"):
        yield f"model.window: {family} has no sliding window; use family: mistral, or leave it out"
    if spec.positions == "rope" and spec.head_dim % 2:
        yield f"model.heads: width / heads ({spec.head_dim}) must be even for rotary positions"
    if family == "gpt2":
        if spec.kv_heads != spec.heads:
            yield f"model.kv_heads: gpt2 has one for each of its {spec.heads} heads; leave it out"
        if not spec.tied:
            yield "model.tied: gpt2 always uses its embedding as the head; leave tied out"
        if "rope_theta" in said:
            yield "model.rope_theta: gpt2 has learned positions; leave it out"
    elif spec.heads % spec.kv_heads:
        yield f"model.kv_heads: {spec.kv_heads} must divide heads ({spec.heads}); change one of them"


def _expert_problems(spec: TransformerSpec, said: Mapping[str, Any]) -> Iterator[str]:
    family = spec.family
    if family not in schema.SPARSE:
        for name in schema.EXPERT_SIZES:
            if name in said:
                yield f"model.{name}: {family} has no experts; use family: {_listed(schema.SPARSE)}, or leave it out"
        return
    if "ffn" in said:
        yield f"model.ffn: every layer of a {family} model has experts; write expert_ffn instead"
    if spec.experts_per_token > spec.experts:
        yield (
            f"model.experts_per_token: {spec.experts_per_token} exceeds the {spec.experts} experts of a layer; "
            f"use {spec.experts} or less"
        )
    if "shared_ffn" in said and family != "dots1":
        yield f"model.shared_ffn: {family} has no shared experts; use family: dots1, or leave it out"
    elif spec.shared_ffn % spec.expert_ffn:
        below = spec.shared_ffn // spec.expert_ffn * spec.expert_ffn
        near = [str(size) for size in (below, below + spec.expert_ffn) if size]
        yield (
            f"model.shared_ffn: {spec.shared_ffn} is not a multiple of expert_ffn ({spec.expert_ffn}): "
            f"nearest legal values are {' and '.join(near)}"
        )


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _round_up(value: float, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


def balance_from_config(said: schema.Balance, spec: TransformerSpec) -> schema.Balance | None:
    """How `train.balance` keeps the load of this model's experts even, defaults filled in; None without experts.

    Raises ConfigError for a way that the model, or what it is exported as, does not have.
    """
    if not spec.experts:
        if said != schema.Balance():
            raise ConfigError([f"train.balance: {spec.family} has no experts to balance; leave it out"])
        return None
    kind = said.kind or ("bias" if spec.router_bias else "aux_loss")
    if kind == "bias" and not spec.router_bias:
        raise ConfigError(
            [f"train.balance.kind: a {spec.family} router has no bias; use aux_loss, or model.family: dots1"]
        )
    other = "rate" if kind == "aux_loss" else "coefficient"
    if getattr(said, other) is not None:
        raise ConfigError([f"train.balance.{other}: {kind} has none; leave it out"])
    if kind == "aux_loss":
        return schema.Balance(kind=kind, coefficient=0.001 if said.coefficient is None else said.coefficient)
    return schema.Balance(kind=kind, rate=said.rate or 0.001)


def _with_context(spec: TransformerSpec, section: schema.Model) -> TransformerSpec:
    if section.context is None:
        return spec
    if section.context > spec.context:
        raise ConfigError(
            [
                f"model.context: {section.context} exceeds the {spec.context} tokens that {section.from_} "
                f"was made for"
            ]
        )
    if spec.positions == "learned" and section.context != spec.context:
        raise ConfigError(
            [f"model.context: the position table of {section.from_} has {spec.context} rows; leave it out"]
        )
    return replace(spec, context=section.context)
