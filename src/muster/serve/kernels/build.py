"""Compiles `cpp/` on first use and keeps the library in the user's cache, by what it was made from.

The sources include no header of torch's and take plain pointers: compiling takes seconds rather than minutes, and the
library outlives a torch update.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "cpp"
# -ffp-contract=off: what is fused is written out, so that a kernel's copies for few and for many rows agree bit by bit.
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-pthread", "-fPIC", "-w")
_TIMEOUT_S = 300.0
_DIGEST_BYTES = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """Instructions that the kernels are written for. `cpp/vector.h` chooses, by what the compiler may use."""

    name: str
    needs: tuple[str, ...]
    """The processor's features, as Linux names them."""
    architecture: str
    """For the compiler: a processor with these features and none of the levels above."""


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")
_AMX = Level(name="AMX", needs=(*_AVX512, "amx_int8", "amx_bf16"), architecture="sapphirerapids")
LEVELS = (
    _AMX,
    Level(name="AVX-512 VNNI", needs=_AVX512, architecture="cascadelake"),
    Level(name="AVX2 and AVX-VNNI", needs=(*_AVX2, "avx_vnni"), architecture="alderlake"),
    Level(name="AVX2", needs=_AVX2, architecture="haswell"),
)
"""The best first."""


class Unavailable(Exception):
    """There is no native library on this machine; the text says why."""


def load_library(level: Level | None = None) -> tuple[ctypes.CDLL, str]:
    """The compiled kernels, what they use and where they came from; compiled now if they are not in the cache.

    They are for this very processor, or for the `level` alone. Raises Unavailable.
    """
    features = _features()
    found = _levels(features)
    if level is not None and level not in found:
        raise Unavailable(f"the processor has no {level.name}")
    level_used = level or found[0]
    compiler, version = _compiler()
    flags = (*FLAGS, f"-march={level.architecture if level else 'native'}")
    path = cache_folder() / f"kernels-{_key((version, *flags, *features))}.so"
    origin = f"({path.name} from the cache)"
    if not _is_whole(path):
        try:
            _compile((compiler, *flags), path)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"the kernels could not be compiled into {path.parent} ({error})") from None
        origin = f"({path.name}, compiled now by {version})"
    library, name = _open(path), level_used.name
    if level_used is _AMX and not library.muster_has_tiles():
        name += " processor whose tiles the system refuses, so with AVX-512"
    return library, f"{name} {origin}"


def cache_folder() -> Path:
    """Where compiled kernels are kept: below XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "muster" / "kernels"


def _features() -> Sequence[str]:
    """What the processor has, and -march=native may use."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise Unavailable(f"the C++ kernels are for x86-64 Linux, and this is {platform.machine()}")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return sorted(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))


def _levels(features: Sequence[str]) -> Sequence[Level]:
    """Those that a processor has, one at least."""
    found = [level for level in LEVELS if set(level.needs) <= set(features)]
    if not found:
        missing = next(name for name in LEVELS[-1].needs if name not in features)
        raise Unavailable(
            f"the processor has no {missing}, and the C++ kernels need AVX2, FMA and F16C at least"
        )
    return found


def _compiler() -> tuple[str, str]:
    """The compiler's path and how it names itself."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path is not None:
            said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S)
            if said.returncode == 0 and said.stdout:
                return path, said.stdout.splitlines()[0]
    raise Unavailable("there is no C++ compiler: install g++ to decode several times as fast")


def _key(parts: Sequence[str]) -> str:
    made_of = hashlib.sha256()
    for part in parts:
        made_of.update(part.encode() + b"\0")
    for path in sorted(SOURCES.iterdir()):
        made_of.update(path.name.encode() + b"\0" + path.read_bytes())
    return made_of.hexdigest()[:20]


def _compile(compiler: Sequence[str], path: Path) -> None:
    """Make the library at `path`. One process compiles, others wait for it; a killed one leaves only a draft."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go of it when its holder dies
        if _is_whole(path):
            return
        for left_over in path.parent.glob(f"{path.stem}.*.draft"):
            shutil.rmtree(left_over, ignore_errors=True)
        draft = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.stem}.", suffix=".draft"))
        try:
            library = _build(compiler, draft)
            content = library.read_bytes()
            with open(library, "ab") as file:  # behind its end, where the loader does not look
                file.write(hashlib.sha256(content).digest())
                file.flush()
                os.fsync(file.fileno())
            library.replace(path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _build(compiler: Sequence[str], folder: Path) -> Path:
    def compile_one(source: Path) -> Path:
        made = folder / f"{source.stem}.o"
        _run([*compiler, "-c", str(source), "-o", str(made)])
        return made

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_one, sorted(SOURCES.glob("*.cpp"))))
    library = folder / "kernels.so"
    _run([*compiler, "-shared", *map(str, objects), "-o", str(library)])
    return library


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise Unavailable(f"the compiler refused the kernels: {first.strip()}")


def _is_whole(path: Path) -> bool:
    """Whether the library is there as it was written: a damaged one would take the process down."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"the compiled kernels cannot be loaded ({error})") from None
