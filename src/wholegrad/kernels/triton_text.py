"""Kernels in Triton for maps that are computed as they are read: the text that :mod:`triton_mixed` compiles.

A :class:`~wholegrad.kernels.expression.Program` becomes a few lines on a block of elements, so that bytes become
fractions, activations are applied and maps are joined in registers, where the elements are read. Every map comes with a
step for samples, channels, rows and columns, in elements; it is never copied to lie otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from wholegrad.kernels.expression import EACH, MAP, Program
from wholegrad.kernels.stage import Part


class Dual(NamedTuple):
    """Names of a value and of its derivative; None where it does not depend on the leaf."""

    value: str
    slope: str | None = None


class Text:
    """Lines of one kernel; ``set`` gives an expression a name."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.indent = 1
        self._count = 0

    def do(self, line: str) -> None:
        self.lines.append("    " * self.indent + line)

    def set(self, expression: str) -> str:
        self._count += 1
        name = f"v{self._count}"
        self.do(f"{name} = {expression}")
        return name


def number(value: float) -> str:
    """A constant in the kernel's precision."""
    return f"tl.full([], {value!r}, REAL)"


def evaluate(text: Text, program: Program, leaves: Sequence[str], wrt: int | None = None) -> Dual:
    """Write what computes ``program`` of blocks of its leaves, with its derivative with respect to leaf ``wrt``."""
    found = [Dual(name, number(1.0) if i == wrt else None) for i, name in enumerate(leaves)]
    for step in program.steps:
        given = [found[i] for i in step.values]
        value, slope = _OPS[step.op](text, given, step.numbers)
        found.append(Dual(text.set(value), None if slope is None else text.set(slope)))
    return found[-1]


Written = tuple[str, str | None]
Numbers = tuple[float, ...]


def _times(slope: str | None, factor: str) -> str | None:
    return None if slope is None else f"{slope} * {factor}"


def _plus(a: str | None, b: str | None, sign: str = "+") -> str | None:
    if b is None:
        return a
    return f"{'-' if sign == '-' else ''}({b})" if a is None else f"({a}) {sign} ({b})"


def _linear(sign: str) -> Callable[[Text, list[Dual], Numbers], Written]:
    def linear(text: Text, given: list[Dual], numbers: Numbers) -> Written:
        (a, b), alpha = given, number(numbers[0] if numbers else 1.0)
        if not numbers or numbers[0] == 1.0:
            return f"{a.value} {sign} {b.value}", _plus(a.slope, b.slope, sign)
        return f"{a.value} {sign} {alpha} * {b.value}", _plus(a.slope, _times(b.slope, alpha), sign)

    return linear


def _mul(text: Text, given: list[Dual], numbers: Numbers) -> Written:
    a, b = given
    return f"{a.value} * {b.value}", _plus(_times(a.slope, b.value), _times(b.slope, a.value))


def _div(text: Text, given: list[Dual], numbers: Numbers) -> Written:
    a, b = given
    value = text.set(f"{a.value} / {b.value}")
    slope = _plus(a.slope, _times(b.slope, value), "-")
    return value, None if slope is None else f"({slope}) / {b.value}"


def _fraction(text: Text, given: list[Dual], numbers: Numbers) -> Written:
    """``a / 255`` rounded as a division rounds it: a product, and what it missed times the same."""
    near, inverse = text.set(f"{given[0].value} * {number(1 / 255)}"), number(1 / 255)
    missed = text.set(f"tl.fma({near}, {near} * 0 - 255.0, {given[0].value})")
    return f"tl.fma({missed}, {near} * 0 + {inverse}, {near})", None


def _where(text: Text, given: list[Dual], numbers: Numbers) -> Written:
    mask, a, b = given
    value = f"tl.where({mask.value}, {a.value}, {b.value})"
    if a.slope is None and b.slope is None:
        return value, None
    zero = number(0.0)
    return value, f"tl.where({mask.value}, {a.slope or zero}, {b.slope or zero})"


