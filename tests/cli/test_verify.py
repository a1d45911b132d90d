"""`muster verify`: the table, the exit code, and the axis at fault."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from muster.cli import main
from muster.train import verifier
from muster.train.verify import Case, train_case

RUN_FILE = """
name: run
model: {family: llama, layers: 2, width: 32, heads: 4, kv_heads: 2, context: 32}
data: {train: [{files: "*.py"}]}
train: {tokens: 2Ki, batch_tokens: 256}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(RUN_FILE)
    return str(path)


def muster(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["verify", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_layout_that_agrees(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert muster(run_file, "layout={tensor: 2, pipeline: 2, split: [1, 1]}", "--steps", "2") == 0
    said = capsys.readouterr().out
    assert "tensor 2, pipeline 2, split [1, 1]" in said
    assert "all 1 layouts agree with one process over 2 steps" in said


def plant(case: Case, folder: Path) -> None:
    """Sequence-parallel regions forget to sum what the other ranks computed."""
    from muster.parallel.exchange import Exchange

    Exchange.leave = lambda self, x: self.own_tokens(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[method-assign]
    train_case(case, folder)


def test_a_layout_that_differs_is_named_with_its_axis(
    run_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifier, "Verifier", functools.partial(verifier.Verifier, work=plant))
    layout = "layout={tensor: 2, shard: 2}"
    assert muster(run_file, layout, "--steps", "2", "--json") == 4
    said = capsys.readouterr()
    (row,) = json.loads(said.out)
    assert not row["ok"]
    assert row["degrees"] == {"shard": 2, "tensor": 2}
    assert "axis tensor" in row["why"]
    assert "1 of 1 layouts do not train like one process" in said.err


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("{pipeline: 4}", "4 pipeline stages need at least 4 layers, but the model has 2"),
        ("{tensor: 3}", "3 does not divide"),
        ("{shard: 2, expert: 2}", "no experts to divide"),
        ("{pipeline: 2, zero: 3}", "use zero: 1"),
    ],
)
def test_what_cannot_be_is_refused(
    run_file: str, layout: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert muster(run_file, f"layout={layout}") == 2
    assert message in capsys.readouterr().err
