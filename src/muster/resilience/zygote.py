"""A process that has torch loaded and forks ranks when told to: a restart costs hundredths of a second, not seconds.

The agent runs it as `python -m muster.resilience.zygote FD [MODULE...]`, where FD is its end of a socket pair and the
modules are loaded for the ranks (those that train, if none is named). Requests and
answers are JSON objects, one a line: {"start": id, "argv", "env", "log"}, {"signal": pid, "number"};
{"started": id, "pid"}, {"ended": pid, "code"}. A rank forked here is a process of its own: with the environment, the
output and the signals that it would have as `python -m muster *argv`. When the agent ends, so does this, and so do the
ranks. It never touches a GPU, whose driver does not survive a fork.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from muster.resilience.lifeline import die_with_parent, name_process

_PRELOADED = ("muster.train.preloaded",)


def main(descriptor: int, preloaded: Sequence[str]) -> None:
    die_with_parent(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in preloaded or _PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # a rank's collections neither look through what is here nor, by that, copy its pages
    with socket.socket(fileno=descriptor) as agent:
        _serve(agent)


def _serve(agent: socket.socket) -> None:
    wakes, wake = socket.socketpair()  # a byte arrives whenever a child ends
    wakes.setblocking(False)
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    lines = agent.makefile("rb", buffering=0)
    children: set[int] = set()
    selector = selectors.DefaultSelector()
    selector.register(agent, selectors.EVENT_READ)
    selector.register(wakes, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is agent:
                line = lines.readline()
                if not line:
                    _kill(children)
                    return
                request = json.loads(line)
                if "start" in request:
                    pid = os.fork()
                    if pid == 0:
                        _become_rank(request, agent, wakes, wake)
                    children.add(pid)
                    _tell(agent, {"started": request["start"], "pid": pid})
                elif (
                    request["signal"] in children
                ):  # not one that ended, whose number may be somebody else's by now
                    os.kill(request["signal"], request["number"])
            else:
                with contextlib.suppress(BlockingIOError):
                    wakes.recv(4096)
        for pid, code in _ended():
            children.discard(pid)
            _tell(agent, {"ended": pid, "code": code})


def _ended() -> list[tuple[int, int]]:
    found = []
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            found.append((pid, os.waitstatus_to_exitcode(status)))
    return found


def _kill(children: set[int]) -> None:
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _tell(agent: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the agent has gone: the next read says so
        agent.sendall(json.dumps(message).encode() + b"\n")


def _become_rank(request: dict[str, Any], *inherited: socket.socket) -> None:
    """The child's part; does not return."""
    code: Any = 1
    try:
        parent = os.getppid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        for one in inherited:
            one.close()
        die_with_parent(parent)
        os.environ.clear()
        os.environ.update(request["env"])
        name_process(f"rank-{os.environ.get('RANK', '?')}")
        if request["log"] is not None:
            target = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(target, 1)
            os.dup2(target, 2)
            os.close(target)
        sys.argv = ["muster", *request["argv"]]
        runpy.run_module("muster", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
