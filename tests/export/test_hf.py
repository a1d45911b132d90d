"""Exports are complete, checked and atomic: what fails parity never takes the place of what did not."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from muster.config.schema import Parity
from muster.data.tokenizer import Tokenizer
from muster.errors import MissingExtra, ParityError, UsageError
from muster.export import hf
from muster.export.hf import export_hf
from muster.export.parity import ParityReport, check_folder, check_logits, logits_of
from muster.model.folder import load_folder
from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer

TOKENIZER = Tokenizer.byte()
SPEC = TransformerSpec(
    family="llama",
    layers=2,
    width=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn=48,
    vocab=TOKENIZER.vocab,
    context=64,
    tied=True,
)
PROBE = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))


def weights(spec: TransformerSpec = SPEC, seed: int = 0) -> dict[str, Tensor]:
    model = Transformer(spec)
    model.init_weights(seed)
    return {name: parameter.detach() * 5 for name, parameter in model.named_parameters()}


def export(folder: Path, state: dict[str, Tensor] | None = None, **options: Any) -> ParityReport:
    given = {
        "dtype": torch.float32,
        "limits": Parity(),
        "probe_tokens": PROBE,
        "provenance": {"run": "tiny", "step": 7},
    }
    return export_hf(state or weights(), SPEC, TOKENIZER, folder, **(given | options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_is_a_complete_folder(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tmp_path / "run" / "hf"
    report = export(folder, dtype=dtype)
    assert report.max_logit_diff <= 1e-4
    assert report.top1 == 1.0
    assert report.positions == PROBE.numel()
    record = json.loads((folder / "muster.json").read_text())
    assert record["provenance"] == {"run": "tiny", "step": 7}
    assert record["parity"]["max_logit_diff"] == report.max_logit_diff
    names = {path.name for path in folder.iterdir()} - {"muster.json"}
    assert names == record["sha256"].keys()
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    for name, digest in record["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]


def test_transformers_reads_the_whole_folder(tmp_path: Path) -> None:
    export(tmp_path / "hf", dtype=torch.bfloat16)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.bos_token_id, config.eos_token_id) == (TOKENIZER.bos_id, TOKENIZER.eos_id)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == TOKENIZER.eos_id
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("def f():", add_special_tokens=False)["input_ids"] == TOKENIZER.encode("def f():")


def test_parity_is_with_the_state_and_not_with_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that swaps two tensors yields a folder on which both implementations agree."""
    honest = hf.write_files

    def swapping(state: dict[str, Tensor], *args: Any, **options: Any) -> None:
        k, v = "layers.0.attention.k.weight", "layers.0.attention.v.weight"
        honest(state | {k: state[v], v: state[k]}, *args, **options)

    monkeypatch.setattr(hf, "write_files", swapping)
    with pytest.raises(ParityError, match="transformers computes other numbers"):
        export(tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_older_one(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    export(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    nan = weights() | {"norm.weight": torch.full((32,), torch.nan)}
    with pytest.raises(ParityError, match="nan"):
        export(folder, nan)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    export(folder, weights(seed=1))
    assert (folder / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_files_of_others_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"no muster.json"):
        export(tmp_path / "mine")
    export(tmp_path / "hf")
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"also holds 'notes.txt'"):
        export(tmp_path / "hf")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "hf" / "notes.txt").read_text() == "mine"


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    export(tmp_path / "hf")
    assert (tmp_path / "hf" / "muster.json").is_file()


def test_check_folder_compares_both_implementations(tmp_path: Path) -> None:
    export(tmp_path / "hf")
    report = check_folder(tmp_path / "hf", PROBE, Parity())
    assert "top-1 agreement 100.00% over 60 positions" in report.line()


def test_both_limits_are_kept(tmp_path: Path) -> None:
    export(tmp_path / "hf")
    expected = logits_of(load_folder(tmp_path / "hf"), PROBE)
    other = expected.clone()
    other[0, 0, int(other[0, 0].argmin())] += float(other[0, 0].max() - other[0, 0].min()) + 1
    with pytest.raises(ParityError, match=r"98.33%"):
        check_logits(other, tmp_path / "hf", PROBE, Parity(max_logit_diff=100.0, top1=0.99))
    check_logits(other, tmp_path / "hf", PROBE, Parity(max_logit_diff=100.0, top1=0.98))
    with pytest.raises(ParityError, match="shape"):
        check_logits(other[:, :5], tmp_path / "hf", PROBE, Parity())


def test_without_transformers_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'musterllm\[hf\]'"):
        export(tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_an_option_that_the_family_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="window"):
        export_hf(
            weights(),
            replace(SPEC, window=4),
            TOKENIZER,
            tmp_path / "hf",
            dtype=torch.float32,
            limits=Parity(),
            probe_tokens=PROBE,
            provenance={},
        )
    assert not list(tmp_path.iterdir())
