"""Thin convolutions and pointwise passes on a GPU, of maps that are computed as they are read.

The same entries as :mod:`wholegrad.kernels.thin` and :mod:`wholegrad.kernels.pointwise` have for the CPU: images are
read as bytes, activations and concatenations cost no pass of their own, and a loss is summed, with its gradient, while
its terms are computed. A program computes a stretch of a row for all output channels; windows are unrolled along rows.

Sums leave float32 after one stretch of a row (the weight's gradient: after ``ROWS`` rows of it) and are added up in
float64, in an order that does not change. Tested in Triton's interpreter and compiled for Hopper; never run on a GPU.
"""

from __future__ import annotations

import linecache
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from wholegrad.kernels.expression import IDENTITY, MAP, Program
from wholegrad.kernels.pointwise import Walked
from wholegrad.kernels.stage import Part
from wholegrad.kernels.thin import ChannelSums, Mixed
from wholegrad.kernels.triton_text import Text, evaluate, loads, names, read

Pair = tuple[int, int]
Padding = tuple[int, int, int, int]
LANES = 512  # columns of a program at most
BLOCK = 4096  # sums that a program keeps at most: output channels times columns
ROWS = 32  # rows whose products one program of the weight's gradient adds up
SIZES = ("columns", "rows", "height", "width", "top", "left")
SHAPES = ("OUT", "OUT_P", "KH", "KW", "SY", "SX", "DY", "DX", "BIAS", "REAL", "LANES")


class Written(NamedTuple):
    """A kernel's text and its arguments' names; those in capitals are constants of the compilation."""

    text: str
    arguments: tuple[str, ...]


def _kernel(arguments: Sequence[str], body: Text) -> Written:
    given = [f"{name}: tl.constexpr" if name.isupper() or name.endswith("_X") else name for name in arguments]
    text = f"def kernel({', '.join(given)}):\n" + "\n".join(body.lines) + "\n"
    return Written(text, tuple(arguments))


@cache
def compiled(written: Written) -> Any:
    """The text as Triton compiles it; ``inspect``, by which Triton reads it, finds it among Python's cached lines."""
    name = f"<wholegrad kernel {abs(hash(written.text)):x}>"
    linecache.cache[name] = (len(written.text), None, written.text.splitlines(keepends=True), name)
    space: dict[str, Any] = {"tl": tl, "__name__": "wholegrad.kernels.triton_mixed"}
    exec(compile(written.text, name, "exec"), space)  # our own text, made of numbers and names of the lines above
    loose = [each for each in written.arguments if each.endswith(("_n", "_c", "_y")) or each in SIZES]
    return triton.jit(space["kernel"], do_not_specialize=loose)


