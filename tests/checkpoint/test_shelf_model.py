"""The shelf against a model of it: any sequence of saves, kills, damage, retention and resumption."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from muster.checkpoint import manifest, shelf
from muster.checkpoint.manifest import Manifest, write_summed
from muster.errors import CheckpointError


class ShelfMachine(RuleBasedStateMachine):
    @initialize(keep=st.integers(1, 3), every=st.none() | st.integers(3, 7), keep_best=st.booleans())
    def start(self, keep: int, every: int | None, keep_best: bool) -> None:
        self.shelf = Path(tempfile.mkdtemp()) / "checkpoints"
        self.keep, self.every, self.keep_best = keep, every, keep_best
        self.step = 0
        self.sound: dict[int, float | None] = {}
        """Steps of sound checkpoints, and their held-out loss."""
        self.damaged: set[int] = set()

    def teardown(self) -> None:
        if hasattr(self, "shelf"):
            shutil.rmtree(self.shelf.parent)

    @rule(steps=st.integers(1, 4), loss=st.none() | st.integers(1, 9))
    def save(self, steps: int, loss: int | None) -> None:
        self.step += steps
        self._write(self.step, None if loss is None else float(loss))
        self.sound[self.step] = None if loss is None else float(loss)
        self.damaged.discard(self.step)
        self._retain()
        found = shelf.newest_sound(self.shelf, self._refuse)
        assert found is not None
        assert found[1].step == self.step

    @rule(steps=st.integers(1, 4), written=st.integers(0, 3))
    def be_killed_while_saving(self, steps: int, written: int) -> None:
        partial = shelf.begin(self.shelf, self.step + steps)
        for number in range(written):
            (partial / f"rank-{number:05d}.safetensors").write_bytes(b"half of i")

    @rule()
    def be_killed_while_making_way(self) -> None:
        """Of a checkpoint that is written again, between its two renames."""
        if self.sound:
            newest = max(self.sound)
            folder = shelf.folder_of(self.shelf, newest)
            folder.rename(folder.with_name(folder.name + ".former"))
            self.resume()

    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        there = sorted(set(self.sound))
        if not there:
            return
        step = data.draw(st.sampled_from(there))
        victim = data.draw(st.sampled_from(sorted(shelf.folder_of(self.shelf, step).iterdir())))
        content = bytearray(victim.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        victim.write_bytes(content)
        del self.sound[step]
        self.damaged.add(step)

    @rule()
    def resume(self) -> None:
        """As a restart does: clear up, take the newest that is sound."""
        shelf.sweep(self.shelf)
        said: list[str] = []
        newer = [step for step in self.damaged if step > max(self.sound, default=-1)]
        if not self.sound and not self.damaged:
            assert shelf.newest_sound(self.shelf, said.append) is None
            self.step = 0
            return
        if not self.sound:
            with pytest.raises(CheckpointError, match=f"none of the {len(self.damaged)} checkpoints"):
                shelf.newest_sound(self.shelf, said.append)
        else:
            found = shelf.newest_sound(self.shelf, said.append)
            assert found is not None
            assert found[1].step == max(self.sound)
            self.step = found[1].step
        assert len(said) == len(newer)
        assert not [path for path in self._entries() if path.suffix]

    @invariant()
    def everything_that_should_be_there_is(self) -> None:
        if hasattr(self, "shelf"):
            assert set(shelf.steps(self.shelf)) == set(self.sound) | self.damaged

    def _refuse(self, what: str) -> None:
        raise AssertionError(what)

    def _entries(self) -> list[Path]:
        return list(self.shelf.iterdir()) if self.shelf.is_dir() else []

    def _write(self, step: int, loss: float | None) -> None:
        partial = shelf.begin(self.shelf, step)
        names = [f"rank-{rank:05d}.safetensors" for rank in range(2)]
        files = {name: write_summed(partial / name, [f"{name} of {step}".encode()]) for name in names}
        content = Manifest(
            format=manifest.FORMAT, step=step, tokens=0, seed=0, digest="", identity={}, layout={}, model={},
            versions={}, files=files, held_out_loss=loss,
        )  # fmt: skip
        shelf.commit(self.shelf, step, content)

    def _retain(self) -> None:
        """The rule in other words: what may go is old, no first of its stretch, and not the best."""
        # Training has gone back from all that is after what it has just saved.
        self.damaged = {step for step in self.damaged if step < self.step}
        self.sound = {step: loss for step, loss in self.sound.items() if step <= self.step}
        shelved = sorted(set(self.sound) | self.damaged)
        readable = {step: loss for step, loss in self._losses().items() if loss is not None}
        best = min(readable, key=lambda step: (readable[step], step)) if readable and self.keep_best else None
        shelf.retain(self.shelf, self.keep, saved=self.step, every=self.every, keep_best=self.keep_best)
        for position, step in enumerate(shelved):
            is_new = position >= len(shelved) - self.keep
            is_first = (
                self.every is not None
                and step >= self.every
                and not any(other // self.every == step // self.every for other in shelved[:position])
            )
            if not is_new and not is_first and step != best:
                self.sound.pop(step, None)
                self.damaged.discard(step)

    def _losses(self) -> dict[int, float | None]:
        """Of a damaged checkpoint too, where its manifest is whole."""
        found: dict[int, float | None] = {}
        for step in set(self.sound) | self.damaged:
            try:
                found[step] = manifest.read(shelf.folder_of(self.shelf, step)).held_out_loss
            except CheckpointError:
                found[step] = None
        return found


class TestShelf(ShelfMachine.TestCase):
    settings = settings(
        max_examples=15, stateful_step_count=15, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(900)
class TestShelfAtLength(ShelfMachine.TestCase):
    settings = settings(TestShelf.settings, max_examples=500, stateful_step_count=30)
