"""From the `model:` section of a run file to a specification."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from muster.config import schema
from muster.errors import ConfigError
from muster.model.folder import read_spec
from muster.model.presets import PRESETS
from muster.model.spec import TransformerSpec

_FFN_MULTIPLE = 64


def spec_from_config(section: schema.Model, vocab: int, base: Path) -> TransformerSpec:
    """The model that a run file asks for, with a tokenizer of `vocab` tokens.

    `base` is the run file's folder. Raises ConfigError, and UsageError where `from` cannot be read.
    """
    if section.from_ is not None:
        spec = read_spec(base / Path(section.from_).expanduser())
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
    ffn = 4 * section.width if gpt2 else -(-8 * section.width // (3 * _FFN_MULTIPLE)) * _FFN_MULTIPLE
    family: dict[str, dict[str, Any]] = {
        "llama": {},
        "mistral": {},
        "qwen2": {"qkv_bias": True, "norm_eps": 1e-6, "rope_theta": 1e6},
        "qwen3": {"qk_norm": True, "norm_eps": 1e-6, "rope_theta": 1e6},
        "gpt2": {
            "norm": "layer", "positions": "learned", "mlp": "gelu", "qkv_bias": True, "out_bias": True,
            "mlp_bias": True, "tied": True,
        },
    }  # fmt: skip
    common: dict[str, Any] = {"tied": False} | family[section.family]
    return TransformerSpec(
        family=section.family,
        layers=section.layers,
        width=section.width,
        heads=section.heads,
        kv_heads=section.heads,
        head_dim=section.width // section.heads,
        ffn=ffn,
        vocab=0,
        context=section.context,
        **common,
    )


def _sized(spec: TransformerSpec, section: schema.Model, vocab: int) -> TransformerSpec:
    """The sizes written in the run file win over the preset's or the family's."""
    names = ("layers", "width", "heads", "kv_heads", "ffn", "context", "tied", "rope_theta", "window")
    said = {name: getattr(section, name) for name in names if getattr(section, name) is not None}
    sized = replace(spec, **said, vocab=vocab)
    if "width" in said or "heads" in said:
        if sized.width % sized.heads:
            raise ConfigError(
                [f"model.heads: {sized.heads} heads do not divide width ({sized.width}); change one of them"]
            )
        sized = replace(sized, head_dim=sized.width // sized.heads)
    problems = list(_problems(sized, said))
    if problems:
        raise ConfigError(problems)
    return sized


def _problems(spec: TransformerSpec, said: Mapping[str, Any]) -> Iterator[str]:
    family = spec.family
    if spec.window is not None and family != "mistral":
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
