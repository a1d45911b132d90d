"""A sequence as the scheduler sees it: its tokens, how many of them the cache holds, and where."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from muster.serve.engine.blocks import Key, chained


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens to continue. The cache holds the first `computed` of them, in `blocks`."""

    id: str
    arrival: int
    """Running number; smaller came first."""
    tokens: list[int]
    """The prompt and what has been generated."""
    prompt_tokens: int
    root: Key
    """The key before its first block."""
    priority: int = 0
    """Smaller goes first."""
    client: str = ""
    """Who asked: within a priority, clients are served alike."""
    adapter: int = 0
    """Which one computes it, counted from 1; 0 for the model alone."""
    computed: int = 0
    blocks: array[int] = field(default_factory=lambda: array("q"))
    """An array, as the step's tensors are made from it."""
    running: bool = False
    preempted: bool = False
    sound: bool = False
    """Its last logits were finite, and so is all that its blocks hold."""
    published: int = 0
    """Full blocks whose keys the pool knows."""
    waits_for: Key | None = None
    """Another sequence is computing a block that this one begins with."""
    keys: list[Key] = field(default_factory=list)

    @property
    def missing(self) -> int:
        """Tokens that have to be computed before the next one is drawn."""
        return len(self.tokens) - self.computed

    @property
    def rank(self) -> tuple[int, int]:
        """Who keeps its blocks when they run out: the smallest."""
        return self.priority, self.arrival

    def full_keys(self, block_tokens: int) -> list[Key]:
        """Keys of the blocks that its tokens fill, in order."""
        for index in range(len(self.keys), len(self.tokens) // block_tokens):
            parent = self.keys[-1] if self.keys else self.root
            self.keys.append(chained(parent, self.tokens[index * block_tokens : (index + 1) * block_tokens]))
        return self.keys

    def tail_key(self, end: int, block_tokens: int) -> Key | None:
        """Key of the part of a block that its first `end` tokens leave at the end; None for none."""
        first = end - end % block_tokens
        if first == end:
            return None
        keys = self.full_keys(block_tokens)
        parent = keys[first // block_tokens - 1] if first else self.root
        return chained(parent, self.tokens[first:end])
