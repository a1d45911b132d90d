"""Whoever asks for an impossible layout learns what is possible: the values that a refusal names work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from muster.config.load import load_resolved
from muster.errors import ConfigError
from muster.model.build import spec_from_config
from muster.parallel.layout import Layout, resolve
from tests.toy import tiny

DENSE = {"family": "llama", "layers": 4, "width": 96, "heads": 12, "kv_heads": 6, "ffn": 64, "context": 60}
EXPERTS = {
    "family": "dots1", "layers": 4, "width": 96, "heads": 12, "kv_heads": 4, "context": 60, "experts": 6,
    "experts_per_token": 2, "expert_ffn": 36, "shared_ffn": 36,
}  # fmt: skip
PRESET = {"preset": "llama-3-8b", "context": 8192}

REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    # heads alone would allow 3, but neither the ffn of 64 nor all of the rest do
    (DENSE, {"tensor": 3}, r"tensor: 3 does not divide ffn \(64\): nearest legal values are 2"),
    (DENSE, {"tensor": 4, "sequence_parallel": False}, r"share the 6 kv_heads: nearest legal values are 2"),
    (DENSE, {"context": 5, "context_kind": "ulysses"}, r"12 heads that tensor 1 leaves.*use context 4 or 6, or ring"),
    (DENSE, {"context": 4, "context_kind": "ring"}, r"8 equal chunks, which 60 tokens do not give; use context 3 or 5"),
    (EXPERTS, {"shard": 4, "expert": 4}, r"expert: 4 does not divide the 6 experts of a layer: .* values are 2"),
    (EXPERTS, {"shard": 4, "expert": 3}, r"shard x context \(4\), which it is taken from: .* values are 2"),
    (EXPERTS, {"tensor": 8}, r"tensor: 8 does not divide expert_ffn \(36\): nearest legal values are 4"),
    (DENSE, {"microbatch": 5}, r"microbatch: 5 does not divide the 16 sequences of a rank: .* values are 4 or 8"),
    (DENSE, {"pipeline": 4, "microbatch": 8}, r"cannot run 2 microbatches a step: use layout\.microbatch 4 for"),
    (PRESET, {"tensor": 64}, r"tensor: 64 does not divide heads \(32\): nearest legal values are 32"),
]  # fmt: skip


def decide(model: dict[str, Any], layout: dict[str, Any], **train: Any) -> Layout:
    run = tiny(model=model, layout=layout)
    batch_tokens = 16 * model["context"]
    run["train"] = {"tokens": batch_tokens, "batch_tokens": batch_tokens} | train
    resolved = load_resolved(run)
    return resolve(resolved, spec_from_config(resolved.model, 500, Path()), cores=2, gpus=0)


@pytest.mark.parametrize(("model", "layout", "message"), REFUSED, ids=str)
def test_the_nearest_legal_values_are_legal(
    model: dict[str, Any], layout: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        decide(model, layout)
    advice = re.compile(r"^layout\.(\w+): .*(?:values are|use (?:layout\.)?(\w+)) (\d+)(?: or (\d+))?")
    found = [match for problem in refused.value.problems if (match := advice.match(problem))]
    assert len(found) == len(refused.value.problems)
    for match in found:
        key, other, *values = match.groups()
        for value in filter(None, values):
            decide(model, layout | {other or key: int(value)})


def test_an_advised_length_is_within_the_context_and_divides_the_batch() -> None:
    with pytest.raises(ConfigError, match=r"a rank's 30 tokens .*: change train\.sequence to 48, or set seq"):
        decide(EXPERTS, {"tensor": 4, "context": 2})
    decide(EXPERTS, {"tensor": 4, "context": 2}, sequence=48)
    with pytest.raises(ConfigError, match=r"tokens do not give; use context 3 or 5 or train\.sequence 48$"):
        decide(DENSE, {"context": 4, "context_kind": "ring"})
    decide(DENSE, {"context": 4, "context_kind": "ring"}, sequence=48)


def test_too_few_sequences_for_a_pipeline() -> None:
    with pytest.raises(ConfigError, match=r"the 2 sequences of a rank are too few.* each rank 4 sequences"):
        decide(DENSE, {"replicate": 8, "pipeline": 4})
    decide(DENSE, {"replicate": 8, "pipeline": 4}, batch_tokens=4 * 8 * 60, tokens=4 * 8 * 60)


def test_everything_wrong_with_a_layout_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        decide(EXPERTS, {"replicate": 3, "tensor": 5, "context": 7, "expert": 5, "pipeline": 8})
    said = "\n".join(refused.value.problems)
    for part in ("3 ranks do not divide", ".tensor: 5", ".expert: 5", ".pipeline: 8 pipeline stages"):
        assert part in said
