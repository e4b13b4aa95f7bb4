"""How each traced call runs: on maps tile by tile, as a reduction, on small tensors, or (rule 10) on maps held whole.

A call on maps runs by its rule. Where it has none, or uses its op in a way without locality, its maps are *gathered*
into whole tensors and it runs on those, as does whatever follows, until a whole tensor meets a map again and is
*spread* along it: that is a dense region. A call whose maps are too large for one tensor (rule 8) is refused.
"""

from __future__ import annotations

from typing import Any

import torch

from wholegrad.errors import UnsupportedOpError
from wholegrad.graph.expand import expansion_of
from wholegrad.graph.graph import Kind, Node, Ref, Spec, references, substitute, unsupported
from wholegrad.graph.layout import Layout, aligned, broadcast, map_layout, plain
from wholegrad.graph.rules import LayoutRequest, MapRule, ReductionRule, rule_for
from wholegrad.graph.rules.base import bind
from wholegrad.graph.rules.fill import FILLS, normal_form
from wholegrad.graph.rules.random import NUMBERS, is_random
from wholegrad.graph.rules.reduction import GATHER

aten = torch.ops.aten
ELEMENT_LIMIT = 2**31  # rule 8
SPREAD_ELEMENTS = 1 << 20  # a small tensor's window op that makes more than this many runs tile by tile
_COPIES = {
    aten._to_copy.default, aten.clone.default, aten.view.default, aten._unsafe_view.default, aten.expand.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.permute.default, aten.transpose.int, aten.detach.default,
}  # fmt: skip
_NO_GRADIENT = {
    aten.detach.default, aten.full_like.default, aten.zeros_like.default, aten.ones_like.default,
    aten.empty_like.default, *NUMBERS,
}  # fmt: skip


