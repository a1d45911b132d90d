"""Every command in the README runs, and prints lines of the kind that the README shows."""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_readme_sessions_run_as_shown(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "scripts" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    sessions = readme.sessions((ROOT / "README.md").read_text())
    assert sum(len(session) for session in sessions) >= 6
    with ExitStack() as stack:
        for session in sessions:
            for command in session:
                code, output = readme.run(command, tmp_path, stack)
                assert code == 0, f"{command.text}:\n{output}"
                assert readme.shape(output) == readme.shape(command.output), f"{command.text}:\n{output}"
