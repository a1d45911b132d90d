"""A model and its draft from two run files: one tokenizer, the same tokens sooner."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path

from muster.config.load import load_run
from muster.serve.opening import open_model
from muster.serve.protocol import Engine, Request, SamplingParams
from tests.conftest import RunRanks
from tests.toy import tiny, train_here, write_corpus

RECIPES = Path(__file__).parents[2] / "recipes"


def test_the_recipes_of_a_model_and_its_draft_read_the_same_data() -> None:
    """So their tokenizers are the same: one is a function of the documents and of its own settings."""
    target, draft = (load_run(RECIPES / f"stdlib-{name}.yaml") for name in ("small", "draft"))
    assert target.data == draft.data
    assert draft.model.context == target.model.context


def test_a_draft_that_was_trained_beside_its_model(tmp_path: Path, run_ranks: RunRanks) -> None:
    write_corpus(tmp_path)
    data = {"train": [{"files": "*.py"}], "held_out": 0.1, "tokenizer": {"train": "bpe", "vocab": 320}}
    budget = {"tokens": 40 * 512, "batch_tokens": 512, "precision": "fp32", "optimizer": {"lr": 1e-2}}
    target = tiny(data=data, train=budget)
    small = target["model"] | {"layers": 1, "width": 16, "heads": 2, "kv_heads": 1}
    folders = tmp_path / "first" / "target", tmp_path / "second" / "draft"  # nothing shared, no cache either
    for folder, run in zip(folders, (target, target | {"name": "draft", "model": small}), strict=True):
        run_ranks(1, train_here, run, str(tmp_path), str(folder))
    tokenizers = [(folder / "tokenizer" / "tokenizer.json").read_bytes() for folder in folders]
    assert tokenizers[0] == tokenizers[1]

    async def said(engine: Engine) -> list[list[int]]:
        params = SamplingParams(max_tokens=20, temperature=0.0)
        found = []
        for number in range(4):
            request = Request(id=str(number), prompt=(number + 40, 70, 71), params=params)
            found.append([token.id async for token in engine.submit(request)])
        return found

    answers = []
    for draft in (None, str(folders[1])):
        opened = open_model(folders[0], dtype="fp32", draft=draft)
        with closing(opened.engine):
            answers.append(asyncio.run(said(opened.engine)))
            stats = opened.engine.stats()
    assert answers[0] == answers[1]
    assert stats.draft_tokens >= stats.accepted_tokens > 0
    assert stats.steps < stats.generated_tokens
