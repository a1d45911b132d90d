"""`muster schema`: the JSON Schema of the run file, for editors."""

from __future__ import annotations

import json
import sys


def schema() -> None:
    """Print the JSON Schema of the run file, so that an editor completes and checks it."""
    from muster.config.load import run_schema

    sys.stdout.write(json.dumps(run_schema(), indent=2) + "\n")
