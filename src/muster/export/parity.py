"""Does `transformers` compute from a Hugging Face folder what we compute? Both in fp32, logit by logit.

Knows nothing of how the folder came to be; `hf.py` writes one and asks here before keeping it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muster.config.schema import Parity
from muster.errors import MissingExtra, ParityError
from muster.model.folder import load_folder
from muster.model.transformer import Transformer


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityReport:
    """How far two models' logits are apart over some token positions."""

    max_logit_diff: float
    mean_logit_diff: float
    top1: float
    """Share of positions whose most likely token agrees, 0 to 1."""
    positions: int

    def line(self) -> str:
        """The figures for people, in one line."""
        return (
            f"max |logit difference| {self.max_logit_diff:.2e}, mean {self.mean_logit_diff:.2e}, "
            f"top-1 agreement {self.top1:.2%} over {self.positions:,} positions"
        )


def check_folder(folder: Path, tokens: Tensor, limits: Parity) -> ParityReport:
    """Compare the two implementations of the model in `folder` on tokens (B, T); see `check_logits`."""
    require_transformers()
    return check_logits(logits_of(load_folder(folder), tokens), folder, tokens, limits)


def check_logits(expected: Tensor, folder: Path, tokens: Tensor, limits: Parity) -> ParityReport:
    """Compare what `transformers` makes of the folder for tokens (B, T) with `expected` logits (B, T, V).

    Raises ParityError beyond `limits`; logits that are not finite are beyond any.
    """
    report = _compare(expected, _transformers_logits(folder, tokens))
    # Written so that nan fails.
    if not (report.max_logit_diff <= limits.max_logit_diff and report.top1 >= limits.top1):
        raise ParityError(
            f"transformers computes other numbers than muster: {report.line()}; allowed are "
            f"{limits.max_logit_diff:.2e} and {limits.top1:.2%}: report it with this model's shape, or relax "
            f"export.parity if the difference is expected"
        )
    return report


@torch.no_grad()
def logits_of(model: Transformer, tokens: Tensor) -> Tensor:
    """Logits (B, T, V) in fp32 for tokens (B, T)."""
    logits: Tensor = model(tokens.to(next(model.parameters()).device))
    return logits.float().cpu()


def require_transformers() -> Any:
    """The `transformers` module; MissingExtra where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise MissingExtra("the parity check", "hf") from None
    return transformers


@torch.no_grad()
def _transformers_logits(folder: Path, tokens: Tensor) -> Tensor:
    transformers = require_transformers()
    with _quiet(transformers):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
        ).eval()
    logits: Tensor = model(tokens.cpu(), use_cache=False).logits
    return logits


def _compare(expected: Tensor, logits: Tensor) -> ParityReport:
    if expected.shape != logits.shape:
        raise ParityError(
            f"transformers gives logits of shape {tuple(logits.shape)}, muster {tuple(expected.shape)}: "
            f"the folder holds another model"
        )
    difference = (logits.float() - expected).abs()  # (B, T, V)
    return ParityReport(
        max_logit_diff=float(difference.max()),
        mean_logit_diff=float(difference.mean()),
        top1=float((logits.argmax(-1) == expected.argmax(-1)).float().mean()),
        positions=expected.shape[:-1].numel(),
    )


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without its progress bars and load report, which would tear ours."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
