"""Replica groups under kill -9, SIGSTOP and SIGTERM: how long until the next committed step, and how much work is kept.

    python benchmarks/faults_groups.py [--groups N] [--kill-every S] [--minutes M] [--short] [--json FILE]

`muster train` with `faults.elastic`: undisturbed for a while, then with one rank of a random group killed every so many
seconds, undisturbed again, then with a group stopped by SIGSTOP, and in the end SIGTERM to the command. The ledger
tells what was committed when and by whom; it is audited: every sample of every step once.

Goodput is the steps (all of the same size) committed from the first kill on, whatever happens in that part, over those
of a run beside it that nobody disturbs, in the same seconds, because a shared machine is not equally fast all the time;
that ratio is taken over the same one of the stretches before and after, in which nobody disturbs either. While a
group is dead the other run gets some of its share of the machine, so the figure is rather too low than too high.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import psutil

from muster.observe.records import read_jsonl

RUN_FILE = """
name: {name}
model: {{family: llama, layers: {layers}, width: {width}, heads: 4, context: {context}}}
data: {{train: [{{files: "*.py"}}], held_out: 5%}}
train: {{tokens: 1T, batch_tokens: {batch_tokens}, precision: fp32, log_every: 20}}
layout: {{replicate: {groups}, microbatch: 1}}
checkpoint: {{every: 1h}}
faults: {{elastic: true, hang_after: {hang_after}s}}
"""
SEQUENCES = 12
"""Of a step: what two, three and four groups divide evenly."""


Stretch = tuple[float, float]
"""When it begins and ends."""


@dataclass(frozen=True)
class Kill:
    time: float
    group: int
    next_step_s: float
    """Until the others have committed a step without it."""
    back_s: float | None
    """Until it took part in a committed step again."""


def main() -> None:
    asked = options()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), asked)
    result |= {"cores": psutil.cpu_count(logical=False), "date": date.today().isoformat()}
    kills = [kill["next_step_s"] for kill in result["kills"]]
    back = [kill["back_s"] for kill in result["kills"] if kill["back_s"] is not None]
    print(f"undisturbed step            {result['undisturbed_step_s']:.3f} s")
    print(f"kill -9 to a committed step {said(kills)} of {len(kills)}")
    print(f"until the group is back     {said(back)} of {len(back)}")
    print(f"steps dropped               {result['aborted']} for {len(kills)} kills")
    print(f"goodput                     {result['goodput']:.1%} ({result['steps']} steps)")
    print(f"SIGSTOP to its report       {result['named_s']:.1f} s, hang_after {asked.hang_after:g} s")
    print(f"SIGSTOP to a committed step {result['hang_s']:.1f} s")
    print(f"                            {result['hang_said']}")
    print(f"SIGTERM to exit {result['exit_code']}          {result['stop_s']:.1f} s: {result['stop_said']}")
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")


def said(seconds: list[float]) -> str:
    return f"p50 {quantile(seconds, 0.5):.3f} s, p99 {quantile(seconds, 0.99):.3f} s"


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(round(share * (len(ordered) - 1)), len(ordered) - 1)] if ordered else float("nan")


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--kill-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the part with kills")
    parser.add_argument("--undisturbed", type=float, default=60.0, help="seconds before the kills, and after")
    parser.add_argument("--hang-after", type=float, default=10.0, help="faults.hang_after, in seconds")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--short", action="store_true", help="a toy model, and two kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    asked = parser.parse_args(arguments)
    if asked.short:
        asked.kill_every, asked.minutes, asked.undisturbed, asked.width = 20.0, 0.75, 5.0, 32
        asked.hang_after = 3.0
    return asked


def measure(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    for number in range(40):
        lines = (f"value_{number}_{i} = {i * number} + len('hello {i}')\n" for i in range(400))
        (folder / f"{number}.py").write_text("".join(lines))
    context = 32 if asked.short else 128
    sizes = {"layers": 2 if asked.short else 4, "width": asked.width, "context": context}
    runs = {name: folder / "runs" / name for name in ("groups", "control")}
    agents = {name: start(folder, name, asked, sizes) for name in runs}
    try:
        found = story(agents, runs, folder / "groups.said", asked)
    except AssertionError:
        sys.stderr.write((folder / "groups.said").read_text()[-4000:])
        raise
    finally:
        for agent in agents.values():
            agent.kill()
            agent.wait()
    run = runs["groups"]
    gone = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in pids(run)) and time.monotonic() < gone:
        time.sleep(0.1)
    assert not any(psutil.pid_exists(pid) for pid in pids(run)), (
        "ranks outlived the process that started them"
    )
    return found


def start(
    folder: Path, name: str, asked: argparse.Namespace, sizes: dict[str, int]
) -> subprocess.Popen[bytes]:
    text = RUN_FILE.format(
        name=name,
        groups=asked.groups,
        batch_tokens=SEQUENCES * sizes["context"],
        hang_after=f"{asked.hang_after:g}",
        **sizes,
    )
    (folder / f"{name}.yaml").write_text(text)
    with (folder / f"{name}.said").open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "muster", "train", f"{name}.yaml"],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def story(
    agents: dict[str, subprocess.Popen[bytes]], runs: dict[str, Path], said: Path, asked: argparse.Namespace
) -> dict[str, Any]:
    """All that is done to a run, in order, and what came of it."""
    chance = random.Random(asked.seed)
    agent, run = agents["groups"], runs["groups"]
    for name in runs:
        all_there(agents[name], runs[name], asked.groups)
    began = time.time()
    wait(agent, asked.undisturbed)
    killed = list(kill_groups(agent, run, asked, chance))
    ended = time.time()
    all_there(agent, run, asked.groups)
    again = time.time()
    wait(agent, asked.undisturbed)
    quiet = [(began, killed[0][0]), (again, time.time())]
    found = evaluate(runs, killed, ended, quiet, asked)
    agents["control"].kill()
    return found | stop_a_group(agent, run, asked, chance) | stop_all(agent, run, said)


def all_there(agent: subprocess.Popen[bytes], run: Path, groups: int) -> None:
    """Wait until all groups train, and have for some steps."""
    several = 0
    while several < 5:
        assert agent.poll() is None, "the run ended"
        time.sleep(0.1)
        last = read_jsonl(run / "ledger.jsonl")[-5:]
        several = sum(len(line["samples"]) == groups for line in last)


def kill_groups(
    agent: subprocess.Popen[bytes], run: Path, asked: argparse.Namespace, chance: random.Random
) -> Iterator[tuple[float, int]]:
    """Kill a rank now and then; when and of which group."""
    end = time.monotonic() + 60 * asked.minutes
    while time.monotonic() < end - asked.kill_every / 2:
        if len(last_members(run)) < asked.groups:
            wait(agent, 0.5)  # whoever was killed before is not back yet
            continue
        group, pid = draw(run, chance)
        wait(agent, chance.random() * 0.2)  # anywhere in a step
        yield time.time(), group
        os.kill(pid, signal.SIGKILL)
        wait(agent, asked.kill_every)


def stop_a_group(
    agent: subprocess.Popen[bytes], run: Path, asked: argparse.Namespace, chance: random.Random
) -> dict[str, Any]:
    """SIGSTOP: the seconds until the others have committed a step without that group, and what was said of it."""
    group, pid = draw(run, chance)
    stopped = time.time()
    os.kill(pid, signal.SIGSTOP)
    while True:
        assert time.time() < stopped + 60 + 4 * asked.hang_after, "nobody noticed"
        wait(agent, 0.1)
        after = [line for line in read_jsonl(run / "ledger.jsonl") if line["time"] > stopped]
        without = [line["time"] for line in after if str(group) not in line["samples"]]
        if without:
            break
    ended = [e for e in read_jsonl(run / "events.jsonl") if e["event"] == "group-ended"][-1]
    reports = sorted(run.glob("hang-*.md"))
    named = ended["group"] == group and "rank 0 was stopped" in ended["message"] and bool(reports)
    return {
        "hang_s": without[0] - stopped,
        "named_s": ended["time"] - stopped,
        "hang_named": named,
        "hang_said": ended["message"],
    }


def stop_all(agent: subprocess.Popen[bytes], run: Path, said: Path) -> dict[str, Any]:
    """SIGTERM to the command: how long until it ends, and how."""
    began = time.monotonic()
    agent.send_signal(signal.SIGTERM)
    code = agent.wait(120)
    stop_s = time.monotonic() - began
    step = read_jsonl(run / "ledger.jsonl")[-1]["step"]
    return {
        "stop_s": stop_s,
        "exit_code": code,
        "stop_saved": (run / "checkpoints" / f"step-{step:08d}").is_dir(),
        "stop_said": said.read_text().strip().splitlines()[-1],
    }


def draw(run: Path, chance: random.Random) -> tuple[int, int]:
    """A group that trains, and its first rank's process."""
    group = chance.choice(sorted(int(member) for member in last_members(run)))
    return group, newest_pids(run)[group][0]


