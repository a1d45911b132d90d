"""What the config.json of a folder in Hugging Face layout says. Knows no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from muster.errors import UsageError
from muster.model.families import spec_of
from muster.model.spec import TransformerSpec

PACKED_PREFIX = "muster-packed-"
"""How files begin that serving makes of a model and keeps beside it; they can be made again."""


def read_spec(folder: Path) -> TransformerSpec:
    """The specification of the model in `folder`."""
    config = read_object(folder / "config.json", "a folder in Hugging Face layout has one")
    try:
        return spec_of(config)
    except UsageError as error:
        raise UsageError(f"{folder / 'config.json'}: {error}") from None


def read_object(path: Path, hint: str) -> dict[str, Any]:
    """The JSON object in a file; raises UsageError, with the `hint` where there is no such file."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file; {hint}") from None
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} should hold a JSON object")
    return content
