"""The agent's watchdog: sees that ranks make no progress or end, takes down what each knows, and says who did it.

It reads heartbeats ten times a second, which costs the ranks nothing; only when something is wrong does it ask them.
What it finds is a verdict, a `hang-0001.md` where they hung, and ranks that are ended, so that the agent can start new
ones, with a new watchdog.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from muster.errors import DoesNotFit
from muster.resilience import hang_report
from muster.resilience.beats import Board, Phase, Pulse
from muster.resilience.evidence import Collective, Failure, Witness, parse_messages, parse_recorder
from muster.resilience.oom import oom_kills, resident_bytes
from muster.resilience.slow import SlowRanks
from muster.resilience.verdict import Verdict, judge
from muster.resilience.watched import BEATS, CRASH, FAILURE, FIRST, POST, RECORDER, STACK

_POLL_S = 0.1
_SETTLE_S = 1.0
"""How long the first rank's failure waits for those of others, one of which may be its cause."""
_ANSWER_S = 2.0
_LOOK_S = 0.5
_PATIENCE: Mapping[Phase, float] = {"setup": 10.0, "save": 10.0}
"""Multiples of hang_after for what reads or writes a whole checkpoint without a beat."""
_FIRST_STEP_PATIENCE = 10.0
"""The same for the first step of these ranks, in which much is made."""
_USUAL = 3.0
"""Multiple of the longest time without a beat that has passed well."""


