"""The protocol of a worker's process: a line that it is ready; then for each JSON line of a load, one with answers.

Standard library alone, as each worker runs in its peer's own environment.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

now = time.perf_counter


def serve(ask: Callable[[list[list[int]], int, int], list[dict[str, Any]]]) -> None:
    """Until standard input ends. `ask` takes prompts, tokens to generate and how many at a time."""
    _say({"ready": True})
    for line in sys.stdin:
        load = json.loads(line)
        try:
            _say({"answers": ask(load["prompts"], load["output_tokens"], load["concurrency"])})
        except Exception as error:
            _say({"failed": f"{type(error).__name__}: {error}"})
            raise


def answer(prompt: Sequence[int], sent_s: float, arrived_s: Sequence[float]) -> dict[str, Any]:
    """One of the answers, by the times of its tokens."""
    return {
        "sent_s": sent_s, "arrived_s": list(arrived_s), "ended_s": arrived_s[-1], "prompt_tokens": len(prompt),
        "output_tokens": len(arrived_s),
    }  # fmt: skip


def _say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()
