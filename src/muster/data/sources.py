"""Which files a source of the run file means; what is inside a file is for `formats`."""

from __future__ import annotations

import glob
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from muster.config.schema import Source
from muster.data.globs import matcher, walk
from muster.data.hub import arrow_files
from muster.errors import DataError

_STDLIB = "stdlib:"
_INSTALLED = ("site-packages", "dist-packages")


@dataclass(frozen=True, slots=True)
class File:
    """A file of a source, and how it looked when it was listed."""

    name: str
    """Path below the folder where the glob's wildcards begin, so that no name depends on a machine."""
    path: Path
    size_bytes: int
    stamp: tuple[int, ...]
    """Modification and change time in ns, and inode: whatever writes to the file changes one of them."""

    @property
    def changed_ns(self) -> int:
        """When its content, or anything else about it, was last changed; no program can set this back."""
        return self.stamp[1]

    def check_unchanged(self) -> None:
        """Raise DataError if the file was written to after it was listed."""
        if _file(self.path, self.name) != self:
            raise DataError(
                f"{self.path} was changed while it was being read: run again when nothing writes to it"
            )


def list_files(source: Source, base: Path) -> list[File]:
    """Files of a source in the order of their names; `base` is the run file's folder.

    Globs are relative to `base`; `~` is the home folder, `stdlib:` the running Python's standard library
    without what is installed into it. `exclude` takes globs of the same kind, matched against a file's
    name and against its path from `base`; one without a slash is matched against the last part.
    Raises DataError for a glob that matches nothing.
    """
    if source.hf is not None:
        return [_file(path, f"{source.hf}/{i}") for i, path in enumerate(arrow_files(source.hf))]
    assert source.files is not None
    patterns = [source.files] if isinstance(source.files, str) else source.files
    excludes = (exclude.removeprefix(_STDLIB) for exclude in source.exclude)
    excluded = [matcher(exclude if "/" in exclude else f"**/{exclude}") for exclude in excludes]
    found: dict[Path, str] = {}
    matched = 0
    for pattern in patterns:
        root, names = _expand(pattern, base)
        if not names:
            raise DataError(_nothing(pattern, base))
        matched += len(names)
        from_base = Path(os.path.relpath(root, base)).as_posix()
        for name in names:
            if not any(matches(name) or matches(f"{from_base}/{name}") for matches in excluded):
                found.setdefault(root / name, name)
    if not found:
        raise DataError(f"exclude leaves none of the {matched} files of {', '.join(patterns)}: exclude less")
    return [_file(path, name) for path, name in sorted(found.items(), key=lambda item: (item[1], item[0]))]


def _expand(pattern: str, base: Path) -> tuple[Path, list[str]]:
    """The folder where a glob's wildcards begin, and the names below it of the files that match."""
    without: tuple[str, ...] = ()
    if pattern.startswith(_STDLIB):
        root, rest = Path(sysconfig.get_path("stdlib")), pattern.removeprefix(_STDLIB)
        without = _INSTALLED
    else:
        parts = (base / Path(pattern).expanduser()).parts
        fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
        root, rest = Path(*parts[:fixed]), "/".join(parts[fixed:])
    if glob.has_magic(rest):
        return root, list(walk(root, rest, without))
    return root, [rest] if (root / rest).is_file() else []


def _nothing(pattern: str, base: Path) -> str:
    if pattern.startswith(_STDLIB):
        return f"no file of the standard library matches {pattern}: check the path"
    if (base / Path(pattern).expanduser()).is_dir():
        return f"{pattern} is a folder: write {pattern.rstrip('/')}/**/* or a narrower glob"
    where = base.resolve()
    return f"no file matches {pattern} in {where}: check the path, which starts from the run file's folder"


def _file(path: Path, name: str) -> File:
    status = path.stat()
    return File(name, path, status.st_size, (status.st_mtime_ns, status.st_ctime_ns, status.st_ino))
