"""What the serving network does on this CPU without an engine around it: decode and prefill tokens/s by weight format.

    python benchmarks/serve_kernels_cpu.py [--shape m160|1b] [--formats bf16 int8 int4] [--repeats N] [--json FILE]

A fixed batch of sequences decodes greedily after a prompt, with random weights and random page tables; prefill is one
prompt alone, in chunks of 512. The best of the repeats counts, because other jobs on the machine only ever make a
step slower; their load is printed.
The share of memory bandwidth is that of the weights that a step has to read, of a read of memory measured by the same
process. At batch 1 that is what bounds decoding.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from cells import machine

from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer, materialize
from muster.serve.engine.batch import Batch
from muster.serve.engine.hugepages import huge_bytes
from muster.serve.engine.network import TransformerNetwork
from muster.serve.engine.packed import pack_model
from muster.serve.kernels.ops import choose_kernels

SHAPES = {
    "m160": TransformerSpec(
        family="llama", layers=12, width=768, heads=12, kv_heads=4, head_dim=64, ffn=3072, vocab=32_000, context=2048,
        tied=False,
    ),
    "1b": TransformerSpec(
        family="llama", layers=22, width=2048, heads=32, kv_heads=4, head_dim=64, ffn=5632, vocab=32_000, context=2048,
        tied=False,
    ),
}  # fmt: skip
BATCHES = (1, 8, 32)
BLOCK_TOKENS = 32
CHUNK_TOKENS = 512


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="m160")
    parser.add_argument(
        "--formats", nargs="+", choices=("fp32", "bf16", "int8", "int4"), default=["bf16", "int8", "int4"]
    )
    parser.add_argument("--prompt", type=int, default=128, help="tokens of context before decoding")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt that is timed")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bandwidth = read_bandwidth()
    spec = SHAPES[arguments.shape]
    print(f"{arguments.shape}: {spec.parameters() / 1e6:.0f} M parameters, {arguments.threads} threads, "
          f"read bandwidth {bandwidth / 1e9:.1f} GB/s, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    print(
        f"{'format':>6}{'batch':>7}{'decode tok/s':>14}{'step ms':>9}{'bandwidth':>11}{'prefill tok/s':>15}{'load':>7}"
    )
    torch.manual_seed(0)
    model = materialize(spec, random_weights, dtype=torch.bfloat16)
    rows = []
    for format in arguments.formats:
        rows += measure(model, format, arguments, bandwidth)
    if arguments.json:
        result = {"machine": machine(), "date": date.today().isoformat(), "torch": torch.__version__}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        setup = {name: value for name, value in vars(arguments).items() if name != "json"}
        result |= {"setup": setup, "bandwidth_bytes_per_s": bandwidth, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(
    model: Transformer, format: Any, arguments: argparse.Namespace, bandwidth: float
) -> list[dict[str, Any]]:
    compute = torch.float32 if format == "fp32" else torch.bfloat16
    kernels, reason = choose_kernels(compute)
    packed = pack_model(model, format)
    network = TransformerNetwork(packed, kernels)
    weight_bytes = sum(t.nbytes for weights in packed.linears.values() for t in weights.tensors().values())
    prefill_s = best_prefill(network, arguments.prefill, arguments.repeats)
    rows = []
    for batch in BATCHES:
        step_s = best_step(network, batch, arguments.prompt, arguments.steps, arguments.repeats)
        row = {
            "format": format, "batch": batch, "decode_tokens_per_s": batch / step_s, "step_s": step_s,
            "bandwidth_share": weight_bytes / step_s / bandwidth, "weight_bytes": weight_bytes,
            "prefill_tokens_per_s": arguments.prefill / prefill_s, "load": os.getloadavg()[0], "kernels": reason,
        }  # fmt: skip
        rows.append(row)
        print(f"{format:>6}{batch:7}{row['decode_tokens_per_s']:14.1f}{step_s * 1e3:9.2f}{row['bandwidth_share']:11.0%}"
              f"{row['prefill_tokens_per_s']:15.0f}{row['load']:7.1f}", flush=True)  # fmt: skip
    return rows


def best_step(network: TransformerNetwork, sequences: int, prompt: int, steps: int, repeats: int) -> float:
    pages = -(-(prompt + steps * repeats + 1) // BLOCK_TOKENS)
    cache = network.new_cache(sequences * pages, BLOCK_TOKENS)
    table = torch.randperm(sequences * pages).view(sequences, pages)
    for s in range(sequences):
        network.logits(new_tokens(torch.randint(network.spec.vocab, (prompt,)), 0, table[s : s + 1]), cache)
    tokens, position, best = torch.randint(network.spec.vocab, (sequences,)), prompt, float("inf")
    for _ in range(repeats):
        started_s = time.perf_counter()
        for _ in range(steps):
            tokens = network.logits(next_tokens(tokens, position, table), cache).argmax(-1)
            position += 1
        best = min(best, (time.perf_counter() - started_s) / steps)
    return best


def best_prefill(network: TransformerNetwork, prompt: int, repeats: int) -> float:
    pages = -(-prompt // BLOCK_TOKENS)
    cache = network.new_cache(pages, BLOCK_TOKENS)
    table = torch.randperm(pages)[None]
    tokens, best = torch.randint(network.spec.vocab, (prompt,)), float("inf")
    for _ in range(repeats):
        started_s = time.perf_counter()
        for start in range(0, prompt, CHUNK_TOKENS):
            network.logits(new_tokens(tokens[start : start + CHUNK_TOKENS], start, table), cache)
        best = min(best, time.perf_counter() - started_s)
    return best


def new_tokens(tokens: torch.Tensor, start: int, table: torch.Tensor) -> Batch:
    """A chunk of one sequence, the logits of its last token wanted."""
    positions = torch.arange(start, start + len(tokens))
    slots = table[0, positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS
    return Batch(
        tokens=tokens, positions=positions, slots=slots, starts=torch.tensor([0, len(tokens)]),
        lengths=torch.tensor([start + len(tokens)]), table=table, wanted=torch.tensor([len(tokens) - 1]),
    )  # fmt: skip


def next_tokens(tokens: torch.Tensor, position: int, table: torch.Tensor) -> Batch:
    """One token of each sequence."""
    S = len(tokens)
    slots = table[:, position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
    return Batch(
        tokens=tokens, positions=torch.full((S,), position), slots=slots, starts=torch.arange(S + 1),
        lengths=torch.full((S,), position + 1), table=table, wanted=torch.arange(S),
    )  # fmt: skip


def read_bandwidth() -> float:
    """Bytes/s of the fastest of several sums over memory that no cache holds, in huge pages as weights are."""
    memory = huge_bytes(1_024_000_000).view(torch.float32).fill_(1)
    best = float("inf")
    for _ in range(7):
        started_s = time.perf_counter()
        memory.sum()
        best = min(best, time.perf_counter() - started_s)
    return memory.nbytes / best


def random_weights(name: str, shape: torch.Size) -> torch.Tensor:
    return torch.ones(shape) if "norm" in name else torch.randn(shape) * 0.02


if __name__ == "__main__":
    main()
