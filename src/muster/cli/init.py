"""`muster init`: a commented run file to start from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from muster.errors import UsageError


def init(name: str, *, template: Literal["tiny", "small", "finetune"] = "tiny") -> None:
    """Write NAME.yaml, a run file in which every key is explained.

    Parameters
    ----------
    name
        Name of the run, and of the file before .yaml.
    template
        tiny: minutes on a laptop; small: hours; finetune: starts from a Hugging Face folder.
    """
    from muster.config.load import load_run
    from muster.config.template import render

    target = Path(f"{name}.yaml")
    if target.exists():
        raise UsageError(f"{target} exists: choose another name, or delete it")
    draft = target.with_name(f".{target.name}.partial")
    draft.write_text(render(target.stem, template))
    try:
        load_run(draft)
        draft.rename(target)
    finally:
        draft.unlink(missing_ok=True)
    sys.stdout.write(f"wrote {target}; next: muster train {target}\n")
