"""What a run tells: one calm line a log step for people, records for machines, both from the same figures.

Only the first rank's report speaks; on the others every call returns at once.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from types import TracebackType
from typing import Any

import psutil
import torch

from muster.comm.traffic import Traffic
from muster.errors import Preempted
from muster.observe.format import size
from muster.observe.progress import RunProgress
from muster.observe.records import RunLog
from muster.observe.trackers import Tracker, open_trackers
from muster.parallel.world import World
from muster.resilience.sniff import outliers, sniff
from muster.train import savings
from muster.train.evaluate import Evaluation
from muster.train.plan import Plan
from muster.train.trainee import COMPUTE_DTYPE, Update


class Report:
    """Use as a context manager: an error that passes through is recorded in the run's events."""

    def __init__(self, plan: Plan, world: World, *, speaks: bool = True) -> None:
        self._plan, self._is_first, self._active = plan, world.is_first, False
        self._copies = 1
        # All ranks measure at once, so that the peak is the machine's as this run shares it.
        self._ranks = sniff(COMPUTE_DTYPE[plan.run.train.precision], world)
        self._peak_flops = sum(speeds.gemm_flops for speeds in self._ranks)
        self._flops_per_token = plan.spec.flops_per_token(plan.sequence)
        self._device = world.device
        self._window, self._in_spike = _Window(), False
        self.speak(world.is_first and speaks)

    def speak(self, speaks: bool, copies: int = 1) -> None:
        """Of `copies` replica groups that train, one speaks; which one and how many can change."""
        self._copies = copies
        if speaks == self._active or not self._is_first:
            return
        self._active, self._window = speaks, _Window()
        if not speaks:
            self._close()
            return
        plan = self._plan
        self._log = RunLog(plan.folder)
        self._progress = RunProgress(plan.steps)
        self._trackers: list[Tracker] = open_trackers(
            plan.run.track, plan.folder, plan.run.name, plan.run.to_dict()
        )

    def begin(self, step: int) -> None:
        plan = self._plan
        choices = {
            "layout": str(plan.layout),
            "layout_reason": plan.layout.reason,
            "attention": plan.attention,
        }
        if plan.run.train.sync is not None:
            choices["sync"] = savings.sentence(plan)
        self.event("started", step=step, steps=plan.steps, **choices)
        self.event("speeds", ranks=[asdict(speeds) for speeds in self._ranks])
        for said in outliers(self._ranks):
            self.note("slow-rank", said)
        self._window = _Window()

    def step(self, step: int, update: Update) -> None:
        """Count a finished step; every `log_every` steps, say it."""
        self._window.steps += 1
        self._window.tokens += update.tokens
        if update.spike is not None and not self._in_spike:
            self.note("spike", f"step {step}: {update.spike}", step=step)
        self._in_spike = update.spike is not None
        if not self._active or (step % self._plan.run.train.log_every and step != self._plan.steps):
            return
        rate = self._window.tokens / self._window.seconds
        record = {
            "loss": update.loss,
            "gradient_norm": update.gradient_norm,
            "learning_rate": update.learning_rate,
            "tokens": step * self._plan.run.train.batch_tokens,
            "tokens_per_s": rate,
            "mfu": rate * self._flops_per_token / (self._peak_flops * self._copies),
            "memory_bytes": self._memory_bytes(),
            **({} if update.imbalance is None else {"expert_imbalance": update.imbalance}),
            "eta_s": (self._plan.steps - step) * self._window.seconds / self._window.steps,
        }
        self._record(step, record)
        self._window = _Window()

    def traffic(self, traffic: Traffic) -> None:
        """What the first rank sends in the passes of one step."""
        by_axis = traffic.sent_bytes_by_axis()
        said = ", ".join(f"{axis} {size(sent)}" for axis, sent in by_axis.items())
        self.note("traffic", f"a step sends {said or 'nothing'} from the first rank", sent_bytes=by_axis)
        self._window = _Window()

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        if not self._active:
            return
        record = {
            "held_out_loss": evaluation.loss,
            "held_out_bits_per_byte": evaluation.bits_per_byte,
            "held_out_tokens": evaluation.tokens,
        }
        self._record(step, record)
        self._window = _Window()

    def note(self, kind: str, sentence: str, **fields: Any) -> None:
        """An event that a person should read."""
        if self._active:
            self._progress.note(sentence)
            self._log.event(kind, message=sentence, **fields)

    def event(self, kind: str, **fields: Any) -> None:
        if self._active:
            self._log.event(kind, **fields)

    def end(self, step: int) -> None:
        self.event("finished", step=step)

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._active:
            return
        if error is not None:
            self._log.event("preempted" if isinstance(error, Preempted) else "failed", error=str(error))
        self._close()

    def _close(self) -> None:
        self._progress.close()
        for tracker in self._trackers:
            tracker.close()
        self._log.close()

    def _record(self, step: int, record: dict[str, float]) -> None:
        self._log.metrics(step, **record)
        self._progress.log(step, record)
        for tracker in self._trackers:
            tracker.log(step, record)

    def _memory_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return int(psutil.Process().memory_info().rss)


class _Window:
    """What happened since the last line."""

    def __init__(self) -> None:
        self.steps, self.tokens, self._since = 0, 0, time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._since