@cache
def slide(parts: tuple[Part, ...], spread: bool, factor: Program | None) -> Written:
    """A convolution, or (``spread``) what windows that sit on the input write, as ``(N, OUT, rows, columns)``."""
    text = Text()
    for line in (
        "row, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)",
        "col = tl.program_id(1) * LANES + tl.arange(0, LANES)",
        "channel = tl.arange(0, OUT_P)",
        "inside = channel < OUT",
        "total = tl.zeros([OUT_P, LANES], REAL)",
    ):
        text.do(line)
    before, first = 0, 0
    for part in parts:
        text.do(f"for c in range({part.channels}):")
        text.indent += 1
        text.do("for i in range(KH):")
        text.indent += 1
        if spread:
            text.do("up = row + top - i * DY")
            text.do("y = up // SY")
            text.do("there = (up >= 0) & (up % SY == 0) & (y < height)")
        else:
            text.do("y = row * SY - top + i * DY")
            text.do("there = (y >= 0) & (y < height)")
        text.do("for j in tl.static_range(KW):")
        text.indent += 1
        if spread:
            text.do("across = col + left - j * DX")
            text.do("at = across // SX")
            text.do("good = there & (across >= 0) & (across % SX == 0) & (at < width) & (col < columns)")
        else:
            text.do("at = col * SX - left + j * DX")
            text.do("good = there & (at >= 0) & (at < width) & (col < columns)")
        value = read(text, "x", first, part, ("sample", "c", "y", "at"), "good")
        text.do(f"place = channel * weight_o + (c + {before}) * weight_i + i * KW + j")
        text.do("tap = tl.load(weight + place, mask=inside, other=0).to(REAL)")
        text.do(f"total += tap[:, None] * {value}[None, :]")
        text.indent -= 3
        before, first = before + part.channels, first + len(part.program.leaves)
    text.do("if BIAS:")
    text.do("    total += tl.load(bias + channel, mask=inside, other=0).to(REAL)[:, None]")
    text.do("kept = inside[:, None] & (col < columns)[None, :]")
    arguments = ["out", "weight", "bias", *names("x", parts)]
    if factor is not None:
        arguments += names("f", [Part(factor, 0)])
        place = ("sample", "tl.minimum(channel, OUT - 1)[:, None]", "row", "col[None, :]")
        leaves = loads(text, "f", 0, factor, place, "kept")
        slope = evaluate(text, factor, leaves, factor.wanted[0]).slope
        text.do(f"total *= {slope or 'tl.full([], 0.0, REAL)'}")
    text.do("place = ((sample * OUT + channel[:, None]) * rows + row) * columns + col[None, :]")
    text.do("tl.store(out + place, total.to(out.dtype.element_ty), mask=kept)")
    return _kernel([*arguments, "weight_o", "weight_i", *SIZES, *SHAPES], text)


@cache
def correlate(sat: tuple[Part, ...], parts: tuple[Part, ...]) -> Written:
    """Products of the map that windows sit on with the one that they read, a part and a row of taps at a time.

    A program does all channels of one part of ``sat`` (its only one, of ``OUT`` channels) with one channel of ``read``.
    Programs that read the same block follow each other, so that it comes from the cache.
    """
    text = Text()
    for line in (
        "which, number = tl.program_id(0) % (CHANNELS * KH), tl.program_id(0) // (CHANNELS * KH)",
        "sample = tl.program_id(2).to(tl.int64)",
        "c, i = which // KH, which % KH",
        "band, col = number // blocks, (number % blocks) * LANES + tl.arange(0, LANES)",
        "channel, tap = tl.arange(0, OUT_P), tl.arange(0, KW_P)",
        "at = col[None, :] * SX - left + tap[:, None] * DX",
        "across = (at >= 0) & (at < width) & (tap < KW)[:, None] & (col < columns)[None, :]",
        "total = tl.zeros([KW_P, OUT_P, LANES], REAL)",
        "for each in range(ROWS):",
        "    row = band * ROWS + each",
        "    y = row * SY - top + i * DY",
        "    good = across & (row < rows) & (y >= 0) & (y < height)",
        "    sits = (channel < OUT)[:, None] & (col < columns)[None, :] & (row < rows)",
    ):
        text.do(line)
    text.indent += 1
    place = ("sample", "tl.minimum(channel, OUT - 1)[:, None]", "row", "col[None, :]")
    factor = read(text, "s", 0, sat[0], place, "sits")
    value = read(text, "x", 0, parts[0], ("sample", "c", "y", "at"), "good")
    text.do(f"total += {value}[:, None, :] * {factor}[None, :, :]")
    text.indent -= 1
    text.do("found = tl.sum(total.to(tl.float64), 2)")
    text.do("part = sample * (tl.num_programs(0) // (CHANNELS * KH)) + number")
    text.do("place = (((part * OUT + channel[None, :]) * CHANNELS + c) * KH + i) * KW + tap[:, None]")
    text.do("tl.store(out + place, found, mask=(channel < OUT)[None, :] & (tap < KW)[:, None])")
    arguments = ["out", *names("s", sat), *names("x", parts), "blocks", *SIZES]
    shapes = ("OUT", "OUT_P", "CHANNELS", "KH", "KW", "KW_P", "SY", "SX", "DY", "DX", "ROWS", "REAL", "LANES")
    return _kernel([*arguments, *shapes], text)


