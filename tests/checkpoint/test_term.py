"""Ranks that were cut off and come back commit nothing, whenever they come back, and harm nothing that others write."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import faults_checkpoint as faults
from muster.checkpoint import shelf
from muster.errors import CheckpointError
from muster.observe import term


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str, str]:
    """A run's shelf with a checkpoint that the first term has committed; the terms, of which the second holds now."""
    first, second = term.new(), term.new()
    term.grant(tmp_path, first)
    monkeypatch.setenv(term.TERM, first)
    faults.save_one(tmp_path / "checkpoints", 1)
    term.grant(tmp_path, second)
    return tmp_path / "checkpoints", first, second


def test_a_term_that_is_over_commits_nothing(
    two: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, first, second = two
    with pytest.raises(CheckpointError, match="were cut off, and others have been started"):
        faults.save_one(kept, 2)
    assert shelf.steps(kept) == [1], "neither committed nor any other deleted"
    monkeypatch.setenv(term.TERM, second)
    faults.save_one(kept, 2)
    assert shelf.steps(kept) == [1, 2]
    monkeypatch.setenv(term.TERM, first)
    with pytest.raises(CheckpointError):
        faults.save_one(kept, 2)
    assert faults.what_loads(kept) == 2


def test_two_terms_that_write_the_same_step_do_not_mix(
    two: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, first, second = two
    zombie = shelf.begin(kept, 2)
    (zombie / "rank-00000.safetensors").write_bytes(b"of the first term")
    monkeypatch.setenv(term.TERM, second)
    faults.save_one(kept, 2)
    monkeypatch.setenv(term.TERM, first)
    shelf.abandon(kept, 2)  # as it does when it is refused
    assert shelf.steps(kept) == [1, 2]
    assert faults.what_loads(kept) == 2


def test_ranks_without_a_term_commit_as_ever(tmp_path: Path) -> None:
    faults.save_one(tmp_path / "checkpoints", 1)
    assert shelf.steps(tmp_path / "checkpoints") == [1]
