"""Adapters by name over HTTP, in a process of its own; and folders that are none, each told all that is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from muster.cli.serve import serve
from muster.errors import ConfigError, UsageError
from muster.model.config_json import read_spec
from muster.model.folder import load_folder
from muster.model.transformer import Transformer
from muster.serve.adapters import read_adapters
from muster.serve.codec import TextCodec
from tests.serve.processes import Start, client, start

__all__ = ["start"]

MODULES = {"q_proj": (32, 32), "v_proj": (16, 32)}
"""(outputs, inputs) in the tiny model."""


def write(folder: Path, *, rank: int = 2, seed: int = 0, **changes: Any) -> dict[str, torch.Tensor]:
    """An adapter of q and v of both layers; `changes` to its config."""
    torch.manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for module, (features, inputs) in MODULES.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs)
            tensors[f"{name}.lora_B.weight"] = torch.randn(features, rank)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": [*MODULES], "bias": "none"}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    save_file(tensors, folder / "adapter_model.safetensors")
    return tensors


def merged(folder: Path, adapter: Path) -> Transformer:
    model = load_folder(folder)
    (read,) = read_adapters({"a": str(adapter)}, model.spec)
    with torch.no_grad():
        for name, (a, b) in read.pairs.items():
            model.get_parameter(name).add_(b @ a)
    return model


def test_a_request_names_the_adapter_that_answers_it(
    folder: Path, tmp_path: Path, start: Start, reference: Callable[..., list[int]]
) -> None:
    for seed, name in enumerate("ab"):
        write(tmp_path / name, seed=seed)
    models = {"small-run": load_folder(folder / "hf")} | {
        name: merged(folder / "hf", tmp_path / name) for name in "ab"
    }
    prompts = [[1, 2, 3], list(range(60)), [9] * 20]
    codec = TextCodec.from_folder(folder / "hf")
    expected = {
        name: [codec.decode(reference(model, prompt, 12)) for prompt in prompts]
        for name, model in models.items()
    }
    assert len({str(one) for one in expected.values()}) == 3
    given = [text for name in "ab" for text in ("--adapter", f"{name}={tmp_path / name}")]
    with start(folder, "--dtype", "fp32", *given) as running, client(running) as api:
        assert "adapter a: rank 2, 448 parameters\n" in running.said
        cards = {card.id: card for card in api.models.list().data}
        assert list(cards) == ["small-run", "a", "b"]
        assert [getattr(card, "parent", None) for card in cards.values()] == [None, "small-run", "small-run"]
        assert api.models.retrieve("b").id == "b"

        def ask(name: str, prompt: list[int]) -> str:
            answer = api.completions.create(
                model=name, prompt=prompt, max_tokens=12, temperature=0,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            assert answer.model == name
            return answer.choices[0].text

        with ThreadPoolExecutor(9) as threads:
            asked = {name: [threads.submit(ask, name, one) for one in prompts] for name in models}
        assert {name: [one.result() for one in of] for name, of in asked.items()} == expected

        with pytest.raises(openai.NotFoundError) as refused:
            api.completions.create(model="c", prompt="x")
        assert refused.value.code == "model_not_found"
        assert "use 'small-run' or one of its 2 adapters" in refused.value.message
        vectors = [
            api.embeddings.create(model=name, input="hello", encoding_format="float").data[0].embedding
            for name in models
        ]
        assert vectors[0] != vectors[1] != vectors[2]


def edited(folder: Path, **changes: Any) -> None:
    """Tensors by the end of their name: replaced, or taken out where None."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for ending, value in changes.items():
        for name in [name for name in tensors if name.endswith(ending.replace("__", "."))]:
            del tensors[name]
            if value is not None:
                tensors[name] = value
    save_file(tensors, path)


def renamed(folder: Path, old: str, new: str) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): tensor for name, tensor in load_file(path).items()}, path)


LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "rank 0": ({"r": 0}, ["r: should be a whole number from 1 to 32768 (got 0)"]),
    "rank true": ({"r": True}, ["(got true)"]),
    "another rank": ({"r": 3}, [f"'{LAYER}A.weight' has the shape (2, 32), but r and this model ask for (3, 32)"]),
    "a huge rank": ({"r": 10**400}, ["r: should be"]),
    "alpha": ({"lora_alpha": "big"}, ['lora_alpha: should be a number above 0, up to 32768 (got "big")']),
    "a huge alpha": ({"lora_alpha": 10**400}, ["lora_alpha: should be"]),
    "nan": ({"lora_alpha": float("nan")}, ["lora_alpha: should be a number above 0, up to 32768 (got NaN)"]),
    "DoRA": ({"use_dora": True}, ["use_dora: true is not served: DoRA scales the merged weights"]),
    "saved": ({"modules_to_save": ["lm_head"]}, ['modules_to_save: ["lm_head"] is not served: whole layers']),
    "bias": ({"bias": "all"}, ['bias: "all" is not served: biases are those of the base model']),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, ["that changes the base weights: convert it"]),
    "an integer": ({"init_lora_weights": 1}, ["init_lora_weights: 1 is not served"]),
    "a later key": ({"use_tomorrow": 1}, ["use_tomorrow: 1 is not served: what it does is not known here"]),
    "another kind": ({"peft_type": "IA3"}, ['peft_type: only LORA is served (got "IA3")']),
    "targets": ({"target_modules": ["q_proj", "lm_head"]}, ["target_modules: 'lm_head' is nothing that can be"]),
    "more targets": (
        {"target_modules": ["q_proj", "v_proj", "o_proj"]},
        ["lacks 'base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight', ", " and 1 more: copy it again"],
    ),
    "all at once": (
        {"r": -1, "lora_alpha": 0, "use_dora": True, "bias": "lora_only"}, ["r: ", "lora_alpha: ", "use_dora", "bias"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_means_something_else_is_refused(folder: Path, tmp_path: Path, case: str) -> None:
    changes, said = CONFIGS[case]
    write(tmp_path / "a", **changes)
    with pytest.raises(ConfigError) as refused:
        read_adapters({"a": str(tmp_path / "a")}, read_spec(folder / "hf"))
    for sentence in said:
        assert sentence in str(refused.value)
    if case == "all at once":
        assert len(refused.value.problems) == 4


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda a: (a / "adapter_config.json").unlink(), "has no adapter_config.json: give a folder in PEFT"),
    "no JSON": (lambda a: (a / "adapter_config.json").write_text("{"), "adapter_config.json cannot be read"),
    "a list": (lambda a: (a / "adapter_config.json").write_text("[]"), "should hold a JSON object"),
    "deep": (lambda a: (a / "adapter_config.json").write_text("[" * 10**6), "cannot be read"),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "a pickle": (
        lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"),
        "has only adapter_model.bin, a pickle that could run anything: convert it to safetensors",
    ),
    "garbage": (lambda a: (a / "adapter_model.safetensors").write_bytes(b"\xff" * 99), "cannot be read ("),
    "empty": (lambda a: save_file({}, a / "adapter_model.safetensors"), "has no tensors"),
    "no B": (lambda a: edited(a, **{"0.self_attn.q_proj.lora_B.weight": None}), f"lacks '{LAYER}B.weight': copy it"),
    "nan": (
        lambda a: edited(a, **{"0.self_attn.q_proj.lora_B.weight": torch.full((32, 2), float("nan"))}),
        f"'{LAYER}B.weight' holds nan or inf",
    ),
    "whole numbers": (
        lambda a: edited(a, **{"0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32, dtype=torch.int8)}),
        f"'{LAYER}A.weight' is int8, but should be float32, bfloat16 or float16",
    ),
    "another width": (
        lambda a: edited(a, **{"0.self_attn.q_proj.lora_A.weight": torch.ones(2, 64)}),
        f"'{LAYER}A.weight' has the shape (2, 64), but r and this model ask for (2, 32)",
    ),
    "one dim": (lambda a: edited(a, **{"0.self_attn.q_proj.lora_A.weight": torch.ones(64)}), "has the shape (64,)"),
    "a deeper model": (lambda a: renamed(a, "layers.1", "layers.7"), "feed-forward blocks of this model's 2 layers"),
    "embeddings": (
        lambda a: renamed(a, "layers.0.self_attn.q_proj.lora_A", "embed_tokens.lora_embedding_A"),
        "has 'base_model.model.model.embed_tokens.lora_embedding_A.weight', but adapted are only the linear layers",
    ),
    "DoRA's vectors": (
        lambda a: renamed(a, "0.self_attn.q_proj.lora_A.weight", "0.self_attn.q_proj.lora_magnitude_vector"),
        "q_proj.lora_magnitude_vector', but adapted are only",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_not_as_its_config_says_is_refused(folder: Path, tmp_path: Path, case: str) -> None:
    change, said = FOLDERS[case]
    write(tmp_path / "a")
    change(tmp_path / "a")
    with pytest.raises(ConfigError) as refused:
        read_adapters({"a": str(tmp_path / "a")}, read_spec(folder / "hf"))
    assert said in str(refused.value)
    assert all(problem.startswith("adapter a: ") for problem in refused.value.problems)


def test_all_adapters_are_told_what_is_wrong_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "a", use_dora=True)
    write(tmp_path / "b", r=0)
    write(tmp_path / "c")
    run = shutil.copytree(folder, tmp_path / "small-run")
    plain = json.loads((run / "run.json").read_text())
    plain["run"]["serve"] = {"port": 0, "adapters": {"a": str(tmp_path / "a"), "c": str(tmp_path / "c")}}
    (run / "run.json").write_text(json.dumps(plain))
    with pytest.raises(ConfigError) as refused:
        serve(run, adapter=[f"b={tmp_path / 'b'}"])
    assert [problem[:20] for problem in refused.value.problems] == [
        "adapter a: use_dora:",
        "adapter b: r: should",
    ]
    with pytest.raises(ConfigError, match="adapter small-run: that is the model's own name"):
        serve(run, adapter=[f"small-run={tmp_path / 'c'}"])
    for given, said in ((["c"], "NAME=FOLDER"), (["=c"], "NAME=FOLDER"), (["c=x", "c=y"], "is given twice")):
        with pytest.raises(UsageError, match=said):
            serve(run, adapter=given)