@cache
def walk(program: Program, value: bool, slopes: tuple[int, ...], grad: str, total: bool) -> Written:
    """One pass over maps of equal size: values, gradients of leaves, sums of a stretch of a row each.

    Args:
        grad: what slopes are multiplied by: a ``map``, ``one`` value, or nothing.
    """
    text = Text()
    for line in (
        "row = tl.program_id(0)",
        "plane = tl.program_id(2).to(tl.int64)",
        "sample, c = plane // CHANNELS, plane % CHANNELS",
        "col = tl.program_id(1) * LANES + tl.arange(0, LANES)",
        "good = col < columns",
        "place = (plane * rows + row) * columns + col",
        "part = (plane * rows + row) * tl.num_programs(1) + tl.program_id(1)",
    ):
        text.do(line)
    part, outputs, sums = Part(program, 0), [], []
    arguments = names("x", [part])
    leaves = loads(text, "x", 0, program, ("sample", "c", "row", "col"), "good")
    factor = ""
    if grad:
        given = Program((IDENTITY.leaves[0]._replace(kind=grad),))
        arguments += names("g", [Part(given, 0)])
        factor = loads(text, "g", 0, given, ("sample", "c", "row", "col"), "good")[0]
    if value or total:
        found = evaluate(text, program, leaves).value
        outputs += [found] * value
        sums += [found] * total
    for i in slopes:
        slope = evaluate(text, program, leaves, i).slope or "tl.full([], 0.0, REAL)"
        slope = text.set(f"{slope} * {factor}" if factor else slope)
        (outputs if program.leaves[i].kind == MAP else sums).append(slope)
    for k, each in enumerate(outputs):
        text.do(f"tl.store(o{k} + place, (tl.zeros([LANES], REAL) + {each}).to(o{k}.dtype.element_ty), mask=good)")
    for k, each in enumerate(sums):
        kept = f"tl.where(good, tl.zeros([LANES], REAL) + {each}, 0.0)"
        text.do(f"tl.store(t{k} + part, tl.sum({kept}.to(tl.float64), 0))")
    arguments += [f"o{k}" for k in range(len(outputs))] + [f"t{k}" for k in range(len(sums))]
    return _kernel([*arguments, "columns", "rows", "CHANNELS", "REAL", "LANES"], text)


# Calls.


