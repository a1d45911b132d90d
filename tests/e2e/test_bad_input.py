"""Bad input to `muster train`: one sentence with the figure and the next step, exit 2, and no run folder made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from muster.cli import main
from tests.toy import write_corpus

GOOD = """
name: run
model: {family: llama, layers: 1, width: 16, heads: 2, context: 16}
data: {train: [{files: "*.py"}]}
train: {tokens: 4k, batch_tokens: 64}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_corpus(tmp_path)
    (tmp_path / "run.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "run.yaml", *overrides])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert all(line.startswith("muster: ") for line in said.splitlines())
    return said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "train.batch_tokens=65",
            "65 is not a multiple of the sequence length 16: nearest legal values are 64 and 80",
        ),
        ("layout.replicate=3", "3 ranks do not divide the batch of 4 sequences"),
        ("train.sequence=32", "32 tokens exceed the model's context of 16"),
        ("model.heads=3", "heads (3) must divide width (16)"),
        ("model.window=8", "llama has no sliding window"),
        ('data.train.0.files="*.md"', "*.md"),
        ("data.tokenizer=nowhere/tokenizer.json", "nowhere"),
        ("train.tokens=12", "tokens (12) must be at least batch_tokens (64)"),
        ("model={preset: llama-3-9b}", "did you mean 'llama-3-8b'?"),
        ("model={from: nowhere}", "nowhere"),
        ("model.wdith=3", "did you mean 'width'?"),
    ],
)
def test_refused_in_a_sentence(
    override: str, said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, override)
    assert not (here / "runs" / "run").exists()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (["--nodes", "2"], "--nodes 2 needs --rendezvous HOST:PORT"),
        (["--nodes", "3:2"], "--nodes should be N or LEAST:MOST"),
        (["--nodes", "2", "--rendezvous", "node0"], "--rendezvous should be HOST:PORT"),
        (["--nodes", "2", "--rendezvous", "node0:99999"], "(got 'node0:99999')"),
    ],
    ids=str,
)
def test_nodes(said: list[str], words: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(capsys, *said)
    assert not (here / "runs" / "run").exists()


def test_text_that_is_none(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "binary.py").write_bytes(b"\x00\x01\x02")
    assert "binary.py" in refused(capsys)
    (here / "binary.py").write_bytes(b"caf\xe9")
    assert "binary.py" in refused(capsys)


def test_a_corpus_too_small_for_one_sample(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, path in enumerate(here.glob("*.py")):
        path.write_text("x") if number < 3 else path.unlink()
    assert "one sample needs 17" in refused(capsys)


def test_a_folder_of_another_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "runs" / "run").mkdir(parents=True)
    identity = {"model": {}, "data": {}, "train": {}}
    (here / "runs" / "run" / "run.json").write_text(json.dumps({"identity": identity}))
    assert "belongs to a run with another configuration" in refused(capsys)
