"""Attention on one CPU core, forward and backward: blocks of matrix products beside scaled_dot_product_attention.

    python benchmarks/attention_cpu.py [--repeats N] [--json FILE]

`muster.model.attend` chooses between the two by sequence length from these figures. The sides take turns in
one process that keeps freed memory, as a training rank does; processor time is compared, which a neighbour
on the machine disturbs little. 8 query and 4 key/value heads of 64, causal, as many sequences as fill
4,096 tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cells import machine

from muster.model.blocked import BlockedAttention
from muster.parallel.world import keep_freed_memory

HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
TOKENS = 4096
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    print(f"{'tokens':>6}{'precision':>10}{'blocked ms':>12}{'sdpa ms':>9}{'ratio':>7}  (a sequence)")
    for precision in PRECISIONS:
        for length in LENGTHS:
            rows.append(compare(length, precision, arguments.repeats))
            print(line(rows[-1]), flush=True)
    if arguments.json:
        result = {"machine": machine(), "date": date.today().isoformat(), "torch": torch.__version__}
        shape = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "tokens": TOKENS}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result | shape | {"rows": rows}, indent=1) + "\n")


def compare(length: int, precision: str, repeats: int) -> dict[str, Any]:
    """Median processor seconds of one sequence by each side, and how often the blocks are as fast."""
    sequences = max(TOKENS // length, 1)
    q, k, v, upstream = (
        torch.randn(sequences, heads, length, HEAD_DIM).to(PRECISIONS[precision])
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]

    def blocked() -> None:
        torch.autograd.grad(BlockedAttention.apply(q, k, v, None, None), inputs, upstream)

    def sdpa() -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, inputs, upstream)

    sides: dict[str, Callable[[], None]] = {"blocked": blocked, "sdpa": sdpa}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            started_s = time.process_time()
            side()
            if repeat:  # the first call also chooses kernels and fills the heap
                seconds[name].append((time.process_time() - started_s) / sequences)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "length_tokens": length,
        "precision": precision,
        "blocked_s": medians["blocked"],
        "sdpa_s": medians["sdpa"],
        "ratio": medians["sdpa"] / medians["blocked"],
    }


def line(row: dict[str, Any]) -> str:
    times = f"{row['blocked_s'] * 1e3:12.2f}{row['sdpa_s'] * 1e3:9.2f}"
    return f"{row['length_tokens']:6}{row['precision']:>10}{times}{row['ratio']:7.2f}"


if __name__ == "__main__":
    main()
