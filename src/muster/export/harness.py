"""lm-eval tasks on an exported folder, behind the 'eval' extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from muster.errors import MissingExtra


def run_tasks(folder: Path, tasks: Sequence[str]) -> dict[str, Any]:
    """Results of lm-eval's `tasks` on the model in `folder` (Hugging Face layout), by task."""
    try:
        import lm_eval
    except ImportError:
        raise MissingExtra("muster eval --tasks", "eval") from None
    done = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={folder},dtype=float32", tasks=list(tasks)
    )
    results: dict[str, Any] = done["results"]
    return results
