"""What guessing ahead gains one request on a trained model, and that it changes no token.

    python benchmarks/serve_speculation_cpu.py [MODEL --draft ngram|MODEL ...] [--formats bf16 int8 int4] [--json FILE]

Without MODEL: recipes/stdlib-small.yaml with the text itself and recipes/stdlib-draft.yaml as drafts, trained first
where they are not in --runs yet. Prompts are the beginnings of files that none was trained on (by default the tests of
this Python's standard library); each is continued greedily, alone, by our engine without guesses and with each draft's,
in turn, and the best of the rounds counts. Guessing is as `muster serve --draft` has it: where the engine measures that
it pays, and as far ahead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from cells import machine

from muster.data.tokenizer import Tokenizer
from muster.serve.engine.core import Core
from muster.serve.folders import Source, find_source, read_spec
from muster.serve.opening import NGRAM, Setup, build_core, choose_threads
from muster.serve.protocol import Request, SamplingParams, Token

GOAL = 1.5
ROOT = Path(__file__).parent.parent
RECIPE, DRAFT_RECIPE = ROOT / "recipes" / "stdlib-small.yaml", ROOT / "recipes" / "stdlib-draft.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--draft", nargs="+")
    parser.add_argument("--runs", type=Path, default=ROOT / "build" / "speculation")
    parser.add_argument("--formats", nargs="+", default=["bf16", "int8", "int4"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", type=Path, nargs="+")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = find_source(arguments.model or trained(RECIPE, arguments.runs))
    drafts = arguments.draft or [NGRAM]
    if arguments.model is None and arguments.draft is None:
        drafts.append(str(trained(DRAFT_RECIPE, arguments.runs)))
    folders = {draft: str(draft if draft == NGRAM else find_source(Path(draft)).weights) for draft in drafts}
    spec = read_spec(model.weights)
    threads, _ = choose_threads(spec.parameters())
    torch.set_num_threads(threads)
    prompts = beginnings(model, arguments)
    print(
        f"{model.name}: {spec.parameters() / 1e6:.1f} M parameters, {threads} threads, "
        f"{len(prompts)} prompts of {arguments.prompt_tokens} tokens, {arguments.output_tokens} to generate"
    )
    print(f"{'format':>6}  {'draft':<16}{'without':>9}{'with':>9}{'ratio':>8}{'accepted':>10}  same tokens")
    rows = []
    for format in arguments.formats:
        cores = {
            draft: build_core(setup(model, weights, format, threads))
            for draft, weights in [(None, None), *folders.items()]
        }
        for row in compare(cores, prompts, arguments):
            rows.append({"format": format, **row})
            print(
                f"{format:>6}  {row['draft']:<16}{row['plain_tokens_per_s']:9.1f}{row['drafted_tokens_per_s']:9.1f}"
                f"{row['ratio']:7.2f}x{row['accepted_share']:10.0%}  {'yes' if row['same'] else 'NO'}",
                flush=True,
            )
    if arguments.json:
        result = {"machine": machine(), "date": date.today().isoformat(), "torch": version("torch"),
                  "load": os.getloadavg()[0], "model": model.name, "parameters": spec.parameters(), "step": model.step,
                  "draft_parameters": {Path(draft).name: read_spec(Path(folder)).parameters()
                                       for draft, folder in folders.items() if draft != NGRAM},
                  "prompts": arguments.prompts, "prompt_tokens": arguments.prompt_tokens,
                  "output_tokens": arguments.output_tokens, "goal": GOAL, "rows": rows}  # fmt: skip
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def trained(recipe: Path, runs: Path) -> Path:
    """The run of a recipe, trained to its end if it is not yet."""
    subprocess.run(
        [sys.executable, "-m", "muster", "train", str(recipe), "--runs", str(runs)],
        check=True,
        stdout=sys.stderr,
    )
    return runs / recipe.stem


def setup(model: Source, draft: str | None, format: Any, threads: int) -> Setup:
    """One request at a time."""
    spec = read_spec(model.weights)
    return Setup(
        folder=str(model.weights),
        tokenizer=str(model.tokenizer),
        dtype=format,
        streams=1,
        context_tokens=spec.context,
        vocab=Tokenizer.from_file(model.tokenizer).vocab,
        threads=threads,
        draft=draft,
    )


def beginnings(model: Source, arguments: argparse.Namespace) -> list[tuple[int, ...]]:
    """Of files, each cut somewhere into its code."""
    tokenizer = Tokenizer.from_file(model.tokenizer)
    default = sorted(Path(sysconfig.get_path("stdlib")).glob("test/test_*.py"))
    files: Sequence[Path] = arguments.text or default[:: max(len(default) // arguments.prompts, 1)]
    texts = (path.read_text("utf-8", errors="replace")[1000:4000] for path in files[: arguments.prompts])
    return [tuple(tokenizer.encode(text)[: arguments.prompt_tokens]) for text in texts]


def compare(
    cores: dict[str | None, Core], prompts: Sequence[tuple[int, ...]], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Each draft beside no guesses."""
    best: dict[str | None, float] = dict.fromkeys(cores, float("inf"))
    outputs: dict[str | None, list[list[int]]] = {}
    for number in range(1 + arguments.rounds):  # the first one warms up
        for draft, core in cores.items():
            begun_s = time.perf_counter()
            outputs[draft] = [generate(core, prompt, arguments.output_tokens) for prompt in prompts]
            if number:
                best[draft] = min(best[draft], time.perf_counter() - begun_s)
    tokens = sum(map(len, outputs[None]))
    rows = []
    for draft, core in cores.items():
        if draft is not None:
            stats = core.stats()
            rows.append(
                {
                    "draft": Path(draft).name,
                    "plain_tokens_per_s": tokens / best[None],
                    "drafted_tokens_per_s": tokens / best[draft],
                    "ratio": best[None] / best[draft],
                    "accepted_share": stats.accepted_tokens / max(stats.draft_tokens, 1),
                    "tokens_per_step": stats.generated_tokens / stats.steps,
                    "same": outputs[None] == outputs[draft],
                }
            )
    return rows


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