def wait(agent: subprocess.Popen[bytes], seconds: float) -> None:
    time.sleep(seconds)
    assert agent.poll() is None, "the run ended"


def evaluate(
    runs: dict[str, Path],
    killed: list[tuple[float, int]],
    ended: float,
    quiet: list[Stretch],
    asked: argparse.Namespace,
) -> dict[str, Any]:
    ledger, control = (read_jsonl(runs[name] / "ledger.jsonl") for name in ("groups", "control"))
    for number, line in enumerate(ledger):
        taken = [s for spans in line["samples"].values() for a, b in spans for s in range(a, b)]
        assert line["step"] == number + 1, "a step was committed twice, or left out"
        assert sorted(taken) == list(range(number * SEQUENCES, (number + 1) * SEQUENCES)), line
    kills = []
    for when, group in killed:
        after = [line for line in ledger if line["time"] > when]
        without = next(line for line in after if str(group) not in line["samples"])
        back = next(
            (x["time"] for x in after if x["time"] > without["time"] and str(group) in x["samples"]), None
        )
        kills.append(Kill(when, group, without["time"] - when, back and back - when))
    disturbed = [(killed[0][0], ended)]
    beside, before_and_after = (
        rate(ledger, stretches) / rate(control, stretches) for stretches in (disturbed, quiet)
    )
    events = [e for e in read_jsonl(runs["groups"] / "events.jsonl") if killed[0][0] <= e["time"] < ended]
    return {
        "groups": asked.groups,
        "kill_every_s": asked.kill_every,
        "undisturbed_step_s": 1 / rate(ledger, quiet),
        "goodput": beside / before_and_after,
        "steps": sum(killed[0][0] <= line["time"] < ended for line in ledger),
        "aborted": sum(event["event"] == "regrouped" and event["aborted"] for event in events),
        "groups_ended": sum(event["event"] == "group-ended" for event in events),
        "kills": [asdict(kill) for kill in kills],
    }


def rate(ledger: list[dict[str, Any]], stretches: list[Stretch]) -> float:
    """Committed steps a second; between the last step before a stretch and the last in it, so that no part of a step
    is counted for a whole one."""
    steps, seconds = 0, 0.0
    for begin, end in stretches:
        inside = [line["time"] for line in ledger if begin <= line["time"] < end]
        first = max((line["time"] for line in ledger if line["time"] < begin), default=inside[0])
        steps += len(inside) - (first == inside[0])
        seconds += inside[-1] - first
    return steps / seconds


def newest_pids(run: Path) -> dict[int, list[int]]:
    events = read_jsonl(run / "events.jsonl")
    return {event["group"]: event["pids"] for event in events if event["event"] == "group-started"}


def pids(run: Path) -> list[int]:
    events = read_jsonl(run / "events.jsonl")
    return [pid for event in events if event["event"] == "group-started" for pid in event["pids"]]


def last_members(run: Path) -> list[str]:
    return list(read_jsonl(run / "ledger.jsonl", last_bytes=4096)[-1]["samples"])


if __name__ == "__main__":
    main()
