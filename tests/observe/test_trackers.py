from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from muster.errors import MissingExtra
from muster.observe.trackers import open_trackers


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own imports
def test_tensorboard_holds_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = open_trackers(["tensorboard"], tmp_path, "mine", {})
    tracker.log(10, {"loss": 2.5})
    tracker.log(20, {"loss": 1.5})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(scalar.step, scalar.value) for scalar in events.Scalars("loss")] == [(10, 2.5), (20, 1.5)]


def test_wandb_gets_the_run_under_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class FakeRun:
        def log(self, record: dict[str, float], step: int) -> None:
            calls.append((step, record))

        def finish(self) -> None:
            calls.append("finished")

    fake: Any = ModuleType("wandb")
    fake.init = lambda **options: calls.append(options) or FakeRun()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tracker,) = open_trackers(["wandb"], tmp_path, "mine", {"name": "mine"})
    tracker.log(10, {"loss": 2.5})
    tracker.close()
    options, logged, finished = calls
    assert (options["id"], options["resume"], options["config"]) == ("mine", "allow", {"name": "mine"})
    assert "mode" not in options  # WANDB_MODE decides
    assert (logged, finished) == ((10, {"loss": 2.5}), "finished")


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_extra_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delattr("torch.utils.tensorboard", raising=False)
    with pytest.raises(MissingExtra, match=r"pip install 'musterllm\[track\]'"):
        open_trackers([name], tmp_path, "mine", {})
