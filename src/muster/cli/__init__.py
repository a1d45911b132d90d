"""The command line: one module a verb. Importing this, and `muster --help`, imports no torch.

Whatever a user can act on ends here as one line on stderr and an exit code:
0 ok, 1 failure, 2 bad config or usage, 3 does not fit, 4 parity failed, 75 preempted (run it again).
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter

import muster
from muster.errors import DoesNotFit, MusterError, UsageError

VERBS = (
    "init",
    "verify",
    "train",
    "chaos",
    "eval",
    "export",
    "convert",
    "serve",
    "chat",
    "bench",
    "runs",
    "inspect",
    "schema",
)

_INTERRUPTED, _READER_GONE = 130, 141  # 128 + SIGINT and SIGPIPE, as shells count


def build_app(*, describe: bool = False) -> App:
    """The command line; a verb's module is imported when it is used, or now if `describe`, for its help."""
    app = App(
        name="muster",
        help="Train and serve large language models on whatever machines you can muster.",
        version=f"muster {muster.__version__}",
        default_parameter=Parameter(negative=()),  # no --no-json beside --json
        help_format="plaintext",  # rendering Markdown would be a quarter of the start-up time
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
        result_action="return_value",
    )
    app["--help"].group = app["--version"].group = "Options"
    for order, verb in enumerate(VERBS):
        app.command(f"muster.cli.{_module(verb)}:{_module(verb)}", name=verb, sort_key=order)
        if describe:
            app[verb]  # looking a command up imports it
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `muster` command; always ends in SystemExit, or in an unknown error's traceback."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        build_app(describe=not given or given[0].startswith("-"))(given)
        sys.stdout.flush()
    except CycloptsError as error:
        _fail(str(error).strip().splitlines()[0], UsageError.exit_code)
    except MusterError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        # Python flushes once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_READER_GONE)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" for {error.filename}" if error.filename else ""
        _fail(f"no space left{where}: free some, then run the same command again", DoesNotFit.exit_code)
    sys.exit(0)


def _module(verb: str) -> str:
    return {"eval": "evaluate"}.get(verb, verb)


def _fail(message: str, exit_code: int) -> None:
    sys.stdout.flush()
    for line in message.splitlines():
        sys.stderr.write(f"muster: {line}\n")
    sys.exit(exit_code)
