"""Models with adapters that PEFT has made, and what PEFT and transformers make of them."""

from __future__ import annotations

import os
import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import transformers

from muster.model.spec import TransformerSpec
from muster.serve.adapters import Adapter, read_adapters
from muster.serve.engine.core import Core
from muster.serve.protocol import Request, SamplingParams
from tests.serve.engine.test_parity import FAMILIES, NEW, generated

ROTARY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "all": {"target_modules": ROTARY, "r": 4, "lora_alpha": 8},
        "some": {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 5, "lora_alpha": 3, "use_rslora": True},
        "last": {"target_modules": ["k_proj", "up_proj"], "r": 3, "layers_to_transform": [1]},
    },
    "mistral-window": {"all": {"target_modules": ROTARY, "r": 2}},
    "qwen2": {"all": {"target_modules": ROTARY, "r": 1, "lora_alpha": 4}},
    "mixtral": {"attention": {"target_modules": ["q_proj", "v_proj", "o_proj"], "r": 6}},
    "gpt2": {"all": {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 3, "fan_in_fan_out": True}},
}  # fmt: skip


@dataclass(frozen=True)
class Adapted:
    folder: Path
    adapters: dict[str, str]
    prompts: list[list[int]]
    expected: dict[str, list[list[int]]]
    """Greedy tokens of each prompt, by adapter; those of the model alone under no name."""

    def read(self, spec: TransformerSpec) -> list[Adapter]:
        return read_adapters(self.adapters, spec)


def adapted(family: str, folder: Path) -> Adapted:
    """A family's tiny model and its adapters, whose Bs are not 0."""
    kind, options = FAMILIES[family]
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(kind(**options)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(6)
    theirs.save_pretrained(folder / "model")
    rng = random.Random(1)
    common = [rng.randrange(131) for _ in range(24)]
    prompts = [common[: rng.randint(1, 24)] + [rng.randrange(131) for _ in range(n)] for n in (1, 9, 30)]
    prompts += [common, [5]]
    expected = {"": [continued(theirs, prompt) for prompt in prompts]}
    adapters = {}
    for name, settings in ADAPTERS[family].items():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        with warnings.catch_warnings():  # PEFT asks transformers for what is called otherwise by now
            warnings.simplefilter("ignore", FutureWarning)
            changed = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        with torch.no_grad():
            for parameter_name, parameter in changed.named_parameters():
                if "lora_" in parameter_name:
                    parameter.copy_(
                        torch.randn_like(parameter) * (0.4 if "lora_B" in parameter_name else 0.3)
                    )
        changed.save_pretrained(folder / name)
        adapters[name] = str(folder / name)
        expected[name] = [continued(changed, prompt) for prompt in prompts]
        assert expected[name] == [continued(changed.merge_and_unload(), prompt) for prompt in prompts]
    return Adapted(folder / "model", adapters, prompts, expected)


def continued(model: Any, prompt: list[int]) -> list[int]:
    with torch.inference_mode():
        found = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    tokens: list[int] = found[0, len(prompt) :].tolist()
    return tokens


def answers(core: Core, case: Adapted, *, together: bool = True, **params: Any) -> dict[str, list[list[int]]]:
    """Tokens of each prompt with each adapter and with none, in turns: all at once, or one after the other."""
    settings: dict[str, Any] = {"max_tokens": NEW, "temperature": 0.0} | params
    requests = [
        Request(id=f"{name} {index}", prompt=tuple(prompt), params=SamplingParams(**settings), adapter=name)
        for index, prompt in enumerate(case.prompts)
        for name in case.expected
    ]
    found = generated(core, requests, together=together)
    return {name: [found[f"{name} {i}"] for i in range(len(case.prompts))] for name in case.expected}
