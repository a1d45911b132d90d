"""What a policy does to latencies and prefix caches: replicas with virtual time, for tests and for comparing policies.

A replica shares its tokens a second evenly among the sequences that run (processor sharing), and computes of a prompt
what its cache, least lately used blocks of which are dropped, does not know.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from muster.serve.router.policy import PROMPT_SHARE, Candidate, Policy, PrefixTable, choose
from muster.serve.router.rates import Meter, weights


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when it comes, the keys of its prompt's blocks, and the tokens it generates."""

    at_s: float
    keys: Sequence[int]
    output_tokens: int


@dataclass(slots=True)
class Machine:
    """A replica: tokens a second, sequences at a time, and blocks of its prefix cache."""

    rate: float
    streams: int = 8
    cache_blocks: int = 1000
    block_tokens: int = 16
    running: list[_Job] = field(default_factory=list)
    queue: deque[_Job] = field(default_factory=deque)
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    meter: Meter = field(default_factory=Meter)

    @property
    def load(self) -> float:
        return sum(job.left for job in (*self.running, *self.queue))

    def admit(self, now_s: float) -> int:
        """Let waiting sequences run; returns the blocks that the cache knew of theirs."""
        hits = 0
        while self.queue and len(self.running) < self.streams:
            job = self.queue.popleft()
            for key in job.arrival.keys:
                if key not in self.cache:
                    break
                job.left -= PROMPT_SHARE * self.block_tokens
                hits += 1
            for key in job.arrival.keys:
                self.cache.pop(key, None)
                self.cache[key] = None
            while len(self.cache) > self.cache_blocks:
                self.cache.popitem(last=False)
            self.running.append(job)
            self.meter.began(now_s)
        return hits

    def next_end_s(self, now_s: float) -> float:
        if not self.running:
            return float("inf")
        return now_s + min(job.left for job in self.running) * len(self.running) / self.rate

    def advance(self, now_s: float, passed_s: float) -> list[_Job]:
        """Compute for `passed_s`; returns the sequences that are done."""
        if not self.running:
            return []
        done = passed_s * self.rate / len(self.running)
        for job in self.running:
            job.left -= done
        self.meter.delivered(done * len(self.running), now_s)
        ended = [job for job in self.running if job.left < 1e-9]
        for job in ended:
            self.running.remove(job)
            self.meter.ended(now_s)
        return ended


@dataclass(slots=True, eq=False)
class _Job:
    arrival: Arrival
    left: float
    """Tokens to compute, those of its prompt at their share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulated:
    """Latencies in order of arrival, the share of prompt blocks that caches knew, and requests by replica."""

    latencies_s: Sequence[float]
    hit_rate: float
    requests: Sequence[int]


def simulate(policy: Policy, arrivals: Sequence[Arrival], machines: Sequence[Machine]) -> Simulated:
    """Route requests, which are in order of time, to machines."""
    table = PrefixTable()
    now_s, turn, hits = 0.0, 0, 0
    ended_s: dict[int, float] = {}
    counts = [0] * len(machines)
    waiting = deque(enumerate(arrivals))
    numbers: dict[int, int] = {}
    while waiting or any(machine.running or machine.queue for machine in machines):
        due_s = min(machine.next_end_s(now_s) for machine in machines)
        if waiting:
            due_s = min(due_s, waiting[0][1].at_s)
        for machine in machines:
            for job in machine.advance(due_s, due_s - now_s):
                ended_s[numbers.pop(id(job))] = due_s
        now_s = due_s
        while waiting and waiting[0][1].at_s <= now_s:
            number, arrival = waiting.popleft()
            turn += 1
            prompt = PROMPT_SHARE * len(arrival.keys) * machines[0].block_tokens
            job = _Job(arrival, prompt + arrival.output_tokens)
            rated = weights([machine.meter.rate for machine in machines])
            candidates = [
                Candidate(index, machine.load, weight)
                for index, (machine, weight) in enumerate(zip(machines, rated, strict=True))
            ]
            chosen = choose(policy, candidates, job.left, table.matched(arrival.keys), turn)
            table.note(arrival.keys, chosen)
            machines[chosen].queue.append(job)
            numbers[id(job)] = number
            counts[chosen] += 1
        hits += sum(machine.admit(now_s) for machine in machines)
    blocks = sum(len(arrival.keys) for arrival in arrivals)
    return Simulated(
        latencies_s=[ended_s[number] - arrival.at_s for number, arrival in enumerate(arrivals)],
        hit_rate=hits / max(blocks, 1),
        requests=counts,
    )
