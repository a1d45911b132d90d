"""The kernels' own threads: the same bits from every caller, also after a fork, and no process that cannot end."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from muster.serve.kernels.native import Native, NativeLinear
from muster.serve.kernels.packing import quantize

THREADS = 4


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def layer(library: ctypes.CDLL, seed: int = 0) -> tuple[NativeLinear, Tensor]:
    """A layer of many parts, and rows for it."""
    torch.manual_seed(seed)
    plain = quantize(torch.randn(1024, 64), None, "int8")
    return Native(library, torch.float32).linear(plain, torch.float32), torch.randn(9, 64)


def helpers() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def test_threads_do_not_change_a_bit(library: ctypes.CDLL) -> None:
    linear, x = layer(library)
    shared = [linear(x) for _ in range(200)]
    torch.set_num_threads(1)
    alone = linear(x)
    assert all(torch.equal(one, alone) for one in shared)


def test_threads_are_hired_once(library: ctypes.CDLL) -> None:
    linear, x = layer(library)
    linear(x)
    before = helpers()
    assert len(before) >= THREADS
    for _ in range(100):
        linear(x)
    assert helpers() == before


def test_several_callers_at_once(library: ctypes.CDLL) -> None:
    """Each finds its own results, whoever has the helpers."""
    layers = [layer(library, seed) for seed in range(4)]
    expected = [linear(x) for linear, x in layers]
    wrong: list[int] = []

    def call(number: int) -> None:
        torch.set_num_threads(THREADS)
        linear, x = layers[number]
        for _ in range(300):
            if not torch.equal(linear(x), expected[number]):
                wrong.append(number)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for one in callers:
        one.start()
    for one in callers:
        one.join()
    assert not wrong


def compute(
    linear: NativeLinear, x: Tensor, expected: Tensor, queue: multiprocessing.SimpleQueue[tuple[bool, int]]
) -> None:
    same = all(torch.equal(linear(x), expected) for _ in range(50))
    queue.put((same, len(helpers())))


def test_forked_processes_have_threads_of_their_own(library: ctypes.CDLL) -> None:
    linear, x = layer(library)
    expected = linear(x)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=compute, args=(linear, x, expected, queue))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    same, alive = queue.get()
    assert same
    assert alive >= THREADS
    assert torch.equal(linear(x), expected)


@pytest.mark.usefixtures("library")
def test_a_process_ends_while_helpers_are_awake() -> None:
    program = (
        "import torch; from muster.serve.kernels.ops import choose_kernels;"
        "from muster.serve.kernels.packing import quantize;"
        "torch.set_num_threads(4); kernels, _ = choose_kernels(torch.float32);"
        "linear = kernels.linear(quantize(torch.randn(1024, 64), None, 'int8'), torch.float32);"
        "print(float(linear(torch.zeros(1, 64)).sum()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0.0\n", "")
