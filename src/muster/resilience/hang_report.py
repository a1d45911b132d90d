"""The report of a hang, for people: the verdict, who waits for whom, and what each rank was doing."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from muster.resilience.evidence import Witness, main_thread
from muster.resilience.verdict import Verdict, waits

_TAIL = 24


def write(
    folder: Path, verdict: Verdict, witnesses: Sequence[Witness], *, stalled_s: float, of: str = ""
) -> Path:
    """Write the next `hang-NNNN.md` of a run; returns its path. `of`: which of several sets of ranks this is."""
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    content = text(verdict, witnesses, stalled_s=stalled_s, when=when, of=of)
    number = 1 + max((int(path.stem[5:]) for path in folder.glob("hang-[0-9][0-9][0-9][0-9].md")), default=0)
    draft = folder / f"hang.{secrets.token_hex(4)}.partial"
    draft.write_text(content)
    while True:
        path = folder / f"hang-{number:04d}.md"
        try:
            os.link(draft, path)  # unlike a rename, never over the report of another node
        except FileExistsError:
            number += 1
            continue
        draft.unlink()
        return path


def text(verdict: Verdict, witnesses: Sequence[Witness], *, stalled_s: float, when: str, of: str = "") -> str:
    lines = [
        f"# No progress for {stalled_s:.0f} s{f' in {of}' if of else ''}",
        "",
        f"{verdict.sentence[:1].upper()}{verdict.sentence[1:]}.",
        "",
        f"Noticed {when}; cause: {verdict.cause}.",
        "",
        "| rank | step | phase | for | process | waits in | for ranks |",
        "|---|---|---|---|---|---|---|",
    ]
    edges = {wait.rank: wait for wait in waits(witnesses)}
    for w in witnesses:
        wait = edges.get(w.rank)
        operation = (
            f"{wait.collective} #{wait.collective.number}" if wait else ("a message" if w.waiting else "")
        )
        on = ", ".join(map(str, wait.on)) if wait else ""
        mark = " (culprit)" if w.rank in verdict.ranks else ""
        lines.append(
            f"| {w.rank}{mark} | {w.step} | {w.phase} | {w.in_phase_s:.1f} s | {w.process} | {operation} | {on} |"
        )
    for w in sorted(witnesses, key=lambda w: w.rank not in verdict.ranks):
        lines += ["", f"## Rank {w.rank}", *_stack(w), *_tail(w)]
    return "\n".join(lines) + "\n"


def _stack(witness: Witness) -> list[str]:
    stack = witness.stack or (witness.failure.crash if witness.failure else "")
    if not stack:
        why = "a stopped process runs no handler" if witness.stopped else "none was written"
        return ["", f"No Python stack: {why}."]
    return ["", "Python stack, innermost call first:", "", "```", *main_thread(stack), "```"]


def _tail(witness: Witness) -> list[str]:
    if witness.collectives is None:
        return ["", "No flight recorder: the rank did not answer."]
    if not witness.collectives:
        return ["", "The flight recorder is empty."]
    rows = [
        f"| {c.group} | {c.number} | {c} | {'done' if c.done else 'not done'} |"
        for c in witness.collectives[-_TAIL:]
    ]
    return [
        "",
        "Last collectives, and messages between two ranks:",
        "",
        "| group | # | call | |",
        "|---|---|---|---|",
        *rows,
    ]
