"""Every family's greedy tokens are those of `transformers`, however the engine came to them."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers

from muster.model.folder import load_folder
from muster.model.transformer import Transformer
from muster.serve.engine.core import Core
from muster.serve.engine.drafters import EitherDrafter, ModelDrafter, NgramDrafter
from muster.serve.engine.network import TransformerNetwork
from muster.serve.engine.speculation import Drafter
from muster.serve.protocol import Request, SamplingParams, Token

COMMON = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 20}
DOTS1 = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "head_dim": 12,
    "norm_topk_prob": True,
}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, COMMON),
    "mistral-window": (transformers.MistralConfig, COMMON | {"sliding_window": 11}),
    "qwen2": (transformers.Qwen2Config, COMMON | {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, COMMON | {"head_dim": 20}),
    "mixtral": (transformers.MixtralConfig, COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (transformers.Qwen3MoeConfig, COMMON | EXPERTS),
    "dots1": (transformers.Dots1Config, COMMON | DOTS1),
    "gpt2": (
        transformers.GPT2Config,
        {"vocab_size": 131, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128},
    ),
}
NEW = 14


@dataclass(frozen=True)
class Case:
    folder: Path
    model: Transformer
    prompts: list[list[int]]
    expected: list[list[int]]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A family's tiny model, prompts (some beginning alike, some the same), and what transformers makes of them."""
    kind, options = FAMILIES[request.param]
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(kind(**options)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(6)
    folder = Path(tmp_path_factory.mktemp(request.param))
    theirs.save_pretrained(folder)
    rng = random.Random(1)
    common = [rng.randrange(131) for _ in range(24)]
    prompts = [common[: rng.randint(1, 24)] + [rng.randrange(131) for _ in range(n)] for n in (1, 3, 9, 30)]
    prompts += [common, common, common[:16], [5]]
    with torch.inference_mode():
        expected = [
            theirs.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
            for prompt in prompts
        ]
    return Case(folder, load_folder(folder), prompts, expected)


def run(core: Core, prompts: list[list[int]], *, together: bool = True, **params: Any) -> list[list[int]]:
    """Greedy tokens of each prompt: all at once, one coming after each step; or one after the other."""
    settings: dict[str, Any] = {"max_tokens": NEW, "temperature": 0.0} | params
    requests = [
        Request(id=str(index), prompt=tuple(prompt), params=SamplingParams(**settings))
        for index, prompt in enumerate(prompts)
    ]
    return list(generated(core, requests, together=together).values())


def generated(core: Core, requests: list[Request], *, together: bool = True) -> dict[str, list[int]]:
    """Tokens of each request, by its id; afterwards the core holds nothing."""
    found: dict[str, list[int]] = {request.id: [] for request in requests}
    waiting = list(requests)
    with torch.inference_mode():
        while core.busy or waiting:
            if waiting and (together or not core.busy):
                core.add(waiting.pop(0))
            for id, item in core.step().items:
                assert isinstance(item, Token), item
                found[id].append(item.id)
    assert core.stats().used_blocks == 0
    return found


WAYS: dict[str, dict[str, Any]] = {
    "together": {},
    "chunks": {"step_tokens": 5},
    "no prefix cache": {"prefix_cache": False},
    "preemption": {"blocks": 14, "block_tokens": 6, "step_tokens": 24},
    "small blocks": {"block_tokens": 1},
}


@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens_are_those_of_transformers(
    case: Case, make_core: Callable[..., Core], way: str
) -> None:
    core = make_core(case.model, **({"streams": 5} | WAYS[way]))
    assert run(core, case.prompts) == case.expected
    stats = core.stats()
    assert (stats.prefix_hit_tokens > 0) == (way != "no prefix cache")
    assert (stats.preemptions > 0) == (way == "preemption")


@pytest.mark.parametrize("guessing", ["ngram", "draft model", "itself", "either"])
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 30}]
)
def test_guessing_ahead_changes_no_token(
    case: Case, make_core: Callable[..., Core], guessing: str, settings: dict[str, Any]
) -> None:
    params = {"seed": 7, "max_tokens": 40} | settings
    expected = run(make_core(case.model, streams=5), case.prompts, **params)
    drafter: Drafter = NgramDrafter()
    if guessing != "ngram":
        model = case.model
        if guessing == "draft model":  # like the model, but not quite
            model = copy.deepcopy(model)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.02)
        network, _ = TransformerNetwork.of(model, "fp32")
        drafter = own = ModelDrafter(network, network.new_cache(80, 8), step_tokens=64)
        if guessing == "either":
            drafter = EitherDrafter(NgramDrafter(), own)
    core = make_core(case.model, streams=5, step_tokens=40, drafter=drafter, always_draft=True)
    assert run(core, case.prompts, **params) == expected
    stats = core.stats()
    if guessing == "itself":
        assert stats.accepted_tokens > 0.95 * stats.draft_tokens > 100
    elif guessing == "draft model":
        assert stats.draft_tokens > stats.accepted_tokens > 0.2 * stats.draft_tokens
    if guessing != "ngram":
        assert own._pool.used == 0


def test_alone_and_again_from_the_cache(case: Case, make_core: Callable[..., Core]) -> None:
    core = make_core(case.model)
    assert run(core, case.prompts, together=False) == case.expected
    before = core.stats()
    assert run(core, case.prompts, together=False) == case.expected
    hits = core.stats().prefix_hit_tokens - before.prefix_hit_tokens
    assert hits == sum(len(prompt) - 1 for prompt in case.prompts), "all but the last token"
