"""A pickle that runs a command, planted in the place of any file that muster writes, is never executed by any verb."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from muster.errors import MusterError
from tests.conftest import Muster, RunRanks
from tests.toy import tiny, train_here, write_corpus

VERBS: list[tuple[str, ...]] = [("inspect", "--verify"), ("eval",), ("export",)]


class Planted:
    """Pickles to a call that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def as_pickle(mark: Path) -> bytes:
    return pickle.dumps(Planted(mark))


def as_torch_file(mark: Path) -> bytes:
    content = io.BytesIO()
    torch.save(Planted(mark), content)
    return content.getvalue()


def as_array(mark: Path) -> bytes:
    content = io.BytesIO()
    np.save(content, np.array([Planted(mark)], dtype=object), allow_pickle=True)
    return content.getvalue()


FORMS: list[Callable[[Path], bytes]] = [as_pickle, as_torch_file, as_array]


def resume(base: str, folder: str) -> str:
    """Train, or go on; what muster says against it."""
    try:
        train_here(run(), base, folder)
    except MusterError as error:
        return str(error)
    return ""


def run() -> dict[str, Any]:
    return tiny(layout={"replicate": 1})


def test_the_forms_run_where_pickles_are_loaded(tmp_path: Path) -> None:
    pickle.loads(as_pickle(tmp_path / "pickle"))  # noqa: S301
    torch.load(io.BytesIO(as_torch_file(tmp_path / "torch")), weights_only=False)
    np.load(io.BytesIO(as_array(tmp_path / "array")), allow_pickle=True)
    assert len(list(tmp_path.iterdir())) == len(FORMS)


def test_in_every_file(tmp_path: Path, muster: Muster, run_ranks: RunRanks) -> None:
    sound, mark = tmp_path / "sound", tmp_path / "mark"
    sound.mkdir()
    write_corpus(sound)
    assert run_ranks(1, resume, str(sound), str(sound / "runs" / "tiny")) == [""]
    code, _, said = muster("export", sound / "runs" / "tiny")
    assert code == 0, said
    files = [path.relative_to(sound) for path in sorted((sound / "runs").rglob("*")) if path.is_file()]
    assert {".json", ".jsonl", ".safetensors"} <= {path.suffix for path in files}
    for number, path in enumerate(files):
        copied = tmp_path / str(number)
        shutil.copytree(sound, copied)
        (copied / path).write_bytes(FORMS[number % len(FORMS)](mark))
        for verb, *flags in VERBS:
            code, _, said = muster(verb, copied / "runs" / "tiny", *flags)
            assert code in (0, 1, 2, 4), (verb, path, said)
            assert "Traceback" not in said, (verb, path, said)
        (said,) = run_ranks(1, resume, str(copied), str(copied / "runs" / "tiny"))
        assert "\n" not in said, (path, said)
        assert not mark.exists(), path
        shutil.rmtree(copied)
