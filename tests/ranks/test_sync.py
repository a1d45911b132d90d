"""Copies that train apart: against plain loops over models in one process, over layouts, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.toy import tiny, train_here, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def test_smoke(corpus: Path, run_ranks: Any, tmp_path: Path) -> None:
    for kind in ({"kind": "local_sgd", "every": 2}, {"kind": "diloco", "every": 2}, {"kind": "delayed"},
                 {"kind": "diloco", "every": 4, "fragments": 2, "overlap": 1, "compress": "int8"}):
        run = tiny(layout={"replicate": 2})
        run["train"] = run["train"] | {"sync": kind}
        import json
        print(kind)
        for row in run_ranks(2, train_here, run, str(corpus), str(tmp_path / json.dumps(kind)[:30].replace('"','')))[0]: print(row)
