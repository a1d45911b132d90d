from __future__ import annotations

from collections.abc import Callable

import pytest

from muster.cli import main

Muster = Callable[..., tuple[int, str, str]]


@pytest.fixture
def muster(capsys: pytest.CaptureFixture[str]) -> Muster:
    """`muster(*arguments)` runs the command in this process: (exit code, stdout, stderr)."""

    def muster(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return int(str(ended.value.code)), said.out, said.err

    return muster
