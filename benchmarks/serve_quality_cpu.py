"""What each weight format of the serving network costs in quality, on a trained model.

    python benchmarks/serve_quality_cpu.py RUN [--tokens N] [--text FILE...] [--json FILE]

RUN is a run's folder. Text that it was not trained on (by default the tests of this Python's standard library) goes
through the model in fp32 and through the serving network in each format; reported are the mean KL divergence of the
next token's distribution from fp32's, in nats, the share of equal first choices, and the loss. `int4/int4` has its
head in int4 too.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cells import machine
from serve_kernels_cpu import BLOCK_TOKENS, new_tokens

from muster.export.trained import load_trained
from muster.model.transformer import Transformer
from muster.serve.engine.network import TransformerNetwork
from muster.serve.engine.packed import pack_model
from muster.serve.kernels.ops import choose_kernels

FORMATS = (("fp32", None), ("bf16", None), ("int8", None), ("int4", None), ("int4", "int4"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--text", type=Path, nargs="+")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    trained = load_trained(arguments.run)
    files = arguments.text or sorted(Path(sysconfig.get_path("stdlib")).glob("*/test*/**/*.py")) or sorted(
        Path(sysconfig.get_path("stdlib")).glob("test/*.py"))  # fmt: skip
    ids: list[int] = []
    for path in files:
        if len(ids) >= arguments.tokens:
            break
        ids += trained.tokenizer.encode(path.read_text("utf-8", errors="replace"))
    length = trained.model.spec.context
    chunks = torch.tensor(ids[: arguments.tokens // length * length]).view(-1, length)
    with torch.inference_mode():
        exact = torch.cat([trained.model(chunk[None])[0].float().log_softmax(-1) for chunk in chunks])
    print(
        f"{len(exact)} tokens, {trained.model.spec.parameters() / 1e6:.1f} M parameters, vocabulary {exact.shape[1]}"
    )
    print(f"{'format':>10}{'KL nats':>12}{'same choice':>13}{'loss':>8}")
    rows = []
    for format, head in FORMATS:
        rows.append(compare(trained.model, format, head, chunks, exact))
        row = rows[-1]
        print(f"{row['format']:>10}{row['kl']:12.6f}{row['same_choice']:13.2%}{row['loss']:8.4f}", flush=True)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine(), "run": arguments.run.name, "rows": rows}, indent=1)
        )


def compare(
    model: Transformer, format: Any, head: Any, chunks: torch.Tensor, exact: torch.Tensor
) -> dict[str, Any]:
    kernels, _ = choose_kernels(torch.float32 if format == "fp32" else torch.bfloat16)
    network = TransformerNetwork(pack_model(model, format, head=head), kernels)
    pages = -(-chunks.shape[1] // BLOCK_TOKENS)
    cache, table = network.new_cache(pages, BLOCK_TOKENS), torch.arange(pages)[None]
    found = []
    for chunk in chunks:
        batch = new_tokens(chunk, 0, table)
        every = type(batch)(
            **{name: getattr(batch, name) for name in batch.__slots__} | {"wanted": torch.arange(len(chunk))}
        )
        found.append(network.logits(every, cache).log_softmax(-1))
    scores = torch.cat(found)
    targets = chunks[:, 1:].flatten()
    predicted = scores.view(*chunks.shape, -1)[:, :-1].flatten(0, 1)
    return {
        "format": format if head is None else f"{format}/{head}",
        "kl": float((exact.exp() * (exact - scores)).sum(-1).mean()),
        "same_choice": float((exact.argmax(-1) == scores.argmax(-1)).float().mean()),
        "loss": float(F.nll_loss(predicted, targets)),
    }


if __name__ == "__main__":
    main()