class Watchdog:
    """Watches ranks that find its `environment` in theirs. Use as a context manager: a thread polls within it."""

    def __init__(
        self,
        folder: Path,
        ranks: int,
        *,
        hang_after_s: float,
        first: int = 0,
        name: str = "",
        peers: Sequence[Sequence[int]] = (),
        note: Callable[[str, str], None] | None = None,
        out_of_memory: Callable[[int, int], str] | None = None,
    ) -> None:
        """Of `ranks` local ranks from number `first` on. `folder` is the run's, for reports; `name` says whose these
        ranks are, where a run has several sets of them.

        `peers` are the sets of ranks that have equal work: when one of them becomes slow, `note` is called with an
        event's kind and a sentence. `out_of_memory` explains, by a rank's number and the bytes that it held, why the
        kernel ended it.
        """
        self._folder, self._ranks, self._hang_after_s = folder, ranks, hang_after_s
        self._note, self._out_of_memory = note, out_of_memory
        self._slow = SlowRanks(peers)
        self._oom_kills = oom_kills()
        self._resident: dict[int, int] = {}
        self._looked = 0.0
        self._first, self._name = first, name
        # Of its own, because nodes may share the folder.
        self._post = (folder / "logs" / f"watch-{name.replace(' ', '-') or f'{first:05d}'}").resolve()
        shutil.rmtree(self._post, ignore_errors=True)
        self._post.mkdir(parents=True)
        self._board = Board(ranks)
        self._marks: tuple[tuple[int, ...], ...] = ()
        self._since = time.monotonic()
        self._steady, self._usual_s = False, 0.0
        self._failing_since: float | None = None
        self._end, self._accused = threading.Event(), threading.Event()
        self.verdict: Verdict | None = None
        """None while all is well."""
        self.report: Path | None = None
        """Where the verdict's report is, if it was a hang."""

    @property
    def environment(self) -> dict[str, str]:
        """What the ranks' environment must say. The recorder's size: some steps' collectives, in 10 ms to read."""
        recorder = os.environ.get("TORCH_FR_BUFFER_SIZE", "1024")
        return {
            BEATS: self._board.path,
            FIRST: str(self._first),
            POST: str(self._post),
            "TORCH_FR_BUFFER_SIZE": recorder,
        }

    def start(self) -> None:
        self._thread = threading.Thread(target=self._watch, name="muster-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()
        self._board.close()

    def __enter__(self) -> Watchdog:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def conclude(self, exit_codes: Mapping[int, int]) -> Verdict | None:
        """The verdict on ranks that have all ended, of which some with these exit codes (negative: by a signal)."""
        if self.verdict is None:
            witnesses = [
                replace(w, failure=_ended(w.failure, exit_codes.get(w.rank)), process="")
                for w in self._witnesses(self._board.read(), request=None)
            ]
            if any(w.failure for w in witnesses):
                self.verdict = self._with_memory(judge(witnesses), exit_codes)
        return self.verdict

    def accuse(self) -> None:
        """Others have found that these ranks hang: take down what they do, and end them."""
        self._accused.set()

    def poll(self) -> None:
        """Look once; a verdict is found at most once."""
        pulses = self._board.read()
        if self.verdict is not None or not pulses:
            return
        now = time.monotonic()
        if now - self._looked >= _LOOK_S:
            self._looked = now
            self._look(pulses)
        failing = [p for p in pulses if p.phase == "failed" or self._crashed(p.rank)]
        if failing and any(p.phase != "done" and process_state(p.pid) in ("", "Z") for p in pulses):
            return  # one was killed: the agent, its parent, is told how, and concludes
        if failing:
            self._failing_since = self._failing_since or now
            if len(failing) == len(pulses) or now - self._failing_since >= _SETTLE_S:
                self._find(is_hang=False)
            return
        marks = tuple(pulse.mark for pulse in pulses)
        own = [pulse for pulse in pulses if pulse.phase != "groups"]
        if self._accused.is_set():
            self._find(is_hang=True)
            return
        if not own and not any(process_state(pulse.pid) in ("T", "t") for pulse in pulses):
            self._marks, self._since, self._steady = marks, now, False
            return  # they wait for ranks that others watch
        patience = max((self._patience(pulse) for pulse in own), default=1.0)
        if marks != self._marks:
            if self._steady and patience == 1:
                self._usual_s = max(self._usual_s, now - self._since)
            self._marks, self._since, self._steady = marks, now, patience == 1
        limit_s = max(self._hang_after_s * patience, _USUAL * self._usual_s)
        if len(pulses) == self._ranks and now - self._since >= limit_s:
            self._find(is_hang=True)

    def _patience(self, pulse: Pulse) -> float:
        if pulse.phase in _PATIENCE:
            return _PATIENCE[pulse.phase]
        return _FIRST_STEP_PATIENCE if pulse.is_first_step and pulse.phase != "done" else 1.0

    def _look(self, pulses: list[Pulse]) -> None:
        """What need not be known at once: who is slow, and how much each holds."""
        for pulse in pulses:
            held = resident_bytes(pulse.pid)
            self._resident[pulse.rank] = held or self._resident.get(pulse.rank, 0)
            for slow in self._slow.feed(pulse.rank, self._board.times(pulse.rank)):
                if self._note is not None:
                    self._note("slow-rank", str(slow))

    def _with_memory(self, verdict: Verdict, exit_codes: Mapping[int, int]) -> Verdict:
        """The same verdict, or that the kernel ended the rank because memory ran out."""
        killed = [rank for rank in verdict.ranks if exit_codes.get(rank) == -signal.SIGKILL]
        if not killed or oom_kills() <= self._oom_kills:
            return verdict
        sentence = f"{verdict.sentence}, by the kernel, because memory ran out"
        if self._out_of_memory is not None:
            explanation = self._out_of_memory(killed[0], self._resident.get(killed[0], 0))
            sentence = f"{sentence}: {explanation}"
        return replace(verdict, sentence=sentence, exit_code=DoesNotFit.exit_code)

    def _watch(self) -> None:
        while not self._end.wait(_POLL_S):
            self.poll()

    def _find(self, *, is_hang: bool) -> None:
        pulses = self._board.read()
        if is_hang and all(pulse.phase == "done" for pulse in pulses):
            return  # they are on their way out
        request = self._board.request()
        for pulse in pulses:
            if not self._crashed(pulse.rank):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pulse.pid, signal.SIGUSR2)
        self._await_answers(pulses, request)
        witnesses = self._witnesses(self._board.read(), request)
        if not is_hang and not any(w.failure for w in witnesses):
            return
        verdict = judge(witnesses)
        if verdict.cause not in ("failed", "killed"):
            self.report = hang_report.write(
                self._folder, verdict, witnesses, stalled_s=time.monotonic() - self._since, of=self._name
            )
            silent = (
                "others got no answer"
                if self._accused.is_set()
                else f"no progress for {self._hang_after_s:g} s"
            )
            verdict = replace(verdict, sentence=f"{silent}: {verdict.sentence}; see {self.report}")
        self.verdict = verdict
        self._board.release()
        failing = {w.rank for w in witnesses if w.failure and not w.failure.crash}
        for pulse in pulses:
            if pulse.rank not in failing:
                _end(pulse.pid)

    def _await_answers(self, pulses: list[Pulse], request: int) -> None:
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline:
            alive = [p for p in pulses if process_state(p.pid) not in ("", "Z", "T", "t")]
            if all(self._answered(pulse.rank, request) for pulse in alive):
                return
            time.sleep(0.05)

    def _answered(self, rank: int, request: int) -> bool:
        return bool(self._read_json(RECORDER, rank).get("request") == request)

    def _witnesses(self, pulses: list[Pulse], request: int | None) -> list[Witness]:
        return [self._witness(pulse, request) for pulse in sorted(pulses, key=lambda pulse: pulse.rank)]

    def _witness(self, pulse: Pulse, request: int | None) -> Witness:
        said = self._read_json(RECORDER, pulse.rank)
        collectives: tuple[Collective, ...] | None = None
        if request is not None and said.get("request") == request:
            calls = parse_recorder(str(said["recorder"])) + parse_messages(said["messages"])
            collectives = tuple(sorted(calls, key=lambda call: call.time_ns))
        failure, crash = self._read_json(FAILURE, pulse.rank), self._read(CRASH, pulse.rank)
        known = {"message": str(failure["message"]), "exit_code": failure["exit_code"]} if failure else {}
        ended = Failure(**known, crash=crash) if failure or crash else None
        return Witness(
            rank=pulse.rank,
            step=pulse.step,
            phase=pulse.phase,
            in_phase_s=pulse.in_phase_s,
            waiting=pulse.waiting_s is not None or _on_gpu(collectives) or bool(ended and ended.follows),
            process=process_state(pulse.pid),
            collectives=collectives,
            groups={name: tuple(ranks) for name, ranks in said.get("groups", {}).items()},
            stack=self._read(STACK, pulse.rank),
            failure=ended,
        )

    def _crashed(self, rank: int) -> bool:
        try:
            return (self._post / CRASH.format(rank)).stat().st_size > 0
        except FileNotFoundError:
            return False

    def _read(self, name: str, rank: int) -> str:
        try:
            return (self._post / name.format(rank)).read_text(errors="replace")
        except OSError:
            return ""

    def _read_json(self, name: str, rank: int) -> dict[str, Any]:
        try:
            content = json.loads(self._read(name, rank))
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}


def process_state(pid: int) -> str:
    """The letter that Linux gives a process; "" when it is gone, "?" where the system does not say."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[-1].split()[0]
    except OSError:
        return "" if os.path.isdir("/proc/self") else "?"


def _ended(failure: Failure | None, exit_code: int | None) -> Failure | None:
    if not exit_code:
        return failure
    if failure is not None and not failure.crash:
        return failure
    return Failure(exit_code=exit_code, crash=failure.crash if failure else "")


def _on_gpu(collectives: tuple[Collective, ...] | None) -> bool:
    """Whether a rank waits though its heartbeat cannot tell: in a collective that its GPU has begun and not ended."""
    return any(call.backend == "nccl" and not call.done for call in collectives or ())


def _end(pid: int) -> None:
    if process_state(pid) not in ("", "Z"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
