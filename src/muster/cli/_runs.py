"""What several verbs need: the resolved run file that a run folder carries."""

from __future__ import annotations

import json
from pathlib import Path

from muster.config.load import load_resolved
from muster.config.schema import Run
from muster.errors import UsageError


def read_run(folder: Path) -> Run:
    """The resolved run of a run folder; UsageError where it is none."""
    record = folder / "run.json"
    try:
        return load_resolved(json.loads(record.read_text())["run"])
    except FileNotFoundError:
        raise UsageError(
            f"{folder} is no run folder: it has no run.json; `muster runs` lists the runs"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{record} cannot be read ({error}): restore that file") from None
