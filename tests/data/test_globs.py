from __future__ import annotations

from pathlib import Path

import pytest

from muster.data.globs import matcher, walk


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*.py", "a.py", True),
        ("*.py", "b/a.py", False),
        ("**/*.py", "a.py", True),
        ("**/*.py", "x/y/a.py", True),
        ("**/test/**", "test/a.py", True),
        ("**/test/**", "x/test/y/a.py", True),
        ("**/test/**", "tests/a.py", False),
        ("a/**", "a/b/c", True),
        ("a?c/[0-9]*.txt", "abc/7x.txt", True),
        ("[!a]*", "abc", False),
        ("a.c", "abc", False),
        ("[", "[", True),
    ],
)
def test_matcher(pattern: str, name: str, expected: bool) -> None:
    assert matcher(pattern)(name) is expected


def test_walk(tmp_path: Path) -> None:
    for name in ("a.py", "x/b.py", "x/y/c.py", ".hidden/d.py", "x/.e.py", "skip/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "x" / "loop").symlink_to(tmp_path / "x")
    assert sorted(walk(tmp_path, "**/*.py", {"skip"})) == ["a.py", "x/b.py", "x/y/c.py"]
    assert sorted(walk(tmp_path, "*/*.py")) == ["skip/f.py", "x/b.py"]
    assert sorted(walk(tmp_path, ".hidden/*.py")) == [".hidden/d.py"]
