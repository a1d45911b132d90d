"""The house rules of ARCHITECTURE.md that a program can check: floors, and nothing that executes data."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import muster

PACKAGE = Path(muster.__file__).parent
FLOORS = {
    "errors": 0,
    "config": 0,
    "observe": 1,
    "data": 1,
    "model": 1,
    "comm": 2,
    "parallel": 3,
    "checkpoint": 4,
    "resilience": 4,
    "train": 5,
    "export": 6,
    "convert": 6,
    "chaos": 6,
    "serve": 7,
    "cli": 8,
}
EXECUTING = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def imports() -> Iterator[tuple[Path, str, int]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                yield path, node.module, node.lineno
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    yield path, alias.name, node.lineno


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_room_has_a_floor() -> None:
    rooms = {room(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "__main__"}
    assert rooms <= FLOORS.keys()


def test_rooms_import_only_from_lower_floors() -> None:
    wrong = []
    for path, module, line in imports():
        here, parts = room(path), module.split(".")
        if here not in FLOORS or parts[0] != "muster" or len(parts) == 1 or parts[1] == here:
            continue
        if FLOORS[parts[1]] >= FLOORS[here] and {here, parts[1]} != {"config", "errors"}:
            wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {module}")
    assert not wrong


def test_model_math_does_not_know_distribution() -> None:
    wrong = [
        f"{path}:{line}"
        for path, module, line in imports()
        if room(path) == "model" and "distributed" in module
    ]
    assert not wrong


def test_nothing_that_executes_data_is_imported() -> None:
    wrong = [
        f"{path}:{line}: {module}" for path, module, line in imports() if module.split(".")[0] in EXECUTING
    ]
    assert not wrong


def test_nothing_that_executes_data_is_called() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            remote = any(
                key.arg == "trust_remote_code" and ast.unparse(key.value) == "True" for key in node.keywords
            )
            objects = "gather_object" in called or "broadcast_object" in called or "scatter_object" in called
            if called in {"eval", "exec", "torch.load"} or remote or objects:
                wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {called}")
    assert not wrong


def test_files_stay_small() -> None:
    long = {
        str(path.relative_to(PACKAGE)): lines
        for path in PACKAGE.rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 400
    }
    assert not long, "look for the seam"
