"""Replica groups under kill -9: how long until the next committed step, and how much of the work is kept.

    python benchmarks/faults_groups.py [--groups N] [--kill-every S] [--minutes M] [--short] [--json FILE]

`muster train` with `faults.elastic`, undisturbed for a while and then with one rank of a random group killed every so
many seconds. The ledger tells what was committed when and by whom; it is audited: every sample of every step once.
Goodput is the steps committed under kills over those that the undisturbed rate would have given.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import psutil

from muster.chaos.inject import ranks_of_groups, send
from muster.observe.records import read_jsonl

RUN_FILE = """
name: groups
model: {{family: llama, layers: {layers}, width: {width}, heads: 4, context: {context}}}
data: {{train: [{{files: "*.py"}}], held_out: 5%}}
train: {{tokens: 1T, batch_tokens: {batch_tokens}, precision: fp32, log_every: 20}}
layout: {{replicate: {groups}, microbatch: 1}}
checkpoint: {{every: 1h}}
faults: {{elastic: true, on_nan: stop}}
"""
SEQUENCES = 12
"""Of a step: what two, three and four groups divide evenly."""


@dataclass(frozen=True)
class Kill:
    time: float
    group: int
    next_step_s: float
    """Until the others have committed a step without it."""
    back_s: float | None
    """Until it took part in a committed step again."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--kill-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the part with kills")
    parser.add_argument("--undisturbed", type=float, default=60.0, help="seconds before the first kill")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--short", action="store_true", help="a toy model, and two kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    asked = parser.parse_args()
    if asked.short:
        asked.kill_every, asked.minutes, asked.undisturbed, asked.width = 20.0, 0.75, 5.0, 32
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), asked)
    result |= {"cores": psutil.cpu_count(logical=False), "date": date.today().isoformat()}
    kills = [kill["next_step_s"] for kill in result["kills"]]
    back = [kill["back_s"] for kill in result["kills"] if kill["back_s"] is not None]
    print(f"undisturbed step            {result['step_s']:.3f} s")
    print(
        f"kill -9 to a committed step {statistics.median(kills):.3f} s, {max(kills):.3f} s most of {len(kills)}"
    )
    print(
        f"until the group is back     {statistics.median(back):.1f} s, {max(back):.1f} s most of {len(back)}"
    )
    print(f"steps dropped               {result['aborted']} for {len(kills)} kills")
    print(f"goodput                     {result['goodput']:.1%}")
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    for number in range(40):
        lines = (f"value_{number}_{i} = {i * number} + len('hello {i}')\n" for i in range(400))
        (folder / f"{number}.py").write_text("".join(lines))
    context = 32 if asked.short else 128
    sizes = {"layers": 2 if asked.short else 4, "width": asked.width, "context": context}
    text = RUN_FILE.format(groups=asked.groups, batch_tokens=SEQUENCES * context, **sizes)
    (folder / "run.yaml").write_text(text)
    run = folder / "runs" / "groups"
    agent = subprocess.Popen(
        [sys.executable, "-m", "muster", "train", "run.yaml"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=sys.stderr,
    )
    try:
        killed = list(disturb(agent, run, asked))
    finally:
        agent.kill()
        agent.wait()
    gone = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in pids(run)) and time.monotonic() < gone:
        time.sleep(0.1)
    assert not any(psutil.pid_exists(pid) for pid in pids(run)), (
        "ranks outlived the process that started them"
    )
    return evaluate(run, killed, asked)


def disturb(
    agent: subprocess.Popen[bytes], run: Path, asked: argparse.Namespace
) -> Iterator[tuple[float, int]]:
    """Kill a rank now and then; when and of which group."""
    chance = random.Random(asked.seed)
    while len(read_jsonl(run / "ledger.jsonl")) < 5 or len(last_members(run)) < asked.groups:
        assert agent.poll() is None, "the run ended before its first steps"
        time.sleep(0.1)
    wait(agent, asked.undisturbed)
    end = time.monotonic() + 60 * asked.minutes
    while time.monotonic() < end - asked.kill_every / 2:
        if len(last_members(run)) < asked.groups:
            wait(agent, 0.5)  # whoever was killed before is not back yet
            continue
        group = chance.choice(sorted(int(member) for member in last_members(run)))
        process = ranks_of_groups(agent.pid, run)[group]
        wait(agent, chance.random() * 0.2)  # anywhere in a step
        yield time.time(), group
        send(process, signal.SIGKILL)
        wait(agent, asked.kill_every)


def wait(agent: subprocess.Popen[bytes], seconds: float) -> None:
    time.sleep(seconds)
    assert agent.poll() is None, "the run ended"


def evaluate(run: Path, killed: list[tuple[float, int]], asked: argparse.Namespace) -> dict[str, Any]:
    ledger = read_jsonl(run / "ledger.jsonl")
    for number, line in enumerate(ledger):
        taken = [s for spans in line["samples"].values() for a, b in spans for s in range(a, b)]
        assert line["step"] == number + 1, "a step was committed twice, or left out"
        assert sorted(taken) == list(range(number * SEQUENCES, (number + 1) * SEQUENCES)), line
    first = killed[0][0]
    before = [
        line["time"] for line in ledger if line["time"] < first and len(line["samples"]) == asked.groups
    ]
    before = before[5:]
    step_s = (before[-1] - before[0]) / (len(before) - 1)
    kills = []
    for when, group in killed:
        after = [line for line in ledger if line["time"] > when]
        without = next(line for line in after if str(group) not in line["samples"])
        back = next(
            (x["time"] for x in after if x["time"] > without["time"] and str(group) in x["samples"]), None
        )
        kills.append(Kill(when, group, without["time"] - when, back and back - when))
    under = [line for line in ledger if line["time"] >= first]
    goodput = len(under) * step_s / (ledger[-1]["time"] - first)
    events = read_jsonl(run / "events.jsonl")
    aborted = sum(event["event"] == "regrouped" and event["aborted"] for event in events)
    ended = sum(event["event"] == "group-ended" for event in events)
    return {
        "groups": asked.groups,
        "kill_every_s": asked.kill_every,
        "step_s": step_s,
        "goodput": goodput,
        "aborted": aborted,
        "groups_ended": ended,
        "kills": [asdict(kill) for kill in kills],
    }


def pids(run: Path) -> list[int]:
    events = read_jsonl(run / "events.jsonl")
    return [pid for event in events if event["event"] == "group-started" for pid in event["pids"]]


def last_members(run: Path) -> list[str]:
    return list(read_jsonl(run / "ledger.jsonl", last_bytes=4096)[-1]["samples"])


if __name__ == "__main__":
    main()
