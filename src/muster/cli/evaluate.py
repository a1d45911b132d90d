"""`muster eval`: how well a model predicts text, in figures that compare across tokenizers."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from muster.data.stream import TokenStream

_BATCH_TOKENS = 4096


def evaluate(path: Path, *files: str, json_: bool = False, tasks: str | None = None) -> None:
    """Perplexity and bits per byte of a model on files.

    Parameters
    ----------
    path
        A run folder (its newest checkpoint is evaluated), or a folder in Hugging Face layout.
    files
        Globs of text to score. Default, for a run: its own held-out documents.
    json_
        Print JSON instead of a line.
    tasks
        Comma-separated lm-eval tasks to run on the model's Hugging Face folder instead (needs the 'eval' extra).
    """
    from muster.errors import UsageError

    if tasks is not None:
        from muster.export.harness import run_tasks

        folder = path / "hf" if (path / "run.json").is_file() else path
        results = run_tasks(folder, tasks.split(","))
        sys.stdout.write(json.dumps(results, indent=1) + "\n")
        return
    is_run = (path / "run.json").is_file()
    if not files and not is_run:
        raise UsageError(f"{path} is not a run, so it has no held-out documents: name the files to score")
    import torch

    from muster.cli._runs import read_run
    from muster.data.evaluation import EvaluationBatches
    from muster.data.tokenizer import Tokenizer
    from muster.export.trained import load_trained
    from muster.model.folder import load_folder
    from muster.parallel.world import World, usable_cores
    from muster.train import evaluate as evaluation
    from muster.train.forward import summed_loss

    torch.set_num_threads(usable_cores())
    if is_run:
        run, trained = read_run(path), load_trained(path)
        model, tokenizer = trained.model, trained.tokenizer
        sequence, masked = run.train.sequence or model.spec.context, run.data.mask_documents
    else:
        model, tokenizer = load_folder(path), Tokenizer.from_file(path)
        sequence, masked = model.spec.context, True
    with _streams(path, files) as streams:
        batches = EvaluationBatches(streams, tokenizer, sequence, max(_BATCH_TOKENS // sequence, 1))
        device = torch.device("cpu")
        figures = evaluation.evaluate(
            lambda some: summed_loss(model, some[0], device, mask_documents=masked),
            batches,
            World(0, 1, device),
        )
    if json_:
        facts = {
            "loss": figures.loss,
            "perplexity": figures.perplexity,
            "bits_per_byte": figures.bits_per_byte,
        }
        sys.stdout.write(json.dumps(facts | {"tokens": figures.tokens, "bytes": figures.bytes}) + "\n")
        return
    sys.stdout.write(
        f"loss {figures.loss:.4f}  perplexity {figures.perplexity:.3f}  bits per byte {figures.bits_per_byte:.4f}  "
        f"({figures.tokens} tokens, {figures.bytes} bytes)\n"
    )


@contextmanager
def _streams(path: Path, files: Sequence[str]) -> Iterator[Sequence[TokenStream]]:
    """The text to score as token streams: the named files', or the run's held-out documents."""
    from muster.cli._runs import read_run
    from muster.config import schema
    from muster.data.dataset import prepare
    from muster.errors import UsageError

    if not files:
        record = json.loads((path / "run.json").read_text())
        held_out = prepare(read_run(path).data, Path(record["base"]), path.parent / "cache").held_out
        if not held_out:
            raise UsageError(
                f"{path} trained with held_out: 0, so nothing was kept out: name the files to score"
            )
        yield held_out
        return
    folder = path / "tokenizer" if (path / "run.json").is_file() else path
    with tempfile.TemporaryDirectory() as cache:
        source = schema.Source(files=list(files))
        section = schema.Data(train=[source], held_out=0.0, tokenizer=str(folder.resolve()))
        yield prepare(section, Path(), Path(cache)).train
