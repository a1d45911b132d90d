"""What ranks that train are forked with: imported once, by the process that forks them (`resilience/zygote.py`,
`resilience/forked.py`), so that none does it again."""

from __future__ import annotations

import gc
import linecache
import sys
from importlib import import_module

_TRACED = (
    "muster.",
    "torch.distributed.",
    "torch.autograd.",
    "torch.nn.",
    "torch.optim.",
    "torch._subclasses.",
)

for _name in (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor",
    "torch._dynamo",
    "muster.cli.train",
    "muster.config.load",
    "muster.train.entry",
    "muster.train.verify",
):
    import_module(_name)
# DTensor keeps tracebacks, for which every rank would read these files.
for _name, _module in list(sys.modules.items()):
    if _name.startswith(_TRACED) and getattr(_module, "__file__", None):
        linecache.getlines(str(_module.__file__))
# A rank's collections neither look through all this nor, by that, copy its pages.
gc.freeze()
