"""Who did it: hangs and failures planted in small worlds of real processes; is the right rank named, and how soon?

    python -m benchmarks.faults_hang --trials 100 --ranks 4

Each trial starts fresh gloo ranks that go through the phases of a step with real collectives, plants one fault in one
rank at a random step, and compares the watchdog's verdict with what was planted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from muster.resilience.forked import free_port
from muster.resilience.verdict import Verdict
from muster.resilience.watchdog import Watchdog

FAULTS = {
    "stop": "stopped",  # SIGSTOP
    "data": "absent",  # the data loader does not return
    "spin": "absent",  # an endless loop in the optimizer
    "skip": "mismatch",  # one collective left out
    "leave": "absent",  # one left out, and then nothing
    "mismatch": "mismatch",  # all_gather where the rest calls all_reduce
    "shape": "mismatch",  # gloo aborts
    "error": "failed",  # an exception; the others lose their connection
    "kill": "killed",  # SIGKILL
}
"""What is planted, and the cause that the verdict should give."""
_DEADLINE_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    kind: str
    rank: int
    step: int
    place: int
    """Which of a step's collectives."""
    direct: bool = True
    """The gathers go from rank to rank, as those of training do, and not through gloo's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    fault: Fault
    verdict: Verdict | None
    seconds: float
    """From the fault to the verdict."""
    report: Path | None
    noted: list[str]

    @property
    def named(self) -> bool:
        return self.verdict is not None and self.verdict.ranks == (self.fault.rank,)


def trial(fault: Fault, *, ranks: int, folder: Path, hang_after_s: float, timeout_s: float = 60.0) -> Trial:
    """Start ranks of which one has a fault; what the watchdog says. Leaves no process behind."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "torch._dynamo", "muster.resilience.watched"])
    noted: list[str] = []
    watchdog = Watchdog(
        folder,
        ranks,
        hang_after_s=hang_after_s,
        peers=[range(ranks)],
        note=lambda _, sentence: noted.append(sentence),
    )
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    started = folder / "fault-time"
    with watchdog:
        processes = [
            context.Process(
                target=rank_with_fault,
                args=(rank, watchdog.environment | place, fault, started, timeout_s),
                daemon=True,
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + _DEADLINE_S
        while watchdog.verdict is None and time.monotonic() < deadline:
            if any(process.exitcode not in (None, 0) for process in processes):
                break
            if all(process.exitcode is not None for process in processes):
                break
            time.sleep(0.05)
        codes = {rank: p.exitcode for rank, p in enumerate(processes) if p.exitcode not in (None, 0)}
        verdict = watchdog.conclude({rank: code for rank, code in codes.items() if code is not None})
        ended = time.time()
        for process in processes:
            process.kill()
            process.join()
    since = float(started.read_text()) if started.exists() else ended
    return Trial(fault=fault, verdict=verdict, seconds=ended - since, report=watchdog.report, noted=noted)


def rank_with_fault(
    rank: int, environment: dict[str, str], fault: Fault, started: Path, timeout_s: float
) -> None:
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    import datetime

    import torch
    import torch.distributed as dist

    from muster.resilience.watched import watched

    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # gloo's last words
    with watched() as me:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout_s))
        try:
            for step in range(1, fault.step + 25):
                lasts = fault.kind == "slow" and step > fault.step
                here = fault if rank == fault.rank and (step == fault.step or lasts) else None
                if here is not None and not lasts:
                    started.write_text(str(time.time()))
                one_step(me.beat, step, here, direct=fault.direct)
        except Exception as error:
            dist.destroy_process_group()  # as training does: the others lose their connection before they are told
            me.failed(f"{type(error).__name__}: {error}", 1)
            os._exit(1)
    os._exit(0)


def one_step(beat, step: int, fault: Fault | None, *, direct: bool) -> None:  # type: ignore[no-untyped-def]
    import torch
    import torch.distributed as dist

    from muster.comm.collectives import all_gather

    kind = fault.kind if fault else ""
    world = dist.get_world_size()

    def collective(place: int, size: int, operation: str = "all_reduce") -> None:
        here = fault is not None and fault.place == place
        if here and kind == "skip":
            return
        if here and kind == "leave":
            time.sleep(3600)
        if here and kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if here and kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if here and kind == "error":
            raise ValueError("planted")
        if here and kind == "mismatch":
            operation = "all_gather" if operation == "all_reduce" else "all_reduce"
        if here and kind == "shape":
            size += 1
        x = torch.ones(size)
        if operation == "all_reduce":
            dist.all_reduce(x)
        elif direct:
            all_gather(torch.empty(world * size), x, group=dist.group.WORLD)
        else:
            dist.all_gather([torch.empty(size) for _ in range(world)], x)

    beat.step(step)
    if kind == "data":
        time.sleep(3600)
    time.sleep(0.001)
    beat.enter("exchange")
    collective(0, 3)
    beat.enter("forward")
    collective(1, 500, "all_gather")
    beat.enter("backward")
    for place, size in enumerate((4000, 4000, 1000), start=2):
        collective(place, size)
    beat.enter("optimizer")
    time.sleep(0.02 if kind == "slow" else 0.008)
    while kind == "spin":
        pass


def draw(kind: str, ranks: int, chance: random.Random) -> Fault:
    return Fault(
        kind=kind,
        rank=chance.randrange(ranks),
        step=chance.randrange(2, 30),
        place=chance.randrange(5),
        direct=chance.random() < 0.7,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--hang-after", type=float, default=2.0)
    parser.add_argument("--kinds", nargs="*", default=list(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    chance = random.Random(options.seed)
    trials = []
    for number in range(options.trials):
        fault = draw(options.kinds[number % len(options.kinds)], options.ranks, chance)
        with tempfile.TemporaryDirectory() as folder:
            done = trial(fault, ranks=options.ranks, folder=Path(folder), hang_after_s=options.hang_after)
        trials.append(done)
        if not done.named or (done.verdict and done.verdict.cause != FAULTS[fault.kind]):
            print("NOT AS PLANTED" if done.named else "NOT NAMED", fault, done.verdict, flush=True)
    named, of = Counter(t.fault.kind for t in trials if t.named), Counter(t.fault.kind for t in trials)
    for kind in of:
        slowest = max(t.seconds for t in trials if t.fault.kind == kind)
        print(f"{kind:9} named {named[kind]} of {of[kind]}, within {slowest:.1f} s")
    print(f"all       named {named.total()} of {of.total()}")
    if options.json:
        content = [
            asdict(t.fault)
            | {"named": t.named, "seconds": t.seconds, "said": t.verdict.sentence if t.verdict else None}
            for t in trials
        ]
        options.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
