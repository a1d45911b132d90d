"""The command as a whole: it starts fast, and whatever goes wrong is one line and an exit code."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from muster import cli, errors

HEAVY = {"torch", "numpy", "pydantic", "transformers", "tokenizers", "fastapi", "ruamel"}


def run(
    *arguments: str, code: str = "from muster.cli import main; main()"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )


def test_help_names_every_verb_in_the_order_of_a_models_life() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split()[1:2] for line in done.stdout.splitlines() if line.startswith("│")]
    assert [words[0] for words in lines if words and words[0] in cli.VERBS] == list(cli.VERBS)
    assert run().stdout == done.stdout


@pytest.mark.parametrize("verb", [None, *cli.VERBS])
def test_help_imports_nothing_heavy(verb: str | None) -> None:
    code = (
        "import sys, atexit; from muster.cli import main\n"
        "atexit.register(lambda: sys.stderr.write(' '.join(m for m in sys.modules if '.' not in m)))\n"
        "main()"
    )
    done = run(*([verb] if verb else []), "--help", code=code)
    assert done.returncode == 0
    assert "Usage: muster" in done.stdout
    assert not HEAVY & set(done.stderr.split())


def test_help_costs_a_quarter_of_a_second_of_cpu_at_most() -> None:
    def cpu_s() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_s() for _ in range(5)) <= 0.25


def test_the_version() -> None:
    assert run("--version").stdout.startswith("muster 0.")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], 'Did you mean "train"?'),
        (["train"], "requires an argument"),
        (["runs", "--jsn"], "Did you mean --json?"),
        (["init", "x", "--template", "huge"], "tiny"),
        (["train", "nowhere.yaml"], "nowhere.yaml: there is no such file; `muster init NAME` writes one"),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_2(arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("muster: ")
    assert said in line


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    def failing(error: BaseException) -> None:
        """Make `muster schema` fail with `error`."""

        def schema() -> None:
            raise error

        module: Any = ModuleType("muster.cli.schema")
        module.schema = schema
        monkeypatch.setitem(sys.modules, "muster.cli.schema", module)

    return failing


@pytest.mark.parametrize(
    ("error", "exit_code", "said"),
    [
        (errors.ConfigError(["a.yaml:1: x", "a.yaml:2: y"]), 2, "muster: a.yaml:1: x\nmuster: a.yaml:2: y\n"),
        (errors.TrainingError("nan"), 1, "muster: nan\n"),
        (errors.DoesNotFit("too large"), 3, "muster: too large\n"),
        (errors.ParityError("off"), 4, "muster: off\n"),
        (errors.Preempted("stopped"), 75, "muster: stopped\n"),
        (KeyboardInterrupt(), 130, ""),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x"),
            3,
            "muster: no space left for runs/x: free some, then run the same command again\n",
        ),
    ],
)
def test_errors_end_in_their_exit_code(
    failing: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    exit_code: int,
    said: str,
) -> None:
    failing(error)
    with pytest.raises(SystemExit) as ended:
        cli.main(["schema"])
    assert ended.value.code == exit_code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("error", [RuntimeError("a bug"), PermissionError(errno.EACCES, "denied")])
def test_unknown_errors_keep_their_traceback(
    failing: Callable[[BaseException], None], error: Exception
) -> None:
    failing(error)
    with pytest.raises(type(error)):
        cli.main(["schema"])


def test_a_reader_that_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "muster", "schema"], stdout=closed, stderr=subprocess.PIPE, timeout=60
        )
    assert (done.returncode, done.stderr) == (141, b"")
