"""Writes LLVM's text: loops, branches, and vectors of one width, so that kernels read like what they do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

Value = str | int  # the name of a 64-bit integer, or a constant


@dataclass
class Loop:
    """A loop being written: its ``index``, and ``values`` that iterations hand on; set ``after`` to the next ones.

    Once the loop is closed, ``values`` are those after its last iteration.
    """

    index: str
    values: list[str]
    after: list[str] = field(default_factory=list)


class Code:
    """The body of one function.

    Args:
        real: ``float`` or ``double``.
        lanes: elements of a vector.
    """

    def __init__(self, real: str, lanes: int) -> None:
        self.real, self.lanes = real, lanes
        self.bytes = 4 if real == "float" else 8
        self.vector = f"<{lanes} x {real}>"
        self.suffix = f"v{lanes}f{8 * self.bytes}"
        self.lines: list[str] = []
        self._count = 0
        self._block = "entry"

    def fresh(self, kind: str = "v") -> str:
        self._count += 1
        return f"{kind}{self._count}"

    def set(self, text: str) -> str:
        """A new name for what an instruction gives."""
        name = f"%{self.fresh()}"
        self.lines.append(f"  {name} = {text}")
        return name

    def do(self, text: str) -> None:
        self.lines.append(f"  {text}")

    def _start(self, label: str) -> None:
        self.lines.append(f"{label}:")
        self._block = label

    # Integers

    def add(self, a: Value, b: Value) -> Value:
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if 0 in (a, b):
            return a if b == 0 else b
        return self.set(f"add nsw i64 {a}, {b}")

    def sub(self, a: Value, b: Value) -> Value:
        return a if b == 0 else self.set(f"sub nsw i64 {a}, {b}")

    def mul(self, a: Value, b: Value) -> Value:
        if isinstance(a, int) and isinstance(b, int):
            return a * b
        if 0 in (a, b):
            return 0
        if 1 in (a, b):
            return a if b == 1 else b
        return self.set(f"mul nsw i64 {a}, {b}")

    def less(self, a: Value, b: Value) -> str:
        return self.set(f"icmp slt i64 {a}, {b}")

    def least(self, a: Value, b: Value) -> str:
        return self.set(f"call i64 @llvm.smin.i64(i64 {a}, i64 {b})")

    def most(self, a: Value, b: Value) -> str:
        return self.set(f"call i64 @llvm.smax.i64(i64 {a}, i64 {b})")

    def both(self, a: str, b: str) -> str:
        return self.set(f"and i1 {a}, {b}")

    # Memory

    def at(self, pointer: str, offset: Value, kind: str | None = None) -> str:
        """The address ``offset`` elements further."""
        return pointer if offset == 0 else self.set(f"getelementptr {kind or self.real}, ptr {pointer}, i64 {offset}")

    def integer(self, pointer: str, index: int) -> str:
        return self.set(f"load i64, ptr {self.at(pointer, index, 'i64')}")

    def load(self, pointer: str) -> str:
        return self.set(f"load {self.vector}, ptr {pointer}, align {self.bytes}")

    def store(self, value: str, pointer: str) -> None:
        self.do(f"store {self.vector} {value}, ptr {pointer}, align {self.bytes}")

    def fetch(self, pointer: str, write: bool = False) -> None:
        """Ask for the memory at an address ahead of its use; any address will do."""
        self.do(f"call void @llvm.prefetch.p0(ptr {pointer}, i32 {int(write)}, i32 {3 if write else 2}, i32 1)")

    def fence(self) -> None:
        """Loads stay on their side of it. No instruction; else the compiler would load far ahead, and spill."""
        self.do('fence syncscope("singlethread") seq_cst')

    def lanes_within(self, low: Value, high: Value) -> str:
        """A mask of the lanes whose number lies in ``[low, high)``."""
        kind = f"<{self.lanes} x i64>"
        numbers = "<" + ", ".join(f"i64 {i}" for i in range(self.lanes)) + ">"
        above = self.set(f"icmp sge {kind} {numbers}, {self._spread('i64', low)}")
        below = self.set(f"icmp slt {kind} {numbers}, {self._spread('i64', high)}")
        return self.set(f"and <{self.lanes} x i1> {above}, {below}")

    def load_small(self, pointer: str, mask: str = "") -> str:
        """Unsigned 8-bit integers as real numbers; zero where a mask is given and off."""
        kind = f"<{self.lanes} x i8>"
        if mask:
            name = f"@llvm.masked.load.v{self.lanes}i8.p0"
            found = self.set(
                f"call {kind} {name}(ptr {pointer}, i32 1, <{self.lanes} x i1> {mask}, {kind} zeroinitializer)"
            )
        else:
            found = self.set(f"load {kind}, ptr {pointer}, align 1")
        whole = self.set(f"zext {kind} {found} to <{self.lanes} x i32>")
        return self.set(f"sitofp <{self.lanes} x i32> {whole} to {self.vector}")

    def load_small_apart(self, pointer: str, stride: int) -> list[str]:
        """Every ``stride``-th unsigned 8-bit integer from each of the first ``stride`` on, as real numbers.

        One load of whole numbers of ``stride`` bytes (2, 4 or 8), of which each byte is shifted down (little endian).
        """
        kind, parts = f"<{self.lanes} x i{8 * stride}>", []
        both = self.set(f"load {kind}, ptr {pointer}, align 1")
        for k in range(stride):
            shift, low = (f"<{', '.join([f'i{8 * stride} {number}'] * self.lanes)}>" for number in (8 * k, 255))
            one = self.set(f"lshr {kind} {both}, {shift}") if k else both
            one = self.set(f"and {kind} {one}, {low}") if k < stride - 1 else one
            if stride != 4:
                one = self.set(f"{'zext' if stride < 4 else 'trunc'} {kind} {one} to <{self.lanes} x i32>")
            parts.append(self.set(f"sitofp <{self.lanes} x i32> {one} to {self.vector}"))
        return parts

    def load_where(self, mask: str, pointer: str) -> str:
        """Elements where the mask is on, zero elsewhere; the rest of memory is not touched."""
        name = f"@llvm.masked.load.{self.suffix}.p0"
        arguments = f"ptr {pointer}, i32 {self.bytes}, <{self.lanes} x i1> {mask}, {self.vector} zeroinitializer"
        return self.set(f"call {self.vector} {name}({arguments})")

    def store_where(self, mask: str, value: str, pointer: str) -> None:
        name = f"@llvm.masked.store.{self.suffix}.p0"
        self.do(f"call void {name}({self.vector} {value}, ptr {pointer}, i32 {self.bytes}, <{self.lanes} x i1> {mask})")

    def store_mask(self, values: str, pointer: str, mask: str = "") -> None:
        """A byte for each lane, 1 where ``values``, a mask, is on; only where the other mask is on, if there is one."""
        kind = f"<{self.lanes} x i8>"
        found = self.set(f"zext <{self.lanes} x i1> {values} to {kind}")
        if not mask:
            self.do(f"store {kind} {found}, ptr {pointer}, align 1")
            return
        name = f"@llvm.masked.store.v{self.lanes}i8.p0"
        self.do(f"call void {name}({kind} {found}, ptr {pointer}, i32 1, <{self.lanes} x i1> {mask})")

    # Vectors

    def _spread(self, kind: str, value: Value) -> str:
        one = self.set(f"insertelement <{self.lanes} x {kind}> poison, {kind} {value}, i64 0")
        mask = f"<{self.lanes} x i32> zeroinitializer"
        return self.set(f"shufflevector <{self.lanes} x {kind}> {one}, <{self.lanes} x {kind}> poison, {mask}")

    def broadcast(self, pointer: str) -> str:
        """One element in every lane."""
        return self._spread(self.real, self.set(f"load {self.real}, ptr {pointer}"))

    def fma(self, a: str, b: str, c: str) -> str:
        """``a b + c`` with one rounding."""
        return self.set(
            f"call {self.vector} @llvm.fma.{self.suffix}({self.vector} {a}, {self.vector} {b}, {self.vector} {c})"
        )

    def real2(self, op: str, a: str, b: str) -> str:
        """``fadd``, ``fsub``, ``fmul`` or ``fdiv``, lane by lane."""
        return self.set(f"{op} {self.vector} {a}, {b}")

    def compare(self, kind: str, a: str, b: str) -> str:
        """A mask of the lanes where an ``fcmp`` of this kind holds."""
        return self.set(f"fcmp {kind} {self.vector} {a}, {b}")

    def select(self, mask: str, a: str, b: str) -> str:
        """``a`` where the mask is on, ``b`` elsewhere."""
        return self.set(f"select <{self.lanes} x i1> {mask}, {self.vector} {a}, {self.vector} {b}")

    def call(self, intrinsic: str, a: str) -> str:
        """An intrinsic of one vector."""
        return self.set(f"call {self.vector} @{intrinsic}.{self.suffix}({self.vector} {a})")

    def add_wide(self, pointer: str, value: str) -> None:
        """Add a vector, in float64, to the one in memory."""
        wide = f"<{self.lanes} x double>"
        before = self.set(f"load {wide}, ptr {pointer}, align 8")
        exact = value if self.real == "double" else self.set(f"fpext {self.vector} {value} to {wide}")
        self.do(f"store {wide} {self.set(f'fadd {wide} {before}, {exact}')}, ptr {pointer}, align 8")

    def shuffle(self, a: str, b: str, picks: Sequence[int]) -> str:
        mask = "<" + ", ".join(f"i32 {i}" for i in picks) + ">"
        return self.set(f"shufflevector {self.vector} {a}, {self.vector} {b}, <{self.lanes} x i32> {mask}")

    def interleave(self, parts: Sequence[str]) -> list[str]:
        """Vectors that hold ``parts[0][0], parts[1][0], .., parts[0][1], ..`` in order."""
        n, lanes = len(parts), self.lanes
        if n == 1:
            return list(parts)
        if n & (n - 1) == 0:  # halves first: each step picks from two vectors
            even, odd = self.interleave(parts[::2]), self.interleave(parts[1::2])
            low = [i // 2 + lanes * (i % 2) for i in range(lanes)]
            high = [i + lanes // 2 for i in low]
            return [self.shuffle(a, b, picks) for a, b in zip(even, odd, strict=True) for picks in (low, high)]
        return [self._pick(parts, [divmod(k * lanes + i, n) for i in range(lanes)]) for k in range(n)]

    def part(self, vectors: Sequence[str]) -> list[str]:
        """The inverse of :meth:`interleave`."""
        n, lanes = len(vectors), self.lanes
        if n == 1:
            return list(vectors)
        if n & (n - 1) == 0:
            pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
            even, odd = (self.part([self.shuffle(a, b, range(k, 2 * lanes, 2)) for a, b in pairs]) for k in (0, 1))
            return [each for pair in zip(even, odd, strict=True) for each in pair]
        return [self._pick(vectors, [divmod(i * n + k, lanes)[::-1] for i in range(lanes)]) for k in range(n)]

    def _pick(self, parts: Sequence[str], places: Sequence[tuple[int, int]]) -> str:
        """Lane i is element ``places[i][0]`` of vector ``places[i][1]``."""
        result = parts[0]
        for number, each in enumerate(parts):
            picks = [self.lanes + place if which == number else i for i, (place, which) in enumerate(places)]
            result = self.shuffle(result, each, picks)
        return result

    # Control

    @contextmanager
    def loop(self, start: Value, stop: Value, step: Value = 1, values: Sequence[str] = ()) -> Iterator[Loop]:
        """From ``start`` to below ``stop``; ``values``, all vectors, are handed from iteration to iteration."""
        head, body, end = (self.fresh(part) for part in ("head", "body", "end"))
        before = self._block
        loop = Loop(f"%{self.fresh()}", [f"%{self.fresh()}" for _ in values])
        following = f"%{self.fresh()}"
        self.do(f"br label %{head}")
        self._start(head)
        place = len(self.lines)
        again = self.less(loop.index, stop)
        self.do(f"br i1 {again}, label %{body}, label %{end}")
        self._start(body)
        yield loop
        self.do(f"{following} = add nsw i64 {loop.index}, {step}")
        self.do(f"br label %{head}")
        phis = [f"  {loop.index} = phi i64 [{start}, %{before}], [{following}, %{self._block}]"]
        for name, first, last in zip(loop.values, values, loop.after, strict=True):
            phis.append(f"  {name} = phi {self.vector} [{first}, %{before}], [{last}, %{self._block}]")
        self.lines[place:place] = phis
        self._start(end)

    @contextmanager
    def when(self, condition: str) -> Iterator[None]:
        then, end = self.fresh("then"), self.fresh("end")
        self.do(f"br i1 {condition}, label %{then}, label %{end}")
        self._start(then)
        yield
        self.do(f"br label %{end}")
        self._start(end)

    @contextmanager
    def unless(self, condition: str) -> Iterator[None]:
        with self.when(self.set(f"xor i1 {condition}, true")):
            yield

    def function(self, name: str, arguments: str, internal: bool = False) -> str:
        """The function as text; ``arguments`` as LLVM declares them."""
        wide = 8 * self.bytes * self.lanes
        hints = f'nounwind "prefer-vector-width"="{wide}" "min-legal-vector-width"="{wide}"'
        start = f"define {'internal ' if internal else ''}void @{name}({arguments}) {hints}"
        return "\n".join([start + " {", "entry:", *self.lines, "  ret void", "}", ""])