def _leaky(text: Text, given: list[Dual], numbers: Numbers) -> Written:
    (a,), by = given, number(numbers[0])
    on = f"{a.value} > 0"
    slope = None if a.slope is None else f"tl.where({on}, {a.slope}, {a.slope} * {by})"
    return f"tl.where({on}, {a.value}, {a.value} * {by})", slope


def _prelu(text: Text, given: list[Dual], numbers: Numbers) -> Written:
    a, b = given
    off = _plus(_times(a.slope, b.value), _times(b.slope, a.value))
    slope = None if off is None else f"tl.where({a.value} > 0, {a.slope or number(0.0)}, {off})"
    return f"tl.where({a.value} > 0, {a.value}, {a.value} * {b.value})", slope


def _relu(text: Text, given: list[Dual], numbers: Numbers) -> Written:
    (a,), zero = given, number(0.0)
    slope = None if a.slope is None else f"tl.where({a.value} <= 0, {zero}, {a.slope})"
    return f"tl.where({a.value} <= 0, {zero}, {a.value})", slope


def _clamp(ends: tuple[str, str]) -> Callable[[Text, list[Dual], Numbers], Written]:
    def clamp(text: Text, given: list[Dual], numbers: Numbers) -> Written:
        (a,), low, high, zero = given, number(numbers[0]), number(numbers[1]), number(0.0)
        value = text.set(f"tl.where({a.value} < {low}, {low}, {a.value})")
        inside = f"({a.value} {ends[0]} {low}) & ({a.value} {ends[1]} {high})"
        slope = None if a.slope is None else f"tl.where({inside}, {a.slope}, {zero})"
        return f"tl.where({value} > {high}, {high}, {value})", slope

    return clamp


def _compare(sign: str) -> Callable[[Text, list[Dual], Numbers], Written]:
    def compare(text: Text, given: list[Dual], numbers: Numbers) -> Written:
        other = given[1].value if len(given) > 1 else number(numbers[0])
        return f"{given[0].value} {sign} {other}", None

    return compare


def _abs(text: Text, given: list[Dual], numbers: Numbers) -> Written:
    (a,), zero = given, number(0.0)
    slope = None
    if a.slope is not None:
        slope = f"tl.where({a.value} < 0, -({a.slope}), tl.where({a.value} > 0, {a.slope}, {zero}))"
    return f"tl.abs({a.value})", slope


def _exp(text: Text, given: list[Dual], numbers: Numbers) -> Written:
    value = text.set(f"tl.exp({given[0].value})")
    return value, _times(given[0].slope, value)


def _sigmoid(text: Text, given: list[Dual], numbers: Numbers) -> Written:
    value = text.set(f"1.0 / (1.0 + tl.exp(-{given[0].value}))")
    return value, _times(given[0].slope, f"({value} * (1.0 - {value}))")


def _silu(text: Text, given: list[Dual], numbers: Numbers) -> Written:
    (a,) = given
    gate = text.set(f"1.0 / (1.0 + tl.exp(-{a.value}))")
    return f"{a.value} * {gate}", _times(a.slope, f"({gate} * (1.0 + {a.value} * (1.0 - {gate})))")


def _bce(text: Text, given: list[Dual], numbers: Numbers) -> Written:
    """Of a logit and a truth without slope: ``max(x, 0) - x y + log(1 + exp(-|x|))``."""
    x, y = given
    decay = text.set(f"tl.exp(-tl.abs({x.value}))")
    high = f"tl.where({x.value} < 0, {number(0.0)}, {x.value})"
    # log(1 + d) with what 1 + d rounded away made good: float32's own log is good to a rounding or two.
    sum1 = text.set(f"1.0 + {decay}")
    log = text.set(f"tl.log({sum1}) + ({decay} - ({sum1} - 1.0)) / {sum1}")
    slope = None
    if x.slope is not None:
        chance = text.set(f"tl.where({x.value} > 0, {number(1.0)}, {decay}) / {sum1}")
        slope = f"{x.slope} * ({chance} - {y.value})"
    return f"({high} - {x.value} * {y.value}) + {log}", slope


