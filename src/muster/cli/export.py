"""`muster export`: a trained run as an artifact that others can load, checked before it is kept."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from muster.model.spec import TransformerSpec

_PROBE_ROWS, _PROBE_TOKENS = 8, 256


def export(run_folder: Path, *, to: Literal["hf"] = "hf", out: Path | None = None) -> None:
    """Export a run's newest sound checkpoint, and check the export's numbers against the trained model's.

    Exit code 4 where they differ; an older export then stays as it was.

    Parameters
    ----------
    run_folder
        The run's folder, such as runs/NAME.
    to
        hf: a folder in Hugging Face layout.
    out
        Where to write it. Default: RUN_FOLDER/hf.
    """
    from muster.cli._runs import read_run

    run = read_run(run_folder)

    import torch

    from muster.export.hf import export_hf
    from muster.export.trained import load_trained
    from muster.model.transformer import named_tensors

    trained = load_trained(run_folder)
    for sentence in trained.damaged:
        sys.stderr.write(f"muster: {sentence}\n")
    spec, content = trained.model.spec, trained.manifest
    target = out or run_folder / to
    report = export_hf(
        dict(named_tensors(trained.model)),
        spec,
        trained.tokenizer,
        target,
        dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[run.export.dtype or run.train.precision],
        limits=run.export.parity,
        probe_tokens=probe_of(spec),
        provenance={
            "run": run.name,
            "run_digest": content.digest,
            "checkpoint": trained.checkpoint.name,
            "step": content.step,
            "tokens": content.tokens,
        },
    )
    sys.stdout.write(f"exported {target} from {trained.checkpoint.name}\nparity   {report.line()}: ok\n")


def probe_of(spec: TransformerSpec) -> Tensor:
    """The tokens (B, T) that an export is checked on."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(spec.vocab, (_PROBE_ROWS, min(_PROBE_TOKENS, spec.context)), generator=generator)
