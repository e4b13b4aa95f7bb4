"""Multiply-adds that never leave registers: how fast a thread could be if nothing had to be loaded."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

from wholegrad.kernels.compile import function
from wholegrad.kernels.emit import Code
from wholegrad.kernels.host import Host, host

POINTERS = 2  # how many rounds; the vectors: factor, addend, then sums


def write(machine: Host) -> str:
    """The module whose function ``peak`` adds to every sum, so many times; none waits for another."""
    code = Code("float", machine.lanes("float"))
    n, count = code.lanes, _sums(machine)
    rounds = code.integer("%rounds", 0)
    factor, addend, *sums = (code.load(code.at("%vectors", i * n)) for i in range(2 + count))
    with code.loop(0, rounds, 1, sums) as loop:
        loop.after = [code.fma(each, factor, addend) for each in loop.values]
    for i, each in enumerate(loop.values):
        code.store(each, code.at("%vectors", (2 + i) * n))
    return _declared(code) + code.function("peak", "ptr %rounds, ptr %vectors")


def _sums(machine: Host) -> int:
    return machine.registers * 3 // 4


def _declared(code: Code) -> str:
    kind = code.vector
    return f"declare {kind} @llvm.fma.{code.suffix}({kind}, {kind}, {kind})\n"


@cache
def _kernel() -> Callable[..., None]:
    machine = host()
    assert machine is not None
    return function(write(machine), "peak", POINTERS)


def multiply_adds(rounds: int) -> int:
    """Do ``rounds`` of them on this thread, in float32; returns how many that were."""
    machine = host()
    assert machine is not None, "no kernels on this machine"
    lanes, count = machine.lanes("float"), _sums(machine)
    vectors = (ctypes.c_float * ((2 + count) * lanes))(*[0.5] * lanes, *[1.0] * (1 + count) * lanes)
    _kernel()((ctypes.c_int64 * 1)(rounds), vectors)
    return rounds * count * lanes
