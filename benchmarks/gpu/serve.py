"""Decoding on one GPU: muster's engine beside transformers' `generate`, and beside what the memory can deliver.

    python benchmarks/gpu/serve.py [--json FILE] [--tiny]

Llama shapes of 1 to 8 B with random weights in bf16, prompts of 128 tokens and 128 tokens of output, 1, 8 and 32
requests at a time. Needs torch, triton, transformers and numpy only, no installed muster, and runs unattended: every
side has a process of its own, and a failure becomes a row of the table. The roofline is the bytes of weights and of
keys and values that a step must read, over the measured bandwidth. Before it is timed, muster's engine with graphs and
Triton's kernels must find the log-probabilities that plain torch operations find.
`--tiny` runs a toy shape wherever it is.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from sides import device_name, parse, start, synchronize, write

from muster.model.presets import PRESETS
from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer, materialize

TINY = replace(
    PRESETS["llama-3.2-1b"],
    layers=2,
    width=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=128,
    vocab=256,
    context=512,
)
NAMES = ("llama-3.2-1b", "llama-3.2-3b", "llama-3-8b")
SIDES = ("muster", "muster eager", "transformers", "transformers compiled")
CONCURRENCY = (1, 8, 32)
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 128
COMPARED_TOKENS = 16
TOLERANCE = 0.05
"""In nats: bf16 rounds logits of about 10 to 0.03."""
BLOCK_TOKENS = 16

Ask = Callable[[list[list[int]], int], tuple[list[list[int]], float, float]]
"""Answers to prompts that come at once, greedy; seconds to all first tokens, seconds after that."""


def main() -> None:
    arguments = parse(__doc__)
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.name)))
        return
    names, sides = (("tiny",), ("muster", "transformers")) if arguments.tiny else (NAMES, SIDES)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bandwidth = read_bandwidth(device)
    print(f"{device_name()}: reads {bandwidth / 1e9:.0f} GB/s")
    print(f"{'model':14}{'side':24}{'requests':>9}{'prefill':>10}{'decode':>10} tokens/s {'of roofline':>12}")
    rows = []
    for name in names:
        for side in sides:
            for row in start(__file__, side, name):
                row = {"model": name, "side": side} | row
                if "failed" not in row:
                    row["roofline"] = row["decode_tokens_per_s"] / roofline(
                        name, row["concurrency"], bandwidth
                    )
                rows.append(row)
                print(line(row), flush=True)
    write(arguments.json, rows, bandwidth_bytes_per_s=bandwidth)


def line(row: dict[str, Any]) -> str:
    label = f"{row['model']:14}{row['side']:24}"
    if "failed" in row:
        return f"{label} {row['failed']}"
    rates = f"{row['prefill_tokens_per_s']:10.0f}{row['decode_tokens_per_s']:10.0f}"
    return f"{label}{row['concurrency']:9}{rates}{row['roofline']:22.0%}"


def measure(side: str, name: str) -> list[dict[str, Any]]:
    """A row for each number of requests at a time; the first round warms up."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec, outputs, most = sizes(name)
    ask = (muster_side if side.startswith("muster") else transformers_side)(side, spec, most, outputs, device)
    rows = []
    for concurrency in [n for n in CONCURRENCY if n <= most]:
        prompts = prompts_of(spec, concurrency)
        ask(prompts, outputs)
        answers, first_s, rest_s = ask(prompts, outputs)
        assert all(len(answer) == outputs for answer in answers)
        rows.append(
            {
                "concurrency": concurrency,
                "prefill_tokens_per_s": concurrency * PROMPT_TOKENS / first_s,
                "decode_tokens_per_s": concurrency * (outputs - 1) / rest_s,
            }
        )
    return rows


def sizes(name: str) -> tuple[TransformerSpec, int, int]:
    """The shape, tokens of an answer, and requests at a time at most."""
    return (TINY, 24, 8) if name == "tiny" else (PRESETS[name], OUTPUT_TOKENS, max(CONCURRENCY))


def prompts_of(spec: TransformerSpec, count: int) -> list[list[int]]:
    """Random tokens, the same on all sides."""
    generator = torch.Generator().manual_seed(0)
    prompts: list[list[int]] = torch.randint(
        0, spec.vocab, (count, PROMPT_TOKENS), generator=generator
    ).tolist()
    return prompts


