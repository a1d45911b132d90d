"""Weights to a folder in Hugging Face layout: written aside, checked in `transformers`, then put in place.

`muster.json` is written last and holds where the weights came from, the parity figures, and
the SHA-256 of every other file and of itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import muster
from muster.checkpoint.sealed import seal
from muster.config.schema import Parity
from muster.errors import UsageError
from muster.export.parity import ParityReport, check_logits, logits_of, require_transformers
from muster.model.config_json import PACKED_PREFIX
from muster.model.folder import write_files
from muster.model.spec import TransformerSpec
from muster.model.staging import staged
from muster.model.transformer import materialize

RECORD = "muster.json"


class Tokenizer(Protocol):
    """What an export needs of a tokenizer."""

    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    def save(self, folder: Path) -> None: ...


def export_hf(
    state: Mapping[str, Tensor],
    spec: TransformerSpec,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    dtype: torch.dtype,
    limits: Parity,
    probe_tokens: Tensor,
    provenance: Mapping[str, Any],
) -> ParityReport:
    """Write `state` (whole parameters by name) as `dtype` to `folder`, replacing an earlier export there.

    The written folder is loaded in transformers and compared, on probe_tokens (B, T), with what
    our transformer computes from `state` rounded to `dtype`. Where that fails (ParityError), or
    anything else does, `folder` is as it was. Raises UsageError for a folder that holds more
    than an export, and MissingExtra without transformers.
    """
    require_transformers()
    _refuse_other_files(folder)
    with staged(folder, replace=True) as draft:
        write_files(state, spec, draft, dtype=dtype, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
        tokenizer.save(draft)
        # Our logits first, so that only one of the two models is in memory at a time.
        expected = logits_of(materialize(spec, lambda name, shape: state[name].to(dtype)), probe_tokens)
        report = check_logits(expected, draft, probe_tokens, limits)
        record = {
            "muster": muster.__version__,
            "format": "hf",
            "dtype": str(dtype).removeprefix("torch."),
            "parameters": spec.parameters(),
            "provenance": dict(provenance),
            "parity": asdict(report),
            "sha256": {path.name: _sha256(path) for path in sorted(draft.iterdir())},
        }
        (draft / RECORD).write_bytes(seal(record))
    return report


def _refuse_other_files(folder: Path) -> None:
    """Replacing a folder deletes it, so everything in it has to be of an earlier export."""
    if not folder.is_dir():
        return
    present = {path.name for path in folder.iterdir() if not path.name.startswith(PACKED_PREFIX)}
    try:
        known = {RECORD, *json.loads((folder / RECORD).read_text("utf-8"))["sha256"]} if present else set()
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{folder} holds files but no {RECORD} of an export: choose another folder, or remove it"
        ) from None
    if present - known:
        raise UsageError(
            f"{folder} also holds '{min(present - known)}', which is not of the export there: move it away, "
            f"or export to another folder"
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
