"""A virtual environment for a peer, so that what it wants installed changes nothing of ours."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TORCH = "torch==2.13.0"
"""Also a constraint: converters that may choose take a build of several gigabytes."""


def environment(folder: Path, packages: Sequence[str], *, without: Sequence[str] = ()) -> Path:
    """The environment's Python, with the packages, which are installed where they were not yet; `without` are
    dependencies of theirs that do harm."""
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join([TORCH, *packages]) + "\n"
    if not stamp.is_file() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        limits = folder / "constraints.txt"
        limits.write_text(f"{TORCH}\n")
        install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(limits)]
        # torch first and alone, so that nothing else decides which build of it is taken.
        subprocess.run([*install, TORCH], check=True)
        subprocess.run([*install, TORCH, *packages], check=True)
        if without:
            subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *without], check=True)
        stamp.write_text(wanted)
    return python
