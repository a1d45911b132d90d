"""What the next step computes: a state machine over plain data, without tensors, threads or a clock.

Iteration-level scheduling (Orca, Yu et al. 2022) over paged blocks (PagedAttention, Kwon et al. 2023). A step has
one budget of tokens. First every sequence that is past its prompt gets one, then prompts get what is left, in
chunks (Sarathi, Agrawal et al. 2023); then waiting sequences are admitted, and what is still left goes to drafts.

Who goes first: smaller priority, then the client that has been served least (virtual token counter, Sheng et al.
2024), then who came first. When blocks run out, the last in rank gives up its own and is computed again later,
mostly from the prefix cache. The first in rank never does, so every step brings it closer to its end.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections.abc import Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from muster.serve.engine.blocks import BlockPool, Chore, Key
from muster.serve.engine.sequence import Sequence


@dataclass(slots=True, eq=False)  # and not frozen, which would triple the cost of making one
class Work:
    """One sequence's part of a step: its tokens from `start` to `stop`, and guesses at those that follow."""

    sequence: Sequence
    start: int
    stop: int
    draft: tuple[int, ...] = ()

    @property
    def draws(self) -> bool:
        """Whether the step ends with new tokens for it, or only with more of its prompt in the cache."""
        return self.stop == len(self.sequence.tokens)

    @property
    def rows(self) -> int:
        return self.stop - self.start + len(self.draft)


@dataclass(frozen=True, slots=True)
class Plan:
    """One step."""

    works: tuple[Work, ...]
    chores: tuple[Chore, ...]
    """What to do to the cache's blocks first, in order."""
    admitted: tuple[Sequence, ...]

    @property
    def rows(self) -> int:
        return sum(work.rows for work in self.works)


@dataclass(slots=True)
class Counts:
    """What has happened so far."""

    preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0


