"""Reads rows of a file that lie apart, one system call a row, without Python in between.

A box of a raw image is thousands of short rows. The call from Python costs several times what the kernel needs to copy
a row of a tile, and holds the interpreter's lock meanwhile.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache

from wholegrad.kernels.compile import function
from wholegrad.kernels.emit import Code
from wholegrad.kernels.host import host

POINTERS = 2
SIZES = ("file", "offset", "step", "bytes", "rows", "to_step")


@cache
def _function() -> Callable[..., None]:
    """``rows(sizes, to)``: the entry of ``sizes`` becomes how many rows were read whole."""
    code = Code("double", 1)
    arg = {name: code.integer("%sizes", i) for i, name in enumerate(SIZES)}
    file = code.set(f"trunc i64 {arg['file']} to i32")
    good = code.at("%sizes", len(SIZES), "i64")
    code.do(f"store i64 0, ptr {good}")
    with code.loop(0, arg["rows"]) as row:
        to = code.at("%to", code.mul(row.index, arg["to_step"]), "i8")
        offset = code.add(arg["offset"], code.mul(row.index, arg["step"]))
        count = code.set(f"call i64 @pread(i32 {file}, ptr {to}, i64 {arg['bytes']}, i64 {offset})")
        same = code.set(f"icmp eq i64 {count}, {arg['bytes']}")
        whole = code.set(f"zext i1 {same} to i64")
        before = code.set(f"load i64, ptr {good}")
        code.do(f"store i64 {code.set(f'add i64 {before}, {whole}')}, ptr {good}")
    text = "declare i64 @pread(i32, ptr, i64, i64)\n" + code.function("rows", "ptr %sizes, ptr %to")
    return function(text, "rows", POINTERS)


@cache
def available() -> bool:
    """Whether this system has what :func:`read_rows` needs: files read by position, 64-bit offsets, machine code."""
    return host() is not None and hasattr(os, "pread") and sys.maxsize > 2**32


def read_rows(file: int, offset: int, step: int, size: int, rows: int, to: int, to_step: int) -> bool:
    """Read ``rows`` rows of ``size`` bytes, ``step`` bytes apart, to address ``to``, ``to_step`` apart.

    Returns:
        Whether every row came whole in one call; if not, what is at ``to`` is undefined.
    """
    sizes = (ctypes.c_int64 * (len(SIZES) + 1))(file, offset, step, size, rows, to_step, 0)
    _function()(sizes, to)
    return sizes[len(SIZES)] == rows