def _real(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _mixed(x: torch.Tensor | Mixed) -> Mixed:
    return x if isinstance(x, Mixed) else Mixed((Part(IDENTITY, x.shape[1]),), (x,))


def _bare(parts: Sequence[Part]) -> tuple[Part, ...]:
    """One kernel whatever derivatives are wanted elsewhere."""
    bare = [tuple(leaf._replace(grad=False) for leaf in part.program.leaves) for part in parts]
    return tuple(
        Part(part.program._replace(leaves=leaves), part.channels) for part, leaves in zip(parts, bare, strict=True)
    )


def _arguments(of: str, x: Mixed) -> dict[str, Any]:
    """Addresses and steps of every leaf, as :func:`names` names them."""
    found: dict[str, Any] = {}
    kinds = [leaf.kind for part in x.parts for leaf in part.program.leaves]
    for k, (kind, leaf) in enumerate(zip(kinds, x.leaves, strict=True)):
        if kind == MAP:
            n, c, y, across = (0 if size == 1 else step for size, step in zip(leaf.shape, leaf.stride(), strict=True))
            found |= {f"{of}{k}": leaf, f"{of}{k}_n": n, f"{of}{k}_c": c, f"{of}{k}_y": y, f"{of}{k}_X": across or 1}
        else:
            found[f"{of}{k}"] = leaf.contiguous()
    return found


def _lanes(out: int, columns: int) -> int:
    """Columns of a program: its sums stay in registers, and few lanes idle at the end of a short row."""
    return int(max(16, min(LANES, BLOCK // triton.next_power_of_2(out), triton.next_power_of_2(columns))))


def forward(
    x: torch.Tensor | Mixed,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    factor: Mixed | None = None,
) -> torch.Tensor:
    """:func:`wholegrad.kernels.thin.forward`"""
    x, kernel = _mixed(x), (weight.shape[2], weight.shape[3])
    size = tuple(
        (x.shape[2 + i] + sum(padding[2 * i : 2 * i + 2]) - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    return _slid(x, weight, bias, (size[0], size[1]), stride, padding, dilation, factor, False)


def input_gradient(
    grad: torch.Tensor | Mixed,
    weight: torch.Tensor,
    input_size: Pair,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    bias: torch.Tensor | None = None,
    factor: Mixed | None = None,
) -> torch.Tensor:
    """:func:`wholegrad.kernels.thin.input_gradient`"""
    return _slid(_mixed(grad), weight, bias, input_size, stride, padding, dilation, factor, True)


def _slid(
    x: Mixed,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    size: Pair,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    factor: Mixed | None,
    spread: bool,
) -> torch.Tensor:
    weight = weight.contiguous()
    taps, out = weight.shape[2] * weight.shape[3], weight.shape[1 if spread else 0]
    steps = (taps, weight.shape[1] * taps) if spread else (weight.shape[1] * taps, taps)
    made = weight.new_empty((x.shape[0], out, *size))
    if not made.numel():
        return made
    program = None if factor is None else factor.parts[0].program
    lanes = _lanes(out, size[1])
    scaled = {} if factor is None else _arguments("f", factor)
    compiled(slide(_bare(x.parts), spread, program))[(size[0], triton.cdiv(size[1], lanes), x.shape[0])](
        out=made, weight=weight, bias=weight if bias is None else bias.contiguous(), **_arguments("x", x), **scaled,
        weight_o=steps[0], weight_i=steps[1], columns=size[1], rows=size[0], height=x.shape[2], width=x.shape[3],
        top=padding[0], left=padding[2], OUT=out, OUT_P=triton.next_power_of_2(out), KH=weight.shape[2],
        KW=weight.shape[3], SY=stride[0], SX=stride[1], DY=dilation[0], DX=dilation[1], BIAS=bias is not None,
        REAL=_real(weight.dtype), LANES=lanes,
    )  # fmt: skip
    return made


def weight_gradient(
    grad: torch.Tensor | Mixed,
    x: torch.Tensor | Mixed,
    kernel: Pair,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    sums: ChannelSums | None = None,
) -> torch.Tensor:
    """:func:`wholegrad.kernels.thin.weight_gradient`"""
    if sums is not None:
        summed = grad if sums.of == "g" else x
        assert isinstance(summed, torch.Tensor)
        sums.found = summed.sum((0, 2, 3), dtype=torch.float64)
    sat, reads = _mixed(grad), _mixed(x)
    how, inputs = (kernel, stride, padding, dilation), range(len(reads.parts))
    outputs = [
        torch.cat([_correlated(sat.part(s), reads.part(p), *how) for p in inputs], 1) for s in range(len(sat.parts))
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _correlated(sat: Mixed, x: Mixed, kernel: Pair, stride: Pair, padding: Padding, dilation: Pair) -> torch.Tensor:
    """Of one part of each."""
    (n, out, rows, columns), (_, channels, height, width) = sat.shape, x.shape
    taps = triton.next_power_of_2(kernel[1])
    lanes = _lanes(triton.next_power_of_2(out) * taps, columns)
    blocks = triton.cdiv(columns, lanes)
    count = triton.cdiv(rows, ROWS) * blocks
    made = torch.zeros((n * count, out, channels, *kernel), dtype=torch.float64, device=x.first.device)
    if not made.numel() or not height * width:
        return made.sum(0)
    dtype = torch.float64 if torch.float64 in (sat.dtype, x.dtype) else torch.float32
    compiled(correlate(_bare(sat.parts), _bare(x.parts)))[(channels * kernel[0] * count, 1, n)](
        out=made, **_arguments("s", sat), **_arguments("x", x), blocks=blocks, columns=columns, rows=rows,
        height=height, width=width, top=padding[0], left=padding[2], OUT=out, OUT_P=triton.next_power_of_2(out),
        CHANNELS=channels, KH=kernel[0], KW=kernel[1], KW_P=taps, SY=stride[0], SX=stride[1], DY=dilation[0],
        DX=dilation[1], ROWS=ROWS, REAL=_real(dtype), LANES=lanes,
    )  # fmt: skip
    return made.sum(0)


def values(x: Mixed, dtype: torch.dtype) -> torch.Tensor:
    """:func:`wholegrad.kernels.pointwise.values`"""
    found = _walked(x, dtype, True, (), "", False, None).value
    assert found is not None
    return found


def pull(x: Mixed, grad: torch.Tensor) -> dict[int, torch.Tensor]:
    """:func:`wholegrad.kernels.pointwise.pull`"""
    return _walked(x, grad.dtype, False, x.parts[0].program.wanted, MAP, False, grad).grads


def total(x: Mixed, dtype: torch.dtype, share: torch.Tensor | None) -> Walked:
    """:func:`wholegrad.kernels.pointwise.total`"""
    wanted = () if share is None else x.parts[0].program.wanted
    return _walked(x, dtype, False, wanted, "" if share is None else "one", True, share)


def _walked(
    x: Mixed,
    dtype: torch.dtype,
    value: bool,
    slopes: tuple[int, ...],
    grad: str,
    summed: bool,
    given: torch.Tensor | None,
) -> Walked:
    n, channels, rows, columns = x.shape
    leaves = x.parts[0].program.leaves
    stored = [i for i in slopes if leaves[i].kind == MAP]
    small = [i for i in slopes if leaves[i].kind != MAP]
    where, lanes = x.first.device, _lanes(1, columns)
    blocks = triton.cdiv(columns, lanes)
    outputs = [torch.empty((n, channels, rows, columns), dtype=dtype, device=where) for _ in range(value + len(stored))]
    sums = [
        torch.zeros((n, channels, rows * blocks), dtype=torch.float64, device=where) for _ in range(summed + len(small))
    ]
    if n * channels * rows * columns:
        (bare,) = _bare(x.parts)
        by = {} if given is None else _arguments("g", _given(given, grad))
        compiled(walk(bare.program, value, slopes, grad, summed))[(rows, blocks, n * channels)](
            **_arguments("x", x), **by, **{f"o{k}": each for k, each in enumerate(outputs)},
            **{f"t{k}": each for k, each in enumerate(sums)}, columns=columns, rows=rows, CHANNELS=channels,
            REAL=_real(dtype), LANES=lanes,
        )  # fmt: skip
    added = [each.sum(-1) for each in sums]
    made = outputs.pop(0) if value else None
    totals = added.pop(0) if summed else None
    grads = dict(zip(stored, outputs, strict=True))
    for i, each in zip(small, added, strict=True):
        grads[i] = each.sum(0) if leaves[i].kind == "each" else each.sum()
    return Walked(made, grads, totals)


def _given(grad: torch.Tensor, kind: str) -> Mixed:
    leaf = IDENTITY.leaves[0]._replace(kind=kind)
    return Mixed((Part(Program((leaf,)), grad.shape[1] if kind == MAP else 1),), (grad,))


def aligned(x: Mixed) -> Mixed:
    """Maps are read as they lie."""
    return x