class Scheduler:
    """Holds the waiting and the running sequences: `plan` a step, `advance` each of its works, `remove` who ends.

    A step computes `step_tokens` tokens at most, and `streams` sequences run at once. The pool must hold one
    sequence of the full context, and a block more.
    """

    def __init__(self, pool: BlockPool, *, streams: int, step_tokens: int) -> None:
        if step_tokens < streams:
            raise ValueError(
                f"a step of {step_tokens} tokens is too small for {streams} streams of one token"
            )
        self.pool = pool
        self.counts = Counts()
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        """In the order of their ranks."""
        self._streams, self._step_tokens = streams, step_tokens
        self._pending: dict[Key, Sequence] = {}  # blocks being computed now, and by whom
        self._served: dict[str, int] = {}  # tokens by client, of those that have a sequence here
        self._present: dict[str, int] = {}  # sequences by client

    @property
    def capacity_tokens(self) -> int:
        """Tokens of the longest sequence that can always be computed."""
        return (self.pool.blocks - 1) * self.pool.block_tokens

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        client = sequence.client
        if client not in self._present:  # whoever comes starts level with the least served, not with a credit
            self._served[client] = min(self._served.values(), default=0)
            self._present[client] = 0
        self._present[client] += 1
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence, *, damaged: bool = False) -> None:
        """Forget a sequence that has ended, and free what it holds. `damaged`: its keys and values hold nan."""
        if sequence.running:
            self.running.remove(sequence)
            if damaged:
                self.pool.discredit(sequence.blocks)
            self._vacate(sequence, tainted=damaged or not sequence.sound)
        else:
            self.waiting.remove(sequence)
        self._present[sequence.client] -= 1
        if self._present[sequence.client] == 0:
            del self._present[sequence.client], self._served[sequence.client]

    def restart(self, roots: Tokens[Key]) -> None:
        """Have every sequence computed anew, with nothing in the cache: what fills it has changed.

        `roots` are the keys before their first block from now on, by adapter. Those that ran go first.
        """
        for sequence in list(self.running):
            self._preempt(sequence)
        for sequence in self.waiting:
            sequence.root, sequence.waits_for = roots[sequence.adapter], None
            sequence.keys.clear()
        self.pool.clear_cache()

    def plan(self, drafts: Mapping[str, Tokens[int]] | None = None) -> Plan:
        """Decide a step. `drafts`: guesses at the next tokens of running sequences, by id."""
        budget, size = self._step_tokens, self.pool.block_tokens
        works: list[Work] = []
        for sequence in list(self.running):
            length = len(sequence.tokens)
            if length - sequence.computed == 1 and (
                length <= len(sequence.blocks) * size or self._make_room(sequence)
            ):
                works.append(Work(sequence, length - 1, length))
        decodes = len(works)
        budget -= decodes
        for sequence in self.running:
            if budget and sequence.missing > 1:
                budget -= self._prefill(sequence, budget, works)
        admitted = []
        if budget and self.waiting and len(self.running) < self._streams:
            for sequence in sorted(self.waiting, key=self._turn):
                if budget == 0 or len(self.running) == self._streams:
                    break
                if self._is_deferred(sequence):
                    continue
                if not self._admit(sequence):
                    break  # nobody passes it: it would wait forever behind smaller ones
                admitted.append(sequence)
                budget -= self._prefill(sequence, budget, works)
        if drafts and budget:
            self._add_drafts(works, decodes, drafts, budget)
        works.sort(key=_adapter)
        return Plan(tuple(works), self.pool.chores(), tuple(admitted))

    def advance(self, work: Work, tokens: Tokens[int]) -> None:
        """Count a computed work. `tokens` were drawn (none at the end of a chunk of a prompt)."""
        sequence = work.sequence
        self._served[sequence.client] += work.stop - work.start + len(tokens)
        if tokens:
            sequence.tokens.extend(tokens)
            sequence.computed = len(sequence.tokens) - 1  # what was drafted and refused lies beyond
        else:
            sequence.computed = work.stop
        if (
            work.start < sequence.prompt_tokens
            or sequence.computed // self.pool.block_tokens > sequence.published
        ):
            self._publish(sequence, work.start)

    def _prefill(self, sequence: Sequence, budget: int, works: list[Work]) -> int:
        """Compute as much of a sequence as the budget allows; returns how much."""
        tokens = min(budget, sequence.missing)
        works.append(Work(sequence, sequence.computed, sequence.computed + tokens))
        return tokens

    def _add_drafts(
        self, works: list[Work], decodes: int, drafts: Mapping[str, Tokens[int]], budget: int
    ) -> None:
        """Spend what is left, alike on all; guesses never cost another sequence its blocks."""
        for index, work in enumerate(works[:decodes]):
            share = -(-budget // (decodes - index))
            draft = tuple(drafts.get(work.sequence.id, ())[:share])
            block_tokens = self.pool.block_tokens
            while draft and self._lacks(work.sequence, work.stop + len(draft)):
                if not self.pool.free:
                    draft = draft[: len(work.sequence.blocks) * block_tokens - work.stop]
                    break
                work.sequence.blocks.append(self.pool.take())
            if draft:
                works[index] = Work(work.sequence, work.start, work.stop, draft)
                budget -= len(draft)

    def _turn(self, sequence: Sequence) -> tuple[int, bool, int, int]:
        """The order of admission."""
        served = self._served[sequence.client]
        return sequence.priority, not sequence.preempted, served, sequence.arrival

    def _lacks(self, sequence: Sequence, tokens: int) -> bool:
        return len(sequence.blocks) * self.pool.block_tokens < tokens

    def _make_room(self, sequence: Sequence) -> bool:
        """Blocks for all its tokens, from the last in rank if need be; False when that is itself."""
        while sequence.running and self._lacks(sequence, len(sequence.tokens)):
            if self.pool.free:
                sequence.blocks.append(self.pool.take())
            else:
                self._preempt(self.running[-1])
        return sequence.running

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._vacate(sequence, tainted=not sequence.sound)
        sequence.preempted = True
        self.waiting.append(sequence)
        self.counts.preemptions += 1

    def _vacate(self, sequence: Sequence, *, tainted: bool) -> None:
        self.pool.release(sequence.blocks, tainted=tainted)
        sequence.blocks = array("q")
        sequence.computed = sequence.published = 0
        sequence.running = sequence.sound = False
        for key in [key for key, leader in self._pending.items() if leader is sequence]:
            del self._pending[key]

    def _is_deferred(self, sequence: Sequence) -> bool:
        """Whether a running sequence is about to compute what this one begins with: then it waits and shares it."""
        if sequence.waits_for in self._pending:
            return True
        sequence.waits_for = None
        keys = sequence.full_keys(self.pool.block_tokens)
        missing = next((key for key in keys if self.pool.find(key) is None), None)
        if missing is None:
            missing = sequence.tail_key(len(sequence.tokens), self.pool.block_tokens)
        if missing in self._pending:
            sequence.waits_for = missing
        return sequence.waits_for is not None

    def _admit(self, sequence: Sequence) -> bool:
        """Give a sequence its blocks, those that the cache knows and new ones; False when they are not free."""
        pool, size, length = self.pool, self.pool.block_tokens, len(sequence.tokens)
        keys = sequence.full_keys(size)
        known: list[int] = []
        for key in keys:
            block = pool.find(key)
            if block is None:
                break
            known.append(block)
        source: int | None = None
        computed = len(known) * size
        if computed == length:  # the last token is computed again for its logits, so its block is written
            source = known.pop()
        elif len(known) == len(keys) and length - computed > 1:
            tail = sequence.tail_key(length, size)
            source = None if tail is None else pool.find(tail)
        new = -(-length // size) - len(known)
        free = pool.free - sum(pool.is_free(block) for block in known)
        # With others running, one block each stays free, or admission would only lead to preemption.
        if source is not None and pool.is_free(source):
            free -= 1
        if free < new + len(self.running):
            return False
        for block in known:
            pool.hold(block)
        sequence.blocks = array("q", known)
        if source is not None:
            sequence.blocks.append(pool.take_copy(source))
            computed = length - 1
        while len(sequence.blocks) * size < length:
            sequence.blocks.append(pool.take())
        sequence.computed, sequence.published = computed, len(known)
        sequence.running, sequence.sound = True, False
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_rank)
        self.counts.prefix_query_tokens += length
        self.counts.prefix_hit_tokens += computed
        self._announce(sequence)
        return True

    def _announce(self, sequence: Sequence) -> None:
        """Say which blocks it is about to compute."""
        if not self.pool.shares:
            return
        size = self.pool.block_tokens
        for key in sequence.full_keys(size)[sequence.published :]:
            self._pending.setdefault(key, sequence)
        tail = sequence.tail_key(sequence.prompt_tokens, size)
        if tail is not None and sequence.missing > 1:
            self._pending.setdefault(tail, sequence)

    def _publish(self, sequence: Sequence, start: int) -> None:
        """Let others find the blocks that have become full, and the prompt's end within one."""
        size = self.pool.block_tokens
        full = sequence.computed // size
        if full > sequence.published:
            keys = sequence.full_keys(size)
            for index in range(sequence.published, full):
                self.pool.publish(sequence.blocks[index], keys[index])
                self._settle(keys[index], sequence)
            sequence.published = full
        end = sequence.prompt_tokens
        if start < end <= sequence.computed:
            tail = sequence.tail_key(end, size)
            if tail is not None:
                self.pool.publish(sequence.blocks[end // size], tail)
                self._settle(tail, sequence)

    def _settle(self, key: Key, sequence: Sequence) -> None:
        if self._pending.get(key) is sequence:
            del self._pending[key]


def _adapter(work: Work) -> int:
    """Rows of one adapter are computed together."""
    return work.sequence.adapter


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
