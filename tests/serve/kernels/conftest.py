"""The compiled kernels, made once in a run, in a cache of the run's own."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import pytest

from muster.serve.kernels.build import LEVELS, Level, Unavailable, load_library

LibraryOf = Callable[[Level | None], ctypes.CDLL]


@pytest.fixture(scope="session")
def library_of(tmp_path_factory: pytest.TempPathFactory) -> LibraryOf:
    """Compiles for a level, or for this processor as it is."""
    folder = tmp_path_factory.mktemp("cache")

    @cache
    def compiled(level: Level | None) -> ctypes.CDLL:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folder))
            try:
                return load_library(level)[0]
            except Unavailable as reason:
                pytest.skip(f"no native kernels here: {reason}")

    return compiled


@pytest.fixture(scope="session")
def library(library_of: LibraryOf) -> ctypes.CDLL:
    return library_of(None)


@pytest.fixture(
    scope="session",
    params=[None, *LEVELS[1:]],
    ids=lambda level: level.name if level else "this processor",
)
def each_library(request: pytest.FixtureRequest, library_of: LibraryOf) -> ctypes.CDLL:
    """For this processor, and for each of the levels below it."""
    return library_of(request.param)
