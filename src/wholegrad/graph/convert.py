"""From the traced graph to frozen nodes: one walk that names sources, finds kinds and layouts, and drops what is dead.

In-place ops on tensors of their own are renamed to their functional forms on the way: ``relu_`` becomes ``relu``, and
whatever reads the tensor from then on reads the result.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from wholegrad.errors import CaptureError
from wholegrad.graph.graph import READERS, Graph, Kind, Node, Ref, Spec, references, unsupported
from wholegrad.graph.layout import map_layout, plain
from wholegrad.graph.rules import LayoutRequest, MapRule, ReductionRule, rule_for

aten = torch.ops.aten
SMALL_LIMIT = 1 << 24  # elements that a tensor made from nothing, or summed from small ones, may have
_DEVICE_KWARGS = {"device", "layout", "pin_memory", "memory_format"}


class WritesIntoViewError(Exception):
    """An in-place op on a tensor that others share."""


def buffer_written(name: str) -> CaptureError:
    """The error for a model that keeps state as it runs: tiles would write it many times."""
    return CaptureError(
        name, "is written while the model runs", "use evaluation mode there, or keep such state outside of forward"
    )


class Converter:
    """One walk over the traced graph that writes frozen nodes, drops dead ones and renames in-place results."""

    def __init__(
        self,
        traced: torch.fx.GraphModule,
        sources: list[tuple[Kind, str]],
        has_loss: bool,
        metrics: list[str],
        training: bool,
        trained: set[str],
    ) -> None:
        self.traced = traced
        self.trained = trained
        self.sources = sources
        self.has_loss, self.metrics, self.training = has_loss, metrics, training
        self.nodes: list[Node] = []
        self.constants: dict[str, torch.Tensor] = {}
        self.current: dict[torch.fx.Node, Ref | tuple[Ref, ...]] = {}
        self.base: dict[torch.fx.Node, torch.fx.Node] = {}  # view -> what it is a view of
        self.original: dict[torch.fx.Node, Ref] = {}  # sources as they came
        self.same: dict[torch.fx.Node, torch.fx.Node] = {}  # in-place result -> the tensor written

    def convert(self) -> Graph:
        placeholders = iter([*self.sources, (Kind.IMAGE, "image"), (Kind.TARGET, "target")])
        result: Any = None
        for fx_node in self.traced.graph.nodes:
            if fx_node.op == "placeholder":
                self._source(fx_node, *next(placeholders))
            elif fx_node.op == "get_attr":
                self._constant(fx_node)
            elif fx_node.op == "output":
                result = self._finish(fx_node)
            elif fx_node.target is operator.getitem:
                group = self.current[fx_node.args[0]]
                assert isinstance(group, tuple)
                self.current[fx_node] = group[fx_node.args[1]]
            else:
                self._call(fx_node)
        assert isinstance(result, Graph)
        return result

    def _add(
        self, kind: Kind, name: str, specs: tuple[Spec, ...], path: str, grad: bool, **call: Any
    ) -> tuple[Ref, ...]:
        args, kwargs = call.get("args", ()), call.get("kwargs", {})
        index = len(self.nodes)
        operands = tuple(dict.fromkeys(references((args, kwargs))))
        self.nodes.append(Node(index, name, kind, call.get("op"), args, kwargs, operands, specs, path, grad))
        return tuple(Ref(index, i) for i in range(len(specs)))

    def _source(self, fx_node: torch.fx.Node, kind: Kind, name: str) -> None:
        value = fx_node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return  # no target
        layout = map_layout(value.shape) if kind in READERS else plain(value.shape)
        spec = Spec(layout, value.dtype)
        grad = kind is Kind.PARAMETER and name in self.trained
        (self.current[fx_node],) = self._add(kind, name, (spec,), name, grad)
        self.original[fx_node] = Ref(len(self.nodes) - 1)

    def _constant(self, fx_node: torch.fx.Node) -> None:
        tensor = getattr(self.traced, str(fx_node.target))
        self.constants[fx_node.name] = tensor.detach()
        spec = Spec(plain(tensor.shape), tensor.dtype)
        (self.current[fx_node],) = self._add(Kind.CONSTANT, fx_node.name, (spec,), fx_node.name, False)

    def _swap(self, value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return self.current[self._itself(value)]
        if isinstance(value, tuple | list):
            return type(value)(self._swap(item) for item in value)
        return value

    def _call(self, fx_node: torch.fx.Node) -> None:
        op = fx_node.target
        note = fx_node.meta.get("custom") or {}
        place = f"{note.get('path') or 'model'} ({op})"
        if not isinstance(op, torch._ops.OpOverload):
            raise unsupported(place, "is not an ATen op")
        mutated = self._mutated(fx_node, op)
        if mutated is not None:
            op = self._functional(op, place)
        args, kwargs = self._swap(tuple(fx_node.args)), self._swap(dict(fx_node.kwargs).copy())
        kwargs = {key: self._swap(value) for key, value in kwargs.items() if key not in _DEVICE_KWARGS}
        values = fx_node.meta["val"]
        outputs = tuple(values) if isinstance(values, tuple | list) else (values,)
        refs = self._node(fx_node.name, op, args, kwargs, outputs, note, place)
        if mutated is not None:
            self.same[fx_node] = mutated
            self.current[mutated] = refs[0]  # from here on the tensor reads as the result
            return
        self.current[fx_node] = refs if isinstance(values, tuple | list) else refs[0]
        self._track_view(fx_node, op)

    def _node(
        self,
        name: str,
        op: Any,
        args: Any,
        kwargs: Any,
        outputs: tuple[Any, ...],
        note: dict[str, Any],
        place: str,
    ) -> tuple[Ref, ...]:
        refs = list(dict.fromkeys(references((args, kwargs))))
        specs = {ref: self.nodes[ref.node].outputs[ref.out] for ref in refs}
        shapes = tuple(tuple(out.shape) for out in outputs)
        dtypes = tuple(out.dtype for out in outputs)
        on_maps = any(spec.is_map for spec in specs.values())
        kind = Kind.SMALL
        layouts = tuple(plain(shape) for shape in shapes)
        if on_maps:
            request = LayoutRequest(place, op, args, kwargs, specs, shapes)
            kind, layouts = self._map_kind(request)
        elif any(torch.Size(shape).numel() > SMALL_LIMIT for shape in shapes):
            raise unsupported(place, f"makes a whole tensor of shape {shapes[0]} that no tile can share")
        out_specs = tuple(Spec(layout, dtype) for layout, dtype in zip(layouts, dtypes, strict=True))
        grad = (
            note.get("grad", True)
            and op is not aten.detach.default
            and any(self.nodes[ref.node].needs_grad for ref in refs)
            and any(dtype.is_floating_point for dtype in dtypes)
        )
        return self._add(kind, name, out_specs, note.get("path", ""), grad, op=op, args=args, kwargs=kwargs)

    def _map_kind(self, request: LayoutRequest) -> tuple[Kind, tuple[Any, ...]]:
        rule = rule_for(request.op)
        if rule is None:
            raise unsupported(request.place, "has no rule, so it cannot run tile by tile")
        layouts = rule.layouts(request)
        maps = [Spec(layout, torch.float32).is_map for layout in layouts]
        if all(maps) and isinstance(rule, MapRule):
            return Kind.MAP, layouts
        if not any(maps) and isinstance(rule, ReductionRule):
            return Kind.REDUCTION, layouts
        raise request.refuse("is neither a map nor a reduction")

    # In-place ops and the views that they may write through.

    def _itself(self, fx_node: torch.fx.Node) -> torch.fx.Node:
        while fx_node in self.same:
            fx_node = self.same[fx_node]
        return fx_node

    def _root(self, fx_node: torch.fx.Node) -> torch.fx.Node:
        fx_node = self._itself(fx_node)
        while fx_node in self.base:
            fx_node = self._itself(self.base[fx_node])
        return fx_node

    def _track_view(self, fx_node: torch.fx.Node, op: Any) -> None:
        returns = op._schema.returns
        source = fx_node.args[0] if fx_node.args else None
        if returns and returns[0].alias_info is not None and isinstance(source, torch.fx.Node):
            self.base[fx_node] = source

    def _mutated(self, fx_node: torch.fx.Node, op: Any) -> torch.fx.Node | None:
        """The tensor that an in-place op writes; None for an op that writes nothing."""
        written = [i for i, arg in enumerate(op._schema.arguments) if arg.alias_info and arg.alias_info.is_write]
        if not written:
            return None
        target = fx_node.args[0] if written == [0] and fx_node.args else None
        if isinstance(target, torch.fx.Node):
            self._refuse_state(fx_node, target)
        if not isinstance(target, torch.fx.Node):
            raise WritesIntoViewError
        before, after = target.meta["val"], fx_node.meta["val"]
        if self._shared(target) or before.dtype != after.dtype or before.shape != after.shape:
            raise WritesIntoViewError
        return self._itself(target)

    def _refuse_state(self, fx_node: torch.fx.Node, target: torch.fx.Node) -> None:
        """Refuse writes into parameters and buffers, and writes that autograd would not see."""
        root = self.original.get(self._root(target))
        if root is not None and self.nodes[root.node].kind in (Kind.PARAMETER, Kind.BUFFER):
            raise buffer_written(self.nodes[root.node].name)
        note = fx_node.meta.get("custom") or {}
        value = self.current[self._itself(target)]
        grad = isinstance(value, Ref) and self.nodes[value.node].needs_grad
        hidden = not note.get("grad", True) and grad
        chain = self._itself(target)
        while chain in self.base and not hidden:
            hidden = chain.target is aten.detach.default
            chain = self._itself(self.base[chain])
        if hidden:
            raise CaptureError(
                f"{note.get('path') or 'model'} ({fx_node.target})",
                "writes in place where autograd does not look (no_grad, .data or detach)",
                "write y + (f(y) - y).detach() instead",
            )

    def _shared(self, target: torch.fx.Node) -> bool:
        """Whether the memory of ``target`` is read under another shape or name too."""
        root = self._root(target)
        views = (view for view in self.base if view.users and self._root(view) is root)
        return root is not self._itself(target) or any(views)

    def _functional(self, op: Any, place: str) -> Any:
        name, overload = op._schema.name.split("::")[1], op._overloadname
        packet = getattr(aten, name.removesuffix("_"), None)
        if not name.endswith("_") or packet is None or overload not in packet.overloads():
            raise WritesIntoViewError
        return getattr(packet, overload)

    def _finish(self, fx_node: torch.fx.Node) -> Graph:
        returned = fx_node.args[0]
        assert isinstance(returned, tuple | list)
        values = self._swap(tuple(returned))
        outputs, rest = tuple(references(values[0])), list(references(values[1:]))
        loss = rest[0] if self.has_loss else None
        metrics = dict(zip(self.metrics, rest[1:], strict=True)) if self.has_loss else {}
        self._check(outputs, loss, metrics)
        return self._pruned(outputs, loss, metrics)

    def _check(self, outputs: tuple[Ref, ...], loss: Ref | None, metrics: dict[str, Ref]) -> None:
        def spec(ref: Ref) -> Spec:
            return self.nodes[ref.node].outputs[ref.out]

        if loss is not None and spec(loss).shape not in ((), (1,)):
            raise CaptureError("loss", f"returns shape {spec(loss).shape}", "return one number (mean or sum)")
        for name, ref in metrics.items():
            if spec(ref).is_map:
                raise CaptureError(f"metric {name}", f"returns a map of shape {spec(ref).shape}", "sum it up")

    def _pruned(self, outputs: tuple[Ref, ...], loss: Ref | None, metrics: dict[str, Ref]) -> Graph:
        """The graph without nodes that nothing returned depends on. Sources stay."""
        alive: set[int] = set()
        roots = [*metrics.values()] + ([loss] if loss is not None else list(outputs))
        stack = [ref.node for ref in (*roots, *outputs)]
        while stack:
            index = stack.pop()
            if index not in alive:
                alive.add(index)
                stack.extend(ref.node for ref in self.nodes[index].operands)
        kept = [node for node in self.nodes if node.index in alive or node.op is None]
        number = {node.index: i for i, node in enumerate(kept)}

        def moved(value: Any) -> Any:
            if isinstance(value, Ref):
                return Ref(number[value.node], value.out)
            if isinstance(value, tuple | list):
                return type(value)(moved(item) for item in value)
            return value

        nodes = tuple(
            Node(
                number[node.index], node.name, node.kind, node.op, moved(node.args),
                {key: moved(value) for key, value in node.kwargs.items()},
                tuple(moved(ref) for ref in node.operands), node.outputs, node.path, node.needs_grad,
            )
            for node in kept
        )  # fmt: skip
        return Graph(
            nodes,
            self.constants,
            tuple(moved(ref) for ref in outputs),
            None if loss is None else moved(loss),
            {name: moved(ref) for name, ref in metrics.items()},
            self.training,
        )
