"""Everything about a run that is decided before a rank starts, and the sums that follow from it.

Made once by the command line, and again by each rank from the same files: a pure function
of the run file, the tokenizer and the machine, so all agree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from muster.config import schema
from muster.data.dataset import Corpus, prepare
from muster.data.progress import Progress
from muster.data.sampler import Sampler
from muster.model.attend import training_kernel
from muster.model.build import balance_from_config, spec_from_config
from muster.model.spec import TransformerSpec
from muster.parallel.layout import Layout, resolve
from muster.parallel.world import usable_cores
from muster.train import origin


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What is trained, on which layout: all that a step needs to know besides its batch."""

    run: schema.Run
    folder: Path
    """The run's own folder."""
    spec: TransformerSpec
    layout: Layout
    model_folder: Path | None
    """The folder in Hugging Face layout that `model.from` names."""
    sequence: int
    """Tokens of one sample."""
    steps: int
    """Optimizer steps of the whole run."""
    trained: Path | None = None
    """The run or checkpoint of ours that `model.from` names."""

    @property
    def sequences_per_batch(self) -> int:
        return self.run.train.batch_tokens // self.sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan(Training):
    """The whole run: its training and its data."""

    base: Path
    """Folder of the run file, which relative paths start from."""
    corpus: Corpus
    attention: str
    """What runs attention in training, and why."""


def make(
    run: schema.Run,
    *,
    base: Path,
    folder: Path,
    gpus: int,
    ranks: int | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Check a run against its files and this machine, tokenise what is missing, and decide the layout.

    `base` is the run file's folder, `folder` the run's own; `ranks` the world size where somebody
    else has started the ranks. Errors are the user's to mend: nothing has been started yet.
    """
    # Sizes and layout before the corpus is read, which can take long; any vocabulary does for that.
    draft = spec_from_config(run.model, 1, base, origin.read_spec)
    balance_from_config(run.train.balance, draft)
    layout = resolve(run, draft, cores=usable_cores(), gpus=gpus, ranks=ranks)
    start = None if run.model.from_ is None else (base / Path(run.model.from_).expanduser()).resolve()
    data = run.data
    if data.tokenizer is None:
        data = replace(data, tokenizer="byte" if start is None else str(origin.tokenizer_of(start)))
    corpus = prepare(data, base, folder.parent / "cache", progress=progress)
    spec = spec_from_config(run.model, corpus.tokenizer.vocab, base, origin.read_spec)
    ours = start is not None and origin.is_ours(start)
    sequence = run.train.sequence or spec.context
    Sampler(corpus, sequence, run.train.seed)  # refuses a source too small for one sample
    return Plan(
        run=run,
        base=base,
        folder=folder,
        corpus=corpus,
        spec=spec,
        layout=layout,
        attention=_attention(layout, sequence, "cuda" if gpus else "cpu"),
        model_folder=None if ours else start,
        trained=start if ours else None,
        sequence=sequence,
        steps=run.train.tokens // run.train.batch_tokens,
    )


def _attention(layout: Layout, sequence: int, device: str) -> str:
    if layout.context > 1 and layout.context_kind == "ring":
        return f"ring over {layout.context} ranks (layout: context)"
    kernel, reason = training_kernel(sequence, device)
    return f"{kernel} ({reason})"
