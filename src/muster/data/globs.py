"""Shell globs with `**`, as predicates on names and as walks through folders.

Python's own `glob` cannot leave out folders on its way, and the site-packages folder below the standard
library is often larger than the library.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

_TOKEN = re.compile(r"\*+|\?|\[!?\]?[^\]]*\]|.", re.DOTALL)

Predicate = Callable[[str], bool]


def matcher(pattern: str) -> Predicate:
    """Whether a `/`-separated name matches: `*`, `?` and `[...]` within a part, `**` for any folders."""
    *folders, end = pattern.split("/")
    expression = "".join("(?:[^/]+/)*" if folder == "**" else _part(folder) + "/" for folder in folders)
    whole = re.compile(expression + (".+" if end == "**" else _part(end)), re.DOTALL)
    return lambda name: whole.fullmatch(name) is not None


def walk(root: Path, pattern: str, without: Collection[str] = ()) -> Iterator[str]:
    """Names below `root` of the files that match; hidden ones only where the pattern says so.

    Follows links to folders, but enters no folder twice, and none that is called like one in `without`.
    """
    matches, parts = matcher(pattern), pattern.split("/")
    deepest = len(parts) if "**" not in parts else None
    takes_hidden = any(part.startswith(".") for part in parts)
    entered: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        inside = Path(folder).relative_to(root).parts
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        wanted = [name for name in folders if name not in without and (takes_hidden or name[0] != ".")]
        # Sorted, so that of two ways into a folder it is always the same one that is taken.
        folders[:] = sorted(wanted) if len(inside) + 1 != deepest else []
        for file in files:
            name = "/".join((*inside, file))
            if (takes_hidden or file[0] != ".") and matches(name):
                yield name


def _part(pattern: str) -> str:
    """Regular expression of one part of a path."""
    return "".join(map(_piece, _TOKEN.findall(pattern)))


def _piece(token: str) -> str:
    if token[0] == "*":
        return "[^/]*"
    if token == "?":
        return "[^/]"
    if token[0] == "[" and len(token) > 1:
        negated = token[1] == "!"
        return f"[{'^' if negated else ''}{re.escape(token[1 + negated : -1]).replace(re.escape('-'), '-')}]"
    return re.escape(token)
