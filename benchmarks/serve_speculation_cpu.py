"""What guessing ahead gains one request on a trained model, and that it changes no token.

    python benchmarks/serve_speculation_cpu.py MODEL [--draft ngram|MODEL] [--formats bf16 int8 int4] [--json FILE]

MODEL is a run's folder. Prompts are the beginnings of files that it was not trained on (by default the tests of this
Python's standard library); each is continued greedily, alone, by our engine without and with guesses, in turn, and the
best of the rounds counts. Guessing is on as `muster serve --draft` has it: where the engine measures that it pays.
"""

from __future__ import annotations

import argparse
import json
import os
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cells import machine

from muster.export.trained import load_trained
from muster.model.config_json import read_spec
from muster.serve.engine.core import Core
from muster.serve.opening import Setup, build_core, choose_threads
from muster.serve.protocol import Request, SamplingParams, Token

GOAL = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--draft", default="ngram")
    parser.add_argument("--formats", nargs="+", default=["bf16", "int8", "int4"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", type=Path, nargs="+")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = weights(arguments.model)
    spec = read_spec(folder)
    threads, _ = choose_threads(spec.parameters())
    torch.set_num_threads(threads)
    prompts = beginnings(arguments)
    print(
        f"{spec.parameters() / 1e6:.1f} M parameters, {threads} threads, draft {arguments.draft}, "
        f"{len(prompts)} prompts of {arguments.prompt_tokens} tokens, {arguments.output_tokens} to generate"
    )
    print(f"{'format':>6}{'without':>12}{'with':>12}{'ratio':>8}{'accepted':>10}  same tokens")
    rows = []
    for format in arguments.formats:
        cores = {
            draft: build_core(
                Setup(
                    folder=str(folder),
                    dtype=format,
                    streams=1,
                    context_tokens=spec.context,
                    vocab=spec.vocab,
                    threads=threads,
                    draft=draft and (draft if draft == "ngram" else str(weights(Path(draft)))),
                )
            )
            for draft in (None, arguments.draft)
        }
        rows.append(compare(cores, prompts, arguments) | {"format": format})
        row = rows[-1]
        print(f"{format:>6}{row['plain_tokens_per_s']:12.1f}{row['drafted_tokens_per_s']:12.1f}{row['ratio']:7.2f}x"
              f"{row['accepted_share']:10.0%}  {'yes' if row['same'] else 'NO'}", flush=True)  # fmt: skip
    if arguments.json:
        setup = {k: str(v) for k, v in vars(arguments).items() if k != "json"}
        result = {
            "machine": machine(),
            "load": os.getloadavg()[0],
            "setup": setup,
            "goal": GOAL,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def weights(model: Path) -> Path:
    """The folder in Hugging Face layout of a run, or itself."""
    return model / "hf" if (model / "hf").is_dir() else model


def beginnings(arguments: argparse.Namespace) -> list[tuple[int, ...]]:
    """Of files, each cut somewhere into its code."""
    trained = load_trained(arguments.model)
    default = sorted(Path(sysconfig.get_path("stdlib")).glob("test/test_*.py"))
    files: Sequence[Path] = arguments.text or default[:: max(len(default) // arguments.prompts, 1)]
    texts = (path.read_text("utf-8", errors="replace")[1000:4000] for path in files[: arguments.prompts])
    return [tuple(trained.tokenizer.encode(text)[: arguments.prompt_tokens]) for text in texts]


def compare(
    cores: dict[str | None, Core], prompts: Sequence[tuple[int, ...]], arguments: argparse.Namespace
) -> dict[str, Any]:
    best: dict[str | None, float] = dict.fromkeys(cores, float("inf"))
    outputs: dict[str | None, list[list[int]]] = {}
    for number in range(1 + arguments.rounds):  # the first one warms up
        for draft, core in cores.items():
            begun_s = time.perf_counter()
            outputs[draft] = [generate(core, prompt, arguments.output_tokens) for prompt in prompts]
            if number:
                best[draft] = min(best[draft], time.perf_counter() - begun_s)
    plain, drafted = cores
    tokens, stats = len(prompts) * arguments.output_tokens, cores[drafted].stats()
    return {
        "plain_tokens_per_s": tokens / best[plain],
        "drafted_tokens_per_s": tokens / best[drafted],
        "ratio": best[plain] / best[drafted],
        "accepted_share": stats.accepted_tokens / max(stats.draft_tokens, 1),
        "same": outputs[plain] == outputs[drafted],
    }


def generate(core: Core, prompt: tuple[int, ...], tokens: int) -> list[int]:
    core.add(Request(id="0", prompt=prompt, params=SamplingParams(max_tokens=tokens, temperature=0.0)))
    found: list[int] = []
    while core.busy:
        for _, token in core.step().items:
            assert isinstance(token, Token), token
            found.append(token.id)
    return found


if __name__ == "__main__":
    main()
