"""Out of memory: a real rank with a real limit says what it expected, what it held, and what would save most."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.toy import tiny, train_here, write_corpus

_ROOM_BYTES = 600 * 2**20


def train_with_a_limit(run: dict[str, Any], base: str, folder: str) -> tuple[str, int]:
    """What the rank's error says, and its exit code, where it may take so many bytes more than it has now."""
    import resource

    from muster.errors import DoesNotFit

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with pytest.raises(DoesNotFit) as caught:
        train_here(run, base, folder)
    return str(caught.value), caught.value.exit_code


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
@pytest.mark.parametrize(("width", "held"), [(512, True), (2048, False)], ids=["in a step", "in setting up"])
def test_a_rank_that_runs_out_of_memory(width: int, held: bool, run_ranks: Any, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    model = {"family": "llama", "layers": 4, "width": width, "heads": 4, "context": 256, "tied": True}
    train = {"tokens": 2**16, "batch_tokens": 2**13, "precision": "fp32"}
    run = tiny(model=model, train=train, layout={"microbatch": 32})
    ((text, exit_code),) = run_ranks(1, train_with_a_limit, run, str(tmp_path), str(tmp_path / "run"))
    assert exit_code == 3
    first, *lines = text.splitlines()
    assert re.match(
        r"rank 0 ran out of memory at .*B, asking for .*B more; by the formulas its tensors need", first
    )
    assert any(
        re.match(r"  parameters: expected .*B" + (", held .*B" if held else "$"), line) for line in lines
    )
    tries = [line for line in lines if line.startswith("  try ")]
    assert len(tries) == 3
    assert any("layout.recompute=full, which saves" in line for line in tries)
    assert any("layout.microbatch=16, which saves" in line for line in tries)
