"""One exception tree. Every message is one sentence: the cause, the figure, the next step.

MusterError            exit 1   anything a user can act on
├── UsageError         exit 2   the command line, a run file, or an input file is wrong
│   ├── ConfigError    exit 2   a run file: all its problems at once, as file:line: path: what
│   ├── DataError      exit 2   a source, a tokenizer or a token store
│   └── MissingExtra   exit 2   an optional dependency is not installed
├── CheckpointError    exit 1   no sound checkpoint, or one of another run
├── TrainingError      exit 1   nan/inf, a rank that died
├── DoesNotFit         exit 3   not enough memory or disk
├── ParityError        exit 4   a conversion changed the numbers
└── Preempted          exit 75  stopped cleanly; run the same command again
"""

from __future__ import annotations

from collections.abc import Sequence


class MusterError(Exception):
    """Base of every error a user can act on; the command line prints it as one line."""

    exit_code = 1


class UsageError(MusterError):
    exit_code = 2


class ConfigError(UsageError):
    """A run file with problems; `problems` holds one line each, ready to print."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class DataError(UsageError):
    pass


class MissingExtra(UsageError):
    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs the '{extra}' extra: pip install 'musterllm[{extra}]'")


class CheckpointError(MusterError):
    pass


class TrainingError(MusterError):
    pass


class DoesNotFit(MusterError):
    exit_code = 3


class ParityError(MusterError):
    exit_code = 4


class Preempted(MusterError):
    exit_code = 75
