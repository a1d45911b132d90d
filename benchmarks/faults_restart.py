"""What a restart costs: kill -9 of a random rank of `muster train`, and the time until the next step is committed.

    python benchmarks/faults_restart.py [--trials 30] [--seed 0] [--torchrun | --memory] [--json FILE]

Every step is committed (`checkpoint: {every: 1 steps}`), so the figure holds everything: noticing, ending the other
ranks, starting anew, joining, loading and verifying the checkpoint, one step, and saving it. The losses of all steps
are then compared with those of an undisturbed run: they must be equal bit for bit. --torchrun has torch's own
launcher start and restart the same ranks. --memory has every step committed to the node's memory instead, and no
checkpoint written before the end: the in-memory path.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from muster.chaos import drill
from muster.chaos.inject import ranks_of
from muster.observe.records import read_jsonl

RUN_FILE = """
name: {name}
model: {{family: llama, layers: 2, width: 64, heads: 4, context: 64}}
data: {{train: [{{files: "*.py"}}], held_out: 5%}}
train: {{tokens: {tokens}, batch_tokens: 512, log_every: 1, precision: fp32}}
layout: {{replicate: 2}}
checkpoint: {{every: {every} steps, keep: 3, memory: {memory}}}
faults: {{restarts: 10}}
"""
CORPUS = "for i in range(10):\n    print(i, 'hello world', i * i)\n"
_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class Restart:
    """One kill and what followed, in seconds after it."""

    rank: int
    step: int
    """Updates that were committed when it came."""
    noticed_s: float
    started_s: float
    """All ranks have joined, and the checkpoint is loaded."""
    committed_s: float
    """A step later than any before is in a checkpoint, or in memory."""


def write_run(folder: Path, name: str, *, steps: int, every: int = 1, memory: str = "none") -> None:
    for number in range(30):
        (folder / f"{number}.py").write_text(f"# {number}\n" + CORPUS * 9)
    (folder / f"{name}.yaml").write_text(
        RUN_FILE.format(name=name, tokens=steps * 512, every=every, memory=memory)
    )


_TORCHRUN = [
    *(
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
    ),
    *("--local-addr=127.0.0.1", "--max-restarts=1000", "-m"),
]


def start(folder: Path, name: str, *more: str, torchrun: bool = False) -> subprocess.Popen[bytes]:
    """`muster train` in a session of its own; what it says is in NAME.log."""
    command = [sys.executable, *(_TORCHRUN if torchrun else ["-m"]), "muster", "train", f"{name}.yaml", *more]
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def rank_pids(agent: int) -> list[int]:
    """Process ids of the ranks that an agent keeps, by rank."""
    return [process.pid for process in ranks_of(agent).values()]


def events(folder: Path, name: str, kind: str, after: float = 0.0) -> list[dict[str, Any]]:
    records = read_jsonl(folder / "runs" / name / "events.jsonl")
    return [record for record in records if record["event"] == kind and record["time"] > after]


def wait_event(
    folder: Path, name: str, kind: str, job: subprocess.Popen[bytes], *, after: float = 0.0, least: int = 0
) -> dict[str, Any]:
    """The first event of a kind after a time, at step `least` or later."""
    deadline = time.monotonic() + _DEADLINE_S
    while time.monotonic() < deadline:
        for event in events(folder, name, kind, after):
            if event.get("step", least) >= least:
                return event
        if job.poll() is not None and not events(folder, name, kind, after):
            raise RuntimeError(
                f"the run ended with {job.returncode}: {(folder / f'{name}.log').read_text()[-2000:]}"
            )
        time.sleep(0.005)
    raise RuntimeError(
        f"no event '{kind}' within {_DEADLINE_S:.0f} s: {(folder / f'{name}.log').read_text()[-2000:]}"
    )


def kill_a_rank(
    folder: Path, name: str, job: subprocess.Popen[bytes], chance: random.Random, kind: str = "checkpoint"
) -> Restart:
    """kill -9 of a random rank at a random moment of training, and what followed; events of `kind` tell of a commit."""
    began = time.time()
    wait_event(folder, name, kind, job, after=began)
    time.sleep(chance.uniform(0.0, 0.3))
    pids = rank_pids(job.pid)
    rank = chance.randrange(len(pids))
    killed = time.time()
    os.kill(pids[rank], signal.SIGKILL)
    started = wait_event(folder, name, "started", job, after=killed)
    noticed = next(
        iter(events(folder, name, "restart", killed)), {"time": float("nan")}
    )  # torchrun notes none
    saved = events(folder, name, kind)
    before = max(event["step"] for event in saved if event["time"] < started["time"])
    committed = wait_event(folder, name, kind, job, after=started["time"], least=before + 1)
    return Restart(
        rank=rank,
        step=before,
        noticed_s=noticed["time"] - killed,
        started_s=started["time"] - killed,
        committed_s=committed["time"] - killed,
    )


def losses(folder: Path, name: str) -> dict[int, float]:
    """The loss of each step, as recorded last."""
    return drill.losses(folder / "runs" / name)


def trials(
    folder: Path, count: int, seed: int, *, torchrun: bool = False, memory: bool = False
) -> tuple[list[Restart], bool]:
    """So many kills of one run, and whether its losses equal an undisturbed run's, bit for bit."""
    steps = 60 * count
    if memory:
        write_run(folder, "killed", steps=steps, every=steps, memory="1 steps")
    else:
        write_run(folder, "killed", steps=steps)
    kind = "memory" if memory else "checkpoint"
    write_run(folder, "straight", steps=steps, every=steps)
    chance = random.Random(seed)
    job = start(folder, "killed", torchrun=torchrun)
    try:
        wait_event(folder, "killed", "started", job)
        restarts = [kill_a_rank(folder, "killed", job, chance, kind) for _ in range(count)]
        if job.wait(timeout=_DEADLINE_S * 5):
            raise RuntimeError((folder / "killed.log").read_text()[-2000:])
    finally:
        if job.poll() is None:
            job.kill()
        job.wait()
    if start(folder, "straight").wait():
        raise RuntimeError((folder / "straight.log").read_text()[-2000:])
    if memory and len(events(folder, "killed", "checkpoint")) != 1:
        raise RuntimeError("a checkpoint was written before the end, so memory was not all that was there")
    return restarts, losses(folder, "killed") == losses(folder, "straight")


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(round(share * (len(ordered) - 1)), len(ordered) - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--torchrun", action="store_true")
    how.add_argument("--memory", action="store_true")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="muster-restart-") as folder:
        restarts, equal = trials(
            Path(folder), chosen.trials, chosen.seed, torchrun=chosen.torchrun, memory=chosen.memory
        )
    for name in ("noticed_s", "started_s", "committed_s"):
        values = [float(getattr(restart, name)) for restart in restarts]
        print(
            f"{name:12} p50 {statistics.median(values):6.2f}  p99 {quantile(values, 0.99):6.2f}  "
            f"min {min(values):6.2f}  max {max(values):6.2f}  of {len(values)} kills"
        )
    print(f"loss curve equal to the undisturbed run's, bit for bit: {'yes' if equal else 'NO'}")
    if chosen.json:
        chosen.json.write_text(
            json.dumps({"rows": [asdict(restart) for restart in restarts], "equal": equal}, indent=1)
        )
    sys.exit(not equal)


if __name__ == "__main__":
    main()
