"""Every command in the README runs, and prints lines of the kind that the README shows."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from scripts import readme


@pytest.mark.timeout(600)
def test_readme_sessions_run_as_shown(tmp_path: Path) -> None:
    sessions = readme.sessions(readme.README.read_text())
    assert sum(len(session) for session in sessions) >= 6
    with ExitStack() as stack:
        for session in sessions:
            for command in session:
                code, output = readme.run(command, tmp_path, stack)
                assert code == 0, f"{command.text}:\n{output}"
                assert readme.shape(output) == readme.shape(command.output), f"{command.text}:\n{output}"