class Builder:
    """The list of nodes while it grows."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._gathered: dict[Ref, Ref] = {}
        self._spread: dict[tuple[Ref, Layout], Ref] = {}

    def spec(self, ref: Ref) -> Spec:
        return self.nodes[ref.node].outputs[ref.out]

    def add(
        self,
        kind: Kind,
        name: str,
        specs: tuple[Spec, ...],
        *,
        op: Any = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        path: str = "",
        grad: bool = False,
        draw: int = -1,
    ) -> tuple[Ref, ...]:
        """A node as given."""
        index, kwargs = len(self.nodes), kwargs or {}
        operands = tuple(dict.fromkeys(references((args, kwargs))))
        self.nodes.append(Node(index, name, kind, op, args, kwargs, operands, specs, path, grad, draw))
        return self.nodes[index].refs

    def call(
        self,
        name: str,
        op: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: tuple[torch.Tensor, ...],
        path: str,
        grad: bool = True,
        draw: int = -1,
    ) -> tuple[Ref, ...]:
        """A call, as the kind of node that it can be.

        Args:
            outputs: what PyTorch inferred, on the meta device.
            grad: whether autograd was on.

        Raises:
            UnsupportedOpError: it can be none.
        """
        place = f"{path or 'model'} ({op})"
        draw = draw if is_random(op) else -1  # an op taken apart hands its number on to its parts
        if op in _COPIES and isinstance(args[0], Ref) and self.nodes[args[0].node].op is aten.full.default:
            op, args, kwargs = aten.full.default, (list(outputs[0].shape), self.nodes[args[0].node].args[1]), {}
        if op in FILLS:
            op, args, kwargs = normal_form(op, args, kwargs, tuple(outputs[0].shape))
        if expansion := expansion_of(op, args, self.spec):
            return expansion(self, name, args, outputs, path, grad)
        found = _Call(name, op, args, kwargs, outputs, path, place, grad, draw)
        if not any(self.spec(ref).is_map for ref in references((args, kwargs))):
            found = self._respread(found)
        if not any(self.spec(ref).is_map for ref in references((found.args, found.kwargs))):
            return self._small(found)
        try:
            return self._local(found)
        except UnsupportedOpError as refusal:
            if is_random(op):
                raise
            return self._dense(found, refusal)

    def derived(self, name: str, op: Any, *args: Any, path: str, grad: bool = True) -> Ref:
        """A call that was not traced: its output's shape is inferred here. Returns the first output."""

        def ghost(ref: Ref) -> torch.Tensor:
            return torch.empty(self.spec(ref).shape, dtype=self.spec(ref).dtype, device="meta")

        result = op(*substitute(args, ghost))
        outputs = tuple(result) if isinstance(result, tuple | list) else (result,)
        return self.call(f"{name}_{len(self.nodes)}", op, args, {}, outputs, path, grad)[0]

    def _grad(self, call: _Call) -> bool:
        return (
            call.grad
            and call.op not in _NO_GRADIENT
            and any(self.nodes[ref.node].needs_grad for ref in references((call.args, call.kwargs)))
            and any(out.dtype.is_floating_point or out.dtype.is_complex for out in call.outputs)
        )

    def _put(self, kind: Kind, call: _Call, layouts: tuple[Layout, ...]) -> tuple[Ref, ...]:
        specs = tuple(Spec(layout, out.dtype) for layout, out in zip(layouts, call.outputs, strict=True))
        return self.add(
            kind, call.name, specs, op=call.op, args=call.args, kwargs=call.kwargs, path=call.path,
            grad=self._grad(call), draw=call.draw,
        )  # fmt: skip

    def _local(self, call: _Call) -> tuple[Ref, ...]:
        """A map or a reduction, by the op's rule."""
        rule = rule_for(call.op)
        if rule is None:
            raise unsupported(call.place, "has no rule, so it cannot run tile by tile")
        if rule.aligned:
            call = self._aligned(call, rule.whole)
        refs = list(dict.fromkeys(references((call.args, call.kwargs))))
        specs = {ref: self.spec(ref) for ref in refs}
        request = LayoutRequest(call.place, call.op, call.args, call.kwargs, specs, call.shapes)
        layouts = rule.layouts(request)
        maps = [Spec(layout, torch.float32).is_map for layout in layouts]
        if all(maps) and isinstance(rule, MapRule):
            return self._put(Kind.MAP, call, layouts)
        if not any(maps) and isinstance(rule, ReductionRule):
            return self._put(Kind.REDUCTION, call, layouts)
        raise request.refuse("is neither a map nor a reduction")

    def _small(self, call: _Call) -> tuple[Ref, ...]:
        large = max((torch.Size(shape).numel() for shape in call.shapes), default=0) >= ELEMENT_LIMIT
        if large and call.op not in FILLS:  # a fill costs nothing until it is read
            raise unsupported(call.place, f"makes a whole tensor of shape {call.shapes[0]}")
        for ref in references((call.args, call.kwargs)):
            if self.spec(ref).numel >= ELEMENT_LIMIT:
                raise unsupported(call.place, f"reads a whole tensor of shape {self.spec(ref).shape}")
        return self._put(Kind.SMALL, call, tuple(plain(shape) for shape in call.shapes))

    # Small tensors that run along the image.

    def _aligned(self, call: _Call, whole: tuple[str, ...]) -> _Call:
        """The call with small operands that run along its maps spread along them, but for those named in ``whole``."""
        bound = bind(call.op, call.args, call.kwargs)
        kept = set(references([bound[name] for name in whole]))
        refs = list(dict.fromkeys(references((call.args, call.kwargs))))
        maps = [self.spec(ref).layout for ref in refs if self.spec(ref).is_map]
        joins = call.op is aten.cat.default  # whose operands differ in size along one dimension
        layout = (None if joins else broadcast(maps, call.shapes[0])) or max(maps, key=len)
        table: dict[Ref, Ref] = {}
        for ref in refs:
            spec = self.spec(ref)
            along = self._joined(call, layout, spec) if joins else self._selected(call, ref, layout)
            if ref in kept or spec.is_map or spec.numel <= 1:
                continue
            if (found := self._alignment(spec, along)) is not None:
                table[ref] = self._along(ref, found, call)
        return call.replaced(table) if table else call

    def _joined(self, call: _Call, layout: Layout, spec: Spec) -> Layout:
        """The layout that an operand of ``cat`` has: the map's, but for its own size along the joined dimension."""
        dim = (call.args[1] if len(call.args) > 1 else 0) % len(layout)
        if len(spec.shape) != len(layout) or len(layout[dim]) != 1:
            return layout
        return (*layout[:dim], (layout[dim][0]._replace(size=spec.shape[dim]),), *layout[dim + 1 :])

    def _selected(self, call: _Call, ref: Ref, layout: Layout) -> Layout:
        """The layout that an operand lines up with: what ``select_scatter`` writes lacks the dimension written to."""
        if call.op is not aten.select_scatter.default or ref != call.args[1]:
            return layout
        dim = call.args[2] % len(layout)
        return (*layout[:dim], *layout[dim + 1 :])

    def _alignment(self, spec: Spec, layout: Layout) -> Layout | None:
        """How a small tensor runs along a map; with leading dimensions of size one where it lacks rows."""
        shape = (*[1] * (len(layout) - len(spec.shape)), *spec.shape)
        return aligned(shape, layout)

    def _along(self, ref: Ref, layout: Layout, call: _Call) -> Ref:
        """A small value as a map with this layout: made by each tile if it is a constant, else read by box."""
        if (ref, layout) in self._spread:
            return self._spread[ref, layout]
        node, spec = self.nodes[ref.node], self.spec(ref)
        if node.op in FILLS:
            found = self.add(
                Kind.MAP, f"{node.name}_map", (Spec(layout, spec.dtype),), op=node.op, args=node.args,
                kwargs=node.kwargs, path=node.path, draw=node.draw,
            )[0]  # fmt: skip
        else:
            source = ref
            if len(layout) != len(spec.shape):
                shape = [1] * (len(layout) - len(spec.shape)) + list(spec.shape)
                source = self.derived(f"{node.name}_rows", aten.view.default, ref, shape, path=node.path)
            found = self.add(
                Kind.SPREAD, f"{node.name}_spread", (Spec(layout, spec.dtype),), args=(source,),
                path=call.path, grad=node.needs_grad,
            )[0]  # fmt: skip
        self._spread[ref, layout] = found
        return found

    def _respread(self, call: _Call) -> _Call:
        """A window op on small tensors that makes a large one: its input read by box, so that it runs tile by tile."""
        rule = rule_for(call.op)
        first = next(iter(call.args), None)
        large = torch.Size(call.shapes[0]).numel() > SPREAD_ELEMENTS if call.shapes else False
        if not large or not isinstance(rule, MapRule) or rule.aligned or not isinstance(first, Ref):
            return call
        shape = self.spec(first).shape
        if len(shape) != 4 or len(call.shapes[0]) != 4:
            return call
        return call.replaced({first: self._along(first, map_layout(shape), call)})

    # Dense regions.

    def _dense(self, call: _Call, refusal: UnsupportedOpError) -> tuple[Ref, ...]:
        refs = list(dict.fromkeys(references((call.args, call.kwargs))))
        sizes = [self.spec(ref).numel for ref in refs] + [torch.Size(shape).numel() for shape in call.shapes]
        if max(sizes) >= ELEMENT_LIMIT:
            shapes = ", ".join(str(self.spec(ref).shape) for ref in refs)
            cause = f"{refusal.cause}; held whole, {shapes} to {call.shapes[0]} reaches 2**31 elements"
            raise unsupported(call.place, cause)
        table = {ref: self._gather(ref, call, refusal.cause) for ref in refs if self.spec(ref).is_map}
        return self._small(call.replaced(table))

    def _gather(self, ref: Ref, call: _Call, cause: str) -> Ref:
        node = self.nodes[ref.node]
        if node.kind is Kind.SPREAD:
            return node.operands[0]
        if ref not in self._gathered:
            spec = self.spec(ref)
            whole = Spec(plain(spec.shape), spec.dtype)
            self._gathered[ref] = self.add(
                Kind.REDUCTION, f"{node.name}_whole", (whole,), op=GATHER, args=(ref,), path=call.path,
                grad=node.needs_grad and call.grad,
            )[0]  # fmt: skip
        return self._gathered[ref]


class _Call:
    """One call, before it is a node."""

    def __init__(
        self, name: str, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: tuple[torch.Tensor, ...],
        path: str, place: str, grad: bool, draw: int,
    ) -> None:  # fmt: skip
        self.name, self.op, self.args, self.kwargs, self.outputs = name, op, args, kwargs, outputs
        self.path, self.place, self.grad, self.draw = path, place, grad, draw

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(out.shape) for out in self.outputs)

    def replaced(self, table: dict[Ref, Ref]) -> _Call:
        """The same call on other operands."""

        def other(ref: Ref) -> Ref:
            return table.get(ref, ref)

        kwargs = {key: substitute(value, other) for key, value in self.kwargs.items()}
        return _Call(
            self.name, self.op, substitute(self.args, other), kwargs, self.outputs, self.path, self.place, self.grad,
            self.draw,
        )  # fmt: skip