def muster_side(side: str, spec: TransformerSpec, most: int, outputs: int, device: torch.device) -> Ask:
    """The engine's own loop; "eager" without graphs. First compared with the plain operations."""
    from muster.serve.engine.core import Core
    from muster.serve.engine.graphs import GraphedNetwork
    from muster.serve.engine.network import TransformerNetwork
    from muster.serve.engine.packed import pack_model
    from muster.serve.kernels.ops import choose_kernels
    from muster.serve.kernels.reference import Reference
    from muster.serve.protocol import Request, SamplingParams, Token

    packed = pack_model(muster_model(spec, device), "bf16", packed=False)
    blocks = most * -(-(PROMPT_TOKENS + outputs) // BLOCK_TOKENS) + 1

    def core_of(network: TransformerNetwork) -> Core:
        return Core(
            network, network.new_cache(blocks, BLOCK_TOKENS), streams=most, step_tokens=2048,
            context_tokens=PROMPT_TOKENS + outputs, prefix_cache=False,
        )  # fmt: skip

    def generate(
        core: Core, prompts: list[list[int]], outputs: int
    ) -> tuple[list[list[Token]], float, float]:
        """Answers, seconds to all first tokens, and seconds after that."""
        answers: list[list[Token]] = [[] for _ in prompts]
        for number, prompt in enumerate(prompts):
            params = SamplingParams(
                max_tokens=outputs, temperature=0.0, logprobs=0 if outputs == COMPARED_TOKENS else None
            )
            core.add(Request(id=str(number), prompt=prompt, params=params))
        started_s = time.perf_counter()
        first_s = 0.0
        while core.busy:
            for id, token in core.step().items:
                if not isinstance(token, Token):
                    raise token
                answers[int(id)].append(token)
            if not first_s and all(answers):
                first_s = time.perf_counter() - started_s
        return answers, first_s, time.perf_counter() - started_s - first_s

    def ask(prompts: list[list[int]], outputs: int) -> tuple[list[list[int]], float, float]:
        answers, first_s, rest_s = generate(core, prompts, outputs)
        return [[token.id for token in answer] for answer in answers], first_s, rest_s

    kernels, _ = choose_kernels(torch.bfloat16, device)
    core = core_of((TransformerNetwork if side == "muster eager" else GraphedNetwork)(packed, kernels))
    plain = core_of(TransformerNetwork(packed, Reference(torch.bfloat16, device)))
    prompts = prompts_of(spec, min(most, 8))
    pairs = zip(*(generate(one, prompts, COMPARED_TOKENS)[0] for one in (core, plain)), strict=True)
    worst = max(difference(mine, theirs) for mine, theirs in pairs)
    if worst > TOLERANCE:
        raise SystemExit(f"log-probabilities differ by {worst:.2f} from the plain operations'")
    return ask


def difference(mine: list[Any], theirs: list[Any]) -> float:
    """Of two answers' log-probabilities, up to the first token that differs: from there on the texts are others."""
    worst = 0.0
    for one, other in zip(mine, theirs, strict=True):
        worst = max(worst, abs(one.logprob - other.logprob))
        if one.id != other.id:
            break
    return worst


def muster_model(spec: TransformerSpec, device: torch.device) -> Transformer:
    def value(name: str, shape: torch.Size) -> Tensor:
        made = torch.empty(shape, device=device, dtype=torch.bfloat16)
        return made.fill_(1) if "norm" in name else made.normal_(0, 0.02)

    return materialize(spec, value, dtype=torch.bfloat16, device=device)


def transformers_side(side: str, spec: TransformerSpec, most: int, outputs: int, device: torch.device) -> Ask:
    """`generate` on one batch; "compiled" with the static cache, which it compiles for."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=spec.vocab, hidden_size=spec.width, intermediate_size=spec.ffn, num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads, num_key_value_heads=spec.kv_heads, head_dim=spec.head_dim,
        max_position_embeddings=spec.context, tie_word_embeddings=spec.tied, attn_implementation="sdpa",
    )  # fmt: skip
    with device:
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    more = {"cache_implementation": "static"} if "compiled" in side else {}

    class Clock(transformers.StoppingCriteria):  # type: ignore[misc]
        """Called after each token of the batch; stops nothing."""

        def __init__(self) -> None:
            self.first_s: float | None = None

        def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            if self.first_s is None:
                synchronize(device)
                self.first_s = time.perf_counter()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    @torch.inference_mode()
    def ask(prompts: list[list[int]], outputs: int) -> tuple[list[list[int]], float, float]:
        batch = torch.tensor(prompts, device=device)
        clock, started_s = Clock(), time.perf_counter()
        ids = model.generate(
            batch, attention_mask=torch.ones_like(batch), do_sample=False, max_new_tokens=outputs,
            min_new_tokens=outputs, stopping_criteria=transformers.StoppingCriteriaList([clock]), pad_token_id=0,
            **more,
        )  # fmt: skip
        answers: list[list[int]] = ids[:, batch.shape[1] :].tolist()
        assert clock.first_s is not None
        return answers, clock.first_s - started_s, time.perf_counter() - clock.first_s

    return ask


def roofline(name: str, concurrency: int, bandwidth: float) -> float:
    """Tokens/s if a step took as long as reading what it must: weights once, each sequence's keys and values."""
    spec, outputs, _ = sizes(name)
    weights = spec.parameters() - (0 if spec.tied else spec.vocab * spec.width)  # of the embedding a few rows
    token_bytes = 2 * spec.layers * spec.kv_heads * spec.head_dim * 2
    step_bytes = 2 * weights + concurrency * (PROMPT_TOKENS + outputs / 2) * token_bytes
    return concurrency * bandwidth / step_bytes


def read_bandwidth(device: torch.device) -> float:
    """Bytes/s at which a sum reads a large tensor: the best of several."""
    size = 2**32 if device.type == "cuda" else 2**26
    numbers = torch.ones(size // 4, device=device)
    best_s = float("inf")
    for _ in range(8):
        synchronize(device)
        started_s = time.perf_counter()
        numbers.sum()
        synchronize(device)
        best_s = min(best_s, time.perf_counter() - started_s)
    return size / best_s


if __name__ == "__main__":
    main()
