"""`benchmarks/serve_cpu.py`: it runs, counts exactly, and, where llama.cpp was built, so with its server."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.side import Answer, Failed, figures

REPOSITORY = Path(__file__).parents[2]
BENCHMARK = REPOSITORY / "benchmarks" / "serve_cpu.py"
PEERS = REPOSITORY / "build" / "peers"


def run(*arguments: str, home: Path) -> dict[str, Any]:
    result = home / "result.json"
    command = [sys.executable, str(BENCHMARK), "--shapes", "tiny", "--short", "--json", str(result)]
    done = subprocess.run(
        [*command, "--home", str(home), *arguments], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def test_our_own_side_runs(tmp_path: Path) -> None:
    found = run("--peers", "engine", "--formats", "int8", "--concurrency", "1", "8", home=tmp_path)
    assert [row["concurrency"] for row in found["rows"]] == [1, 8]
    for row in found["rows"]:
        assert row["decode_tokens_per_s"] > 0
        assert row["prefill_tokens_per_s"] > 0
        assert row["step_bytes"] > 0


def test_rates_leave_out_what_was_not_at_the_same_time() -> None:
    """Four steps of two answers, 0.1 s each, after half a second of prompts; the first answer began a step before."""
    first = Answer(
        sent_s=0.0, arrived_s=(0.4, 0.5, 0.6, 0.7, 0.8), ended_s=0.8, prompt_tokens=50, output_tokens=5
    )
    second = Answer(
        sent_s=0.0, arrived_s=(0.5, 0.601, 0.699, 0.8, 0.9), ended_s=0.9, prompt_tokens=50, output_tokens=5
    )
    found = figures([first, second])
    assert found["decode_tokens_per_s"] == pytest.approx(20.0)
    assert found["prefill_tokens_per_s"] == pytest.approx(200.0)
    assert found["output_tokens_per_s"] == pytest.approx(10 / 0.9)


def test_what_is_read_at_once_has_a_rate() -> None:
    at_once = Answer(sent_s=0.0, arrived_s=(0.5,) * 5, ended_s=0.5, prompt_tokens=50, output_tokens=5)
    assert figures([at_once])["decode_tokens_per_s"] == pytest.approx(4 / 0.5)
    with pytest.raises(Failed, match="5 tokens came in one piece"):
        figures([replace(at_once, arrived_s=(0.5,))])


@pytest.mark.long
@pytest.mark.skipif(
    not (PEERS / "llama.cpp" / "build" / "bin" / "llama-server").exists(),
    reason="llama.cpp is not built: benchmarks/serve_cpu.py builds it",
)
def test_the_load_generator_counts_exactly_against_llama_server(tmp_path: Path) -> None:
    """A side raises unless the server counts as many tokens, of prompts and answers, as were asked for."""
    (tmp_path / "llama.cpp").symlink_to(PEERS / "llama.cpp")
    found = run("--peers", "ours", "llama.cpp", "--formats", "bf16", home=tmp_path)
    sides = [(row["side"], row["concurrency"]) for row in found["rows"]]
    assert sides == [(side, load) for side in ("ours", "llama.cpp") for load in (1, 8, 32)]
