"""`python -m muster.serve.router.child FD ARGUMENTS`: the command `muster ARGUMENTS`, told to stop when the pipe FD
closes, which it does when the router ends, however that ends."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading


def main() -> None:
    lifeline = int(sys.argv[1])
    threading.Thread(target=_follow, args=(lifeline,), daemon=True).start()
    sys.argv[:2] = []  # runpy puts the command's name in front
    sys.argv.insert(0, "muster")
    runpy.run_module("muster", run_name="__main__")


def _follow(lifeline: int) -> None:
    os.read(lifeline, 1)  # nothing is ever written
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
