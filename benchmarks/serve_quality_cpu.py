"""What each weight format of the serving network costs in quality, on a trained model.

    python benchmarks/serve_quality_cpu.py RUN [--tokens N] [--text FILE...] [--peers NAME...] [--json FILE]

RUN is a run's folder. Text that it was not trained on (by default the tests of this Python's standard library) goes
through the model in fp32 and through the serving network in each format; reported are the mean KL divergence of the
next token's distribution from fp32's, in nats, over all tokens and over the later half of each context, the share of
equal first choices, and the loss. `int4/int4` has its head in int4 too. Peers' formats are made by their own
converters, and compared with fp32 by llama.cpp's own tool (later halves only) or with the same fp32 as ours.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cells import machine
from peers.llamacpp import LlamaCpp
from peers.openvino_genai import OpenVino
from serve_kernels_cpu import BLOCK_TOKENS, new_tokens

from muster.export.trained import load_trained
from muster.model.transformer import Transformer
from muster.serve.engine.network import TransformerNetwork
from muster.serve.engine.packed import pack_model
from muster.serve.kernels.ops import choose_kernels
from muster.serve.opening import COMPUTE_BYTES, token_bytes

FORMATS: tuple[tuple[str, str | None, str | None], ...] = (
    ("fp32", None, None), ("fp32", None, "int8"), ("bf16", None, None), ("bf16", None, "int8"), ("int8", None, None),
    ("int8", None, "int8"), ("int4", None, None), ("int4", None, "int8"), ("int4", "int4", None),
)  # fmt: skip
"""Of the weights, of the head where it differs, and of keys and values where that is not the activations'."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--text", type=Path, nargs="+")
    parser.add_argument("--peers", nargs="*", choices=("llama.cpp", "openvino"), default=[])
    parser.add_argument("--home", type=Path, default=Path(__file__).parents[1] / "build" / "peers")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    trained = load_trained(arguments.run)
    files = arguments.text or sorted(Path(sysconfig.get_path("stdlib")).glob("*/test*/**/*.py")) or sorted(
        Path(sysconfig.get_path("stdlib")).glob("test/*.py"))  # fmt: skip
    ids: list[int] = []
    texts: list[str] = []
    for path in files:
        if len(ids) >= arguments.tokens:
            break
        texts.append(path.read_text("utf-8", errors="replace"))
        ids += trained.tokenizer.encode(texts[-1])
    length = trained.model.spec.context
    chunks = torch.tensor(ids[: arguments.tokens // length * length]).view(-1, length)
    with torch.inference_mode():
        exact = torch.cat([trained.model(chunk[None])[0].float().log_softmax(-1) for chunk in chunks])
    print(
        f"{len(exact)} tokens, {trained.model.spec.parameters() / 1e6:.1f} M parameters, vocabulary {exact.shape[1]}"
    )
    print(f"{'':10}{'format':>13}{'KL nats':>12}{'later half':>12}{'same choice':>13}{'loss':>8}")
    rows = []
    for format, head, kv in FORMATS:
        scores = serving_scores(trained.model, format, head, kv, chunks)
        name = (format if head is None else f"{format}/{head}") + ("" if kv is None else f" kv {kv}")
        bytes_of_token = token_bytes(trained.model.spec, COMPUTE_BYTES[format], kv)
        rows.append({"side": "ours", "format": name, "kv_token_bytes": bytes_of_token})
        rows[-1] |= compare(scores, exact, chunks)
        tell(rows[-1])
    folder = arguments.run / "hf"
    if "llama.cpp" in arguments.peers:
        side, chunk_count = LlamaCpp(arguments.home), len(chunks)
        side.install()
        for format, kl in side.divergences(folder, "".join(texts), length, chunk_count).items():
            rows.append({"side": side.name, "format": format, "kl_late": kl})
            tell(rows[-1])
    if "openvino" in arguments.peers:
        peer = OpenVino(arguments.home)
        peer.install()
        for format in peer.formats:
            scores = (
                torch.from_numpy(peer.logits(folder, format, chunks.numpy())).flatten(0, 1).log_softmax(-1)
            )
            rows.append({"side": peer.name, "format": format} | compare(scores, exact, chunks))
            tell(rows[-1])
    if arguments.json:
        about = {"machine": machine(), "date": date.today().isoformat(), "torch": torch.__version__}
        result = about | {"run": arguments.run.name, "tokens": arguments.tokens, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def tell(row: dict[str, Any]) -> None:
    late = f"{row['side']:10}{row['format']:>13}{row.get('kl', float('nan')):12.6f}{row['kl_late']:12.6f}"
    rest = f"{row['same_choice']:13.2%}{row['loss']:8.4f}" if "loss" in row else ""
    rest += f"{row['kv_token_bytes']:10,} bytes of keys and values a token" if "kv_token_bytes" in row else ""
    print(late + rest, flush=True)


def serving_scores(model: Transformer, format: Any, head: Any, kv: Any, chunks: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (N, V) that the serving network gives."""
    kernels, _ = choose_kernels(torch.float32 if format == "fp32" else torch.bfloat16)
    network = TransformerNetwork(pack_model(model, format, head=head), kernels)
    pages = -(-chunks.shape[1] // BLOCK_TOKENS)
    cache, table = network.new_cache(pages, BLOCK_TOKENS, kv), torch.arange(pages)[None]
    found = []
    for chunk in chunks:
        batch = new_tokens(chunk, 0, table)
        every = type(batch)(
            **{name: getattr(batch, name) for name in batch.__slots__} | {"wanted": torch.arange(len(chunk))}
        )
        found.append(network.logits(every, cache).log_softmax(-1))
    return torch.cat(found)


def compare(scores: torch.Tensor, exact: torch.Tensor, chunks: torch.Tensor) -> dict[str, Any]:
    targets = chunks[:, 1:].flatten()
    predicted = scores.view(*chunks.shape, -1)[:, :-1].flatten(0, 1)
    divergence = (exact.exp() * (exact - scores)).sum(-1).view(chunks.shape)
    return {
        "kl": float(divergence.mean()),
        # The positions that llama.cpp's tool compares.
        "kl_late": float(divergence[:, chunks.shape[1] // 2 : -1].mean()),
        "same_choice": float((exact.argmax(-1) == scores.argmax(-1)).float().mean()),
        "loss": float(F.nll_loss(predicted, targets)),
    }


if __name__ == "__main__":
    main()