_OPS: dict[str, Callable[[Text, list[Dual], Numbers], Written]] = {
    "constant": lambda text, given, numbers: (number(numbers[0]), None),
    "u8": _fraction,
    "add": _linear("+"),
    "sub": _linear("-"),
    "mul": _mul,
    "div": _div,
    "neg": lambda text, given, numbers: (f"-{given[0].value}", _plus(None, given[0].slope, "-")),
    "leaky": _leaky,
    "prelu": _prelu,
    "relu": _relu,
    "clamp": _clamp((">=", "<=")),
    "hardtanh": _clamp((">", "<")),
    "lt": _compare("<"),
    "le": _compare("<="),
    "gt": _compare(">"),
    "ge": _compare(">="),
    "eq": _compare("=="),
    "ne": _compare("!="),
    "and": lambda text, given, numbers: (f"{given[0].value} & {given[1].value}", None),
    "or": lambda text, given, numbers: (f"{given[0].value} | {given[1].value}", None),
    "not": lambda text, given, numbers: (f"{given[0].value} == 0", None),
    "real": lambda text, given, numbers: (f"tl.where({given[0].value}, {number(1.0)}, {number(0.0)})", None),
    "where": _where,
    "abs": _abs,
    "square": lambda text, given, numbers: (
        f"{given[0].value} * {given[0].value}", _times(given[0].slope, f"(2.0 * {given[0].value})")
    ),
    "exp": _exp,
    "sigmoid": _sigmoid,
    "silu": _silu,
    "bce": _bce,
}  # fmt: skip


def names(of: str, parts: Sequence[Part]) -> list[str]:
    """The leaves of all parts as arguments: an address each, and for maps four steps."""
    found = []
    for i, (p, k) in enumerate((p, k) for p, part in enumerate(parts) for k in range(len(part.program.leaves))):
        kind = parts[p].program.leaves[k].kind
        found += [f"{of}{i}"] + [f"{of}{i}_{step}" for step in "ncy"] * (kind == MAP) + [f"{of}{i}_X"] * (kind == MAP)
    return found


def loads(text: Text, of: str, first: int, program: Program, place: tuple[str, str, str, str], mask: str) -> list[str]:
    """Read every leaf of a program whose first leaf is number ``first``.

    Steps of a view are those of what it looks at, so that channels and rows times theirs may pass 2**31.

    Args:
        place: sample (64 bits), channel, row and column, scalars or blocks that broadcast to the block that is wanted.
        mask: where elements are; elsewhere zero is read.
    """
    sample, channel, row, column = place
    found, far, down = [], "", ""
    if any(leaf.kind == MAP for leaf in program.leaves):
        far, down = text.set(f"{sample} * 0 + {channel}"), text.set(f"{sample} * 0 + {row}")
    for k, leaf in enumerate(program.leaves, first):
        name = f"{of}{k}"
        if leaf.kind == MAP:
            at = f"{sample} * {name}_n + {far} * {name}_c + {down} * {name}_y + {column} * {name}_X"
            found.append(text.set(f"tl.load({name} + ({at}), mask={mask}, other=0).to(REAL)"))
        elif leaf.kind == EACH:
            found.append(text.set(f"tl.load({name} + {channel}).to(REAL)"))
        else:
            found.append(text.set(f"tl.load({name}).to(REAL)"))
    return found


def read(text: Text, of: str, first: int, part: Part, place: tuple[str, str, str, str], mask: str) -> str:
    """One part's elements there; zero where ``mask`` is off, whatever the program makes of zeros."""
    value = evaluate(text, part.program, loads(text, of, first, part.program, place, mask)).value
    plain = not part.program.steps
    return value if plain else text.set(f"tl.where({mask}, {value}, {number(0.0)})")
