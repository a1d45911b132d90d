"""Compiling on first use: cached, whole or not there, and without a compiler a reason instead."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from muster.serve.kernels import build
from muster.serve.kernels.build import LEVELS, Level, Unavailable, load_library
from muster.serve.kernels.ops import choose_kernels
from muster.serve.kernels.reference import Reference
from tests.serve.kernels.conftest import LibraryOf

ANY = (Level(name="any processor", needs=(), architecture="native"),)
SMALL = 'extern "C" int answer() { return 42; }\nextern "C" int muster_has_tiles() { return 1; }\n'
compiling = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="there is no C++ compiler here"
)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One small source in place of the kernels, for any processor, and an empty cache; the cache's folder."""
    (tmp_path / "cpp").mkdir()
    (tmp_path / "cpp" / "small.cpp").write_text(SMALL)
    monkeypatch.setattr(build, "SOURCES", tmp_path / "cpp")
    monkeypatch.setattr(build, "LEVELS", ANY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "muster" / "kernels"


def libraries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.so"))


@compiling
def test_compiled_once(small: Path) -> None:
    library, origin = load_library()
    assert library.answer() == 42
    assert "compiled now" in origin
    (made,) = libraries(small)
    before = made.stat()
    assert "from the cache" in load_library()[1]
    assert made.stat().st_mtime_ns == before.st_mtime_ns
    assert not list(small.glob("*.draft"))


@compiling
def test_other_sources_are_another_library(small: Path, tmp_path: Path) -> None:
    load_library()
    (tmp_path / "cpp" / "small.cpp").write_text(SMALL.replace("42", "43"))
    assert load_library()[0].answer() == 43
    assert len(libraries(small)) == 2


@compiling
@pytest.mark.parametrize("damage", [b"", b"\x7fELF", None])
def test_damaged_library_is_made_anew(small: Path, damage: bytes | None) -> None:
    load_library()
    (made,) = libraries(small)
    content = bytearray(made.read_bytes())
    content[len(content) // 2] ^= 1
    made.unlink()  # the loader keeps what it has mapped
    made.write_bytes(bytes(content) if damage is None else damage)
    assert "compiled now" in load_library()[1]
    assert build._is_whole(made)


def answer(queue: multiprocessing.SimpleQueue[int], cpp: Path) -> None:
    build.SOURCES, build.LEVELS = cpp, ANY
    queue.put(load_library()[0].answer())


@compiling
def test_several_processes_at_once(small: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=answer, args=(queue, tmp_path / "cpp")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert [queue.get() for _ in processes] == [42] * 4
    assert len(libraries(small)) == 1


@compiling
def test_killed_while_compiling(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that never ends, whose caller is killed; the next caller has one that does."""
    slow = tmp_path / "slow"
    slow.write_text('#!/bin/sh\n[ "$1" = --version ] && exec c++ --version\nexec sleep 60\n')
    slow.chmod(0o755)
    program = (
        "import sys; from pathlib import Path; from muster.serve.kernels import build;"
        "build.SOURCES = Path(sys.argv[1]);"
        "build.LEVELS = (build.Level(name='any processor', needs=(), architecture='native'),);"
        "build.load_library()"
    )
    victim = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "cpp")],
        env=os.environ | {"CXX": str(slow)},
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(small.glob("*.draft")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert not libraries(small)
    assert load_library()[0].answer() == 42
    assert not list(small.glob("*.draft"))


@compiling
def test_what_the_compiler_refuses_is_told(small: Path, tmp_path: Path) -> None:
    (tmp_path / "cpp" / "small.cpp").write_text("int f() { return nonsense; }\n")
    with pytest.raises(Unavailable, match="nonsense"):
        load_library()
    assert not libraries(small)


def test_no_compiler(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    kernels, reason = choose_kernels(torch.float32)
    assert isinstance(kernels, Reference)
    assert "no C++ compiler" in reason


def test_missing_instructions(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "LEVELS", (Level(name="AVX-4096", needs=("avx4096",), architecture="native"),))
    kernels, reason = choose_kernels(torch.float32)
    assert isinstance(kernels, Reference)
    assert "avx4096" in reason or "x86-64" in reason


AVX2 = ["avx", "avx2", "fma", "f16c"]
AVX512 = ["avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"]
PROCESSORS = {
    "Haswell": (AVX2, "AVX2"),
    "Skylake-X": (AVX2 + AVX512, "AVX2"),
    "Alder Lake": ([*AVX2, "avx_vnni"], "AVX2 and AVX-VNNI"),
    "Cascade Lake": ([*AVX2, *AVX512, "avx512_vnni"], "AVX-512 VNNI"),
    "Zen 5": ([*AVX2, *AVX512, "avx512_vnni", "avx_vnni"], "AVX-512 VNNI"),
    "Sapphire Rapids": ([*AVX2, *AVX512, "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16"], "AMX"),
}


@compiling
@pytest.mark.parametrize("processor", PROCESSORS)
def test_best_level_of_a_processor(small: Path, monkeypatch: pytest.MonkeyPatch, processor: str) -> None:
    features, expected = PROCESSORS[processor]
    monkeypatch.setattr(build, "LEVELS", LEVELS)
    monkeypatch.setattr(build, "_features", lambda: features)
    assert load_library()[1].startswith(f"{expected} (kernels-")


@compiling
def test_tiles_that_the_system_refuses(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "LEVELS", LEVELS)
    monkeypatch.setattr(build, "_features", lambda: PROCESSORS["Sapphire Rapids"][0])
    (tmp_path / "cpp" / "small.cpp").write_text(SMALL.replace("return 1", "return 0"))
    assert load_library()[1].startswith("AMX processor whose tiles the system refuses, so with AVX-512 (")


@compiling
def test_level_that_the_processor_lacks(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "LEVELS", LEVELS)
    monkeypatch.setattr(build, "_features", lambda: AVX2)
    load_library(LEVELS[-1])
    with pytest.raises(Unavailable, match="no AMX"):
        load_library(LEVELS[0])
    monkeypatch.setattr(build, "_features", lambda: ["avx", "avx2"])
    with pytest.raises(Unavailable, match="no fma, and the C\\+\\+ kernels need AVX2"):
        load_library()


@pytest.mark.skipif(shutil.which("objdump") is None, reason="there is no disassembler here")
def test_only_amx_has_tiles(library_of: LibraryOf) -> None:
    assert not any(library_of(level).muster_has_tiles() for level in LEVELS[1:])
    if library_of(None).muster_has_tiles():
        assert build._levels(build._features())[0].name == "AMX"


@pytest.mark.parametrize("level", LEVELS[1:], ids=lambda level: level.name)
def test_no_instruction_above_the_level(level: Level, library_of: LibraryOf) -> None:
    """One would end the process on a processor without it, and no test on a newer one would notice."""
    wide = "avx512f" in level.needs
    disassembled = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", library_of(level)._name],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    above = r"%tmm|vdpbf16ps|vcvtneps2bf16" if wide else r"%zmm|%k[0-7]|%[xy]mm(?:1[6-9]|[23][0-9])"
    assert "%zmm" in disassembled if wide else "%ymm" in disassembled
    assert not re.findall(above, disassembled)
    assert ("{vex} vpdpbusd" in disassembled) == ("avx_vnni" in level.needs)


def test_other_devices_have_torch() -> None:
    kernels, reason = choose_kernels(torch.bfloat16, "meta")
    assert isinstance(kernels, Reference)
    assert "not for meta" in reason


def test_fast_path_is_the_default(library: ctypes.CDLL) -> None:
    assert library.muster_attend
