"""Training speed on one GPU: muster's model beside transformers', Llama shapes of 1 to 8 B, sequences of 4,096 tokens.

    python benchmarks/gpu/train.py [--json FILE] [--tiny]

Needs torch, transformers and numpy only, no installed muster, and runs unattended: every side has a
process of its own, tries fewer rows while memory is short, and a failure becomes a row of
the table. Weights, gradients and AdamW's moments are bf16 on both sides, so that 8 B fit one GPU; models beyond
2 B recompute their blocks on both sides. The share of peak is of a measured matrix product.
`--tiny` runs a toy shape wherever it is, to check the script.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from sides import parse, start, synchronize, write

from muster.model.presets import PRESETS
from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer, materialize
from muster.observe.peak import gemm_peak_flops

TINY = replace(
    PRESETS["llama-3.2-1b"], layers=2, width=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=256
)
NAMES = ("llama-3.2-1b", "llama-3.2-3b", "llama-3-8b")
SIDES = ("muster", "muster compiled", "muster compiled fp8", "transformers", "transformers compiled")
ROWS = (8, 4, 2, 1)
RECOMPUTED_FROM = 2e9
"""Parameters."""
WARM_UP_STEPS, STEPS = 3, 8
Loss = Any
"""From tokens and targets (B, T) to the mean loss."""


def main() -> None:
    arguments = parse(__doc__)
    if arguments.side:
        print(json.dumps([measure(arguments.side, arguments.name)]))
        return
    names, sides = (("tiny",), ("muster", "transformers")) if arguments.tiny else (NAMES, SIDES)
    rows = []
    print(f"{'model':14}{'side':24}{'rows':>5}{'tokens/s':>10}{'of peak':>9}{'memory':>10}")
    for name in names:
        for side in sides:
            for row in start(__file__, side, name):
                rows.append({"model": name, "side": side} | row)
                print(line(rows[-1]), flush=True)
    write(arguments.json, rows)


def line(row: dict[str, Any]) -> str:
    label = f"{row['model']:14}{row['side']:24}"
    if "failed" in row:
        return f"{label} {row['failed']}"
    memory = f"{row['memory_bytes'] / 2**30:7.1f}GiB"
    return f"{label}{row['rows']:5}{row['tokens_per_s']:10.0f}{row['mfu']:9.0%}{memory}"


def measure(side: str, name: str) -> dict[str, Any]:
    """Tokens/s of whole steps with the most rows that fit."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = TINY if name == "tiny" else PRESETS[name]
    sequence = 64 if name == "tiny" else 4096
    model, loss = (muster_model if side.startswith("muster") else transformers_model)(spec, device)
    if "fp8" in side:
        from torchao.float8 import convert_to_float8_training

        # The head's weight is multiplied inside the loss, so only the blocks have matrices to convert.
        convert_to_float8_training(model, module_filter_fn=lambda module, path: "layers." in path)
    if "compiled" in side:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for rows in ROWS:
        try:
            step_s = time_steps(loss, optimizer, spec, rows, sequence, device)
            break
        except torch.cuda.OutOfMemoryError:
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
    else:
        raise SystemExit("one row does not fit in memory")
    rate = rows * sequence / step_s
    peak = gemm_peak_flops(torch.bfloat16, device)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {
        "rows": rows,
        "sequence_tokens": sequence,
        "tokens_per_s": rate,
        "mfu": rate * spec.flops_per_token(sequence) / peak,
        "peak_flops": peak,
        "memory_bytes": memory,
        "spec": asdict(spec),
    }


def time_steps(
    loss: Loss, optimizer: torch.optim.Optimizer, spec: TransformerSpec, rows: int, sequence: int,
    device: torch.device,
) -> float:  # fmt: skip
    """Median seconds of a step."""
    seconds = []
    for step in range(WARM_UP_STEPS + STEPS):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, spec.vocab, (rows, sequence + 1), generator=generator).to(device)
        synchronize(device)
        started_s = time.perf_counter()
        loss(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        seconds.append(time.perf_counter() - started_s)
    return statistics.median(seconds[WARM_UP_STEPS:])


def muster_model(spec: TransformerSpec, device: torch.device) -> tuple[nn.Module, Loss]:
    """muster's transformer: attention through the GPU's flash kernel, the loss in chunks."""

    def value(name: str, shape: torch.Size) -> Tensor:
        made = torch.empty(shape, device=device)  # drawn there: 8 B on the host take minutes
        return made.fill_(1) if "norm" in name else made.normal_(0, 0.02)

    model: Transformer = materialize(spec, value, dtype=torch.bfloat16, device=device)
    if spec.parameters() > RECOMPUTED_FROM:
        for block in model.layers.values():
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        summed: Tensor = model(tokens, targets)
        return summed / targets.numel()

    return model, loss


def transformers_model(spec: TransformerSpec, device: torch.device) -> tuple[nn.Module, Loss]:
    """LlamaForCausalLM through scaled_dot_product_attention, with its own loss."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=spec.vocab, hidden_size=spec.width, intermediate_size=spec.ffn, num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads, num_key_value_heads=spec.kv_heads, head_dim=spec.head_dim,
        max_position_embeddings=spec.context, tie_word_embeddings=spec.tied, attn_implementation="sdpa",
        use_cache=False,
    )  # fmt: skip
    with device:
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.train()
    if spec.parameters() > RECOMPUTED_FROM:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, lambda tokens, targets: model(input_ids=tokens, labels=tokens).loss


if __name__ == "__main__":
    main()
