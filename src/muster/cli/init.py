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
    from muster.config.load import parse_run
    from muster.config.template import render

    target = Path(f"{name.removesuffix('.yaml')}.yaml")
    text = render(target.stem, template, str(target))
    parse_run(text, str(target))  # what it writes is right, unless the name cannot be one
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{target} exists: choose another name, or delete it") from None
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise UsageError(
            f"cannot write {target} ({error.strerror}): choose a folder that can be written"
        ) from None
    sys.stdout.write(f"wrote {target}; next: muster train {target}\n")
