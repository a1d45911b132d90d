from __future__ import annotations

import json
from pathlib import Path

import pytest

from muster.config.load import load_run, run_schema
from tests.conftest import Muster


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("template", ["tiny", "small", "finetune"])
def test_init_writes_a_run_file_that_loads(muster: Muster, template: str) -> None:
    assert muster("init", "mine", "--template", template) == (
        0,
        "wrote mine.yaml; next: muster train mine.yaml\n",
        "",
    )
    assert load_run(Path("mine.yaml")).name == "mine"


def test_init_takes_the_ending_too(muster: Muster, here: Path) -> None:
    assert muster("init", "mine.yaml")[0] == 0
    assert [path.name for path in here.iterdir()] == ["mine.yaml"]


def test_init_does_not_overwrite(muster: Muster) -> None:
    Path("mine.yaml").write_text("precious")
    said = "muster: mine.yaml exists: choose another name, or delete it\n"
    assert muster("init", "mine") == (2, "", said)
    assert Path("mine.yaml").read_text() == "precious"


@pytest.mark.parametrize("name", ["a b", "-x.yaml", "", "nowhere/mine", "mine/", "a\nb"])
def test_init_leaves_nothing_behind_for_a_name_that_cannot_be(muster: Muster, here: Path, name: str) -> None:
    code, out, err = muster("init", "--", name)
    assert (code, out) == (2, "")
    assert err.startswith("muster: ")
    assert list(here.iterdir()) == []


def test_schema_prints_the_json_schema(muster: Muster) -> None:
    code, out, err = muster("schema")
    assert (code, err) == (0, "")
    assert json.loads(out) == run_schema()
