from __future__ import annotations

import math

import pytest

from muster.observe.progress import ByteProgress, RunProgress, step_line

RECORD = {
    "loss": 2.3142,
    "gradient_norm": 0.412,
    "learning_rate": 2.9e-3,
    "tokens": 491_520,
    "tokens_per_s": 18_300.0,
    "mfu": 0.42,
    "memory_bytes": 1.2e9,
    "eta_s": 840.0,
}


def test_the_line_of_a_step() -> None:
    line = "step  120/2000  loss 2.3142  grad 0.41  lr 2.9e-03  18.3k tok/s  MFU 42%  1.2 GB  eta 14m00s"
    assert step_line(120, 2000, RECORD) == line


def test_the_line_of_an_evaluation() -> None:
    record = {"held_out_loss": 2.5, "held_out_bits_per_byte": 1.39, "held_out_tokens": 59_550}
    assert step_line(768, 768, record) == "step 768/768  held-out loss 2.5000  1.3900 bits per byte"


def test_figures_that_went_wrong_are_still_a_line() -> None:
    line = step_line(1, 2, {"loss": math.nan, "tokens_per_s": math.inf, "eta_s": math.inf})
    assert line == "step 1/2  loss nan  ? tok/s  eta ?"


def test_without_a_terminal_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    progress = RunProgress(2000)
    progress.note("resumed [from] step 100")
    progress.log(120, RECORD)
    progress.close()
    progress.close()
    out = capsys.readouterr().out.splitlines()
    assert out == ["resumed [from] step 100", step_line(120, 2000, RECORD)]


def test_on_a_terminal_the_lines_stand_above_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the capture for a terminal
    progress = RunProgress(2000)
    progress.log(120, RECORD)
    progress.close()
    out = capsys.readouterr().out
    assert step_line(120, 2000, RECORD) in out
    assert "training" in out


def test_bytes_without_a_terminal_are_one_line_a_piece_of_work(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ByteProgress()
    for what in ("tokenising", "counting"):
        progress.start(1_500_000, what)
        progress.advance(700_000)
        progress.advance(800_000)
        progress.done()
    assert capsys.readouterr().out.splitlines() == ["tokenising: 1.5 MB", "counting: 1.5 MB"]


def test_bytes_on_a_terminal_are_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    progress = ByteProgress()
    progress.start(1000, "tokenising")
    progress.advance(1000)
    progress.start(1000, "counting")  # even if nobody said done
    progress.done()
    out = capsys.readouterr().out
    assert "tokenising" in out
    assert "counting" in out
