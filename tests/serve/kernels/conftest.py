"""The compiled kernels, made once in a run, in a cache of the run's own."""

from __future__ import annotations

import ctypes

import pytest

from muster.serve.kernels.build import Unavailable, load_library


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        try:
            return load_library()[0]
        except Unavailable as reason:
            pytest.skip(f"no native kernels here: {reason}")
