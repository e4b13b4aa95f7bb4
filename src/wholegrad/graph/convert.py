"""From the traced graph to frozen nodes: one walk that names sources, finds kinds and layouts, and drops what is dead.

In-place ops on tensors of their own are renamed to their functional forms on the way: ``relu_`` becomes ``relu``, and
whatever reads the tensor from then on reads the result.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch

from wholegrad.errors import CaptureError
from wholegrad.graph.builder import Builder
from wholegrad.graph.graph import READERS, SOURCES, Graph, Kind, Ref, Spec, references, substitute, unsupported
from wholegrad.graph.layout import map_layout, plain
from wholegrad.graph.rules.random import FUNCTIONAL
from wholegrad.graph.tracing import is_ghost

aten = torch.ops.aten
_DEVICE_KWARGS = {"device", "layout", "pin_memory", "memory_format", "generator"}
_SAME = (aten.alias.default, aten.lift_fresh.default, aten.lift_fresh_copy.default)
_VIEWS = (aten.view.default, aten._unsafe_view.default)

_RESHAPED = (  # in place, of no memory but of the tensor's own shape
    aten.squeeze_.dim, aten.squeeze_.default, aten.squeeze_.dims, aten.unsqueeze_.default, aten.transpose_.default,
    aten.t_.default,
)  # fmt: skip


class WritesIntoViewError(Exception):
    """An in-place op on a tensor that others share."""


def buffer_written(name: str) -> CaptureError:
    """The error for a model that writes state which no step can carry."""
    return CaptureError(
        name, "is written while the model runs", "write buffers only, in place, with small tensors of their own shape"
    )


class Converter:
    """One walk over the traced graph that writes frozen nodes, drops dead ones and renames in-place results."""

    def __init__(
        self,
        traced: torch.fx.GraphModule,
        sources: list[tuple[Kind, str]],
        has_loss: bool,
        metrics: list[str],
        changed: list[str],
        training: bool,
        trained: set[str],
    ) -> None:
        self.traced = traced
        self.trained = trained
        self.sources = sources
        self.has_loss, self.metrics, self.changed, self.training = has_loss, metrics, changed, training
        self.build = Builder()
        self.constants: dict[str, torch.Tensor] = {}
        self.current: dict[torch.fx.Node, Ref | tuple[Ref, ...]] = {}
        self.order = {fx_node: i for i, fx_node in enumerate(traced.graph.nodes)}
        self.base: dict[torch.fx.Node, torch.fx.Node] = {}  # view -> what it is a view of
        self.original: dict[torch.fx.Node, Ref] = {}  # sources as they came
        self.same: dict[torch.fx.Node, torch.fx.Node] = {}  # in-place result or alias -> the tensor that it is

    def convert(self) -> Graph:
        placeholders = iter(self.sources)
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

    def _source(self, fx_node: torch.fx.Node, kind: Kind, name: str) -> None:
        value = fx_node.meta["val"]
        if kind in READERS and value.dim() < 2:
            raise CaptureError(name, f"has shape {tuple(value.shape)}", "give a map with rows and columns")
        layout = map_layout(value.shape) if kind in READERS else plain(value.shape)
        grad = kind is Kind.PARAMETER and name in self.trained
        (ref,) = self.build.add(kind, name, (Spec(layout, value.dtype),), path=name, grad=grad)
        self.current[fx_node] = self.original[fx_node] = ref

    def _constant(self, fx_node: torch.fx.Node) -> None:
        tensor = getattr(self.traced, str(fx_node.target))
        if is_ghost(tensor):
            user = next(iter(fx_node.users), fx_node)
            raise CaptureError(
                f"{(user.meta.get('custom') or {}).get('path') or 'model or loss'} ({user.target})",
                f"uses a tensor of shape {tuple(tensor.shape)} whose values the trace does not show",
                "make it a buffer of the model or loss",
            )
        self.constants[fx_node.name] = tensor.detach()
        spec = Spec(plain(tensor.shape), tensor.dtype)
        (self.current[fx_node],) = self.build.add(Kind.CONSTANT, fx_node.name, (spec,), path=fx_node.name)

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
        if op in _SAME and isinstance(fx_node.args[0], torch.fx.Node):
            self.same[fx_node] = fx_node.args[0]
            return
        mutated = self._mutated(fx_node, op)
        if mutated is not None:
            op = self._functional(op, place)
        args, kwargs = self._swap(tuple(fx_node.args)), self._swap(dict(fx_node.kwargs).copy())
        kwargs = {key: self._swap(value) for key, value in kwargs.items() if key not in _DEVICE_KWARGS}
        values = fx_node.meta["val"]
        outputs = tuple(values) if isinstance(values, tuple | list) else (values,)
        path, grad, draw = note.get("path", ""), note.get("grad", True), note.get("draw", -1)
        same = op in _VIEWS and isinstance(args[0], Ref) and self.build.spec(args[0]).shape == tuple(outputs[0].shape)
        if same and grad:
            refs: tuple[Ref, ...] = (args[0],)  # a view of the shape that was there; without gradient it cuts that off
        else:
            refs = self.build.call(fx_node.name, op, args, kwargs, outputs, path, grad, draw)
        if mutated is not None:
            self.same[fx_node] = mutated
            self.current[mutated] = refs[0]  # from here on the tensor reads as the result
            return
        self.current[fx_node] = refs if isinstance(values, tuple | list) else refs[0]
        self._track_view(fx_node, op)

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
        note = fx_node.meta.get("custom") or {}
        where = f"{note.get('path') or 'model'} ({op})"
        if not isinstance(target, torch.fx.Node):
            raise WritesIntoViewError(where)
        before, after = target.meta["val"], fx_node.meta["val"]
        same = before.dtype == after.dtype and (before.shape == after.shape or op in _RESHAPED)
        if self._shared(fx_node, target) or not same:
            raise WritesIntoViewError(where)
        return self._itself(target)

    def _refuse_state(self, fx_node: torch.fx.Node, target: torch.fx.Node) -> None:
        """Refuse writes into parameters, and writes that autograd would not see."""
        root = self.original.get(self._root(target))
        nodes = self.build.nodes
        if root is not None and nodes[root.node].kind is Kind.PARAMETER:
            raise buffer_written(nodes[root.node].name)
        note = fx_node.meta.get("custom") or {}
        value = self.current[self._itself(target)]
        grad = isinstance(value, Ref) and nodes[value.node].needs_grad
        hidden = not note.get("grad", True) and grad
        chain = self._itself(target)
        while chain in self.base and not hidden:
            hidden = chain.target is aten.detach.default
            chain = self._itself(self.base[chain])
        if hidden and root is None:
            raise CaptureError(
                f"{note.get('path') or 'model'} ({fx_node.target})",
                "writes in place where autograd does not look (no_grad, .data or detach)",
                "write y + (f(y) - y).detach() instead",
            )

    def _shared(self, fx_node: torch.fx.Node, target: torch.fx.Node) -> bool:
        """Whether the memory that ``fx_node`` writes is read later on under another shape or name."""
        root, target = self._root(target), self._itself(target)
        if root in self.original:
            return root is not target
        family = (other for other in (root, *self.base, *self.same) if self._root(other) is root)
        names = {other for other in family if self._itself(other) is not target}
        return any(self.order[user] > self.order[fx_node] for name in names for user in name.users)

    def _functional(self, op: Any, place: str) -> Any:
        if op in FUNCTIONAL:
            return FUNCTIONAL[op]
        name, overload = op._schema.name.split("::")[1], op._overloadname
        packet = getattr(aten, name.removesuffix("_"), None)
        if not name.endswith("_") or packet is None or overload not in packet.overloads():
            raise WritesIntoViewError(place)
        return getattr(packet, overload)

    def _finish(self, fx_node: torch.fx.Node) -> Graph:
        returned = fx_node.args[0]
        assert isinstance(returned, tuple | list)
        flat = list(references(self._swap(tuple(returned))))  # outputs, loss, metrics, buffers given another tensor
        changed = [flat.pop() for _ in self.changed][::-1]
        values = [flat.pop() for _ in self.metrics][::-1]
        loss = flat.pop() if self.has_loss else None
        metrics = dict(zip(self.metrics, values, strict=True))
        updates = {**self._written(), **dict(zip(self.changed, changed, strict=True))}
        self._check(loss, metrics, updates)
        return self._pruned(tuple(flat), loss, metrics, updates)

    def _written(self) -> dict[str, Ref]:
        """What each buffer that was written in place holds at the end."""
        result = {}
        for fx_node, ref in self.original.items():
            now, node = self.current[fx_node], self.build.nodes[ref.node]
            if node.kind is Kind.BUFFER and now != ref:
                assert isinstance(now, Ref)
                result[node.name] = now
        return result

    def _check(self, loss: Ref | None, metrics: dict[str, Ref], updates: dict[str, Ref]) -> None:
        spec = self.build.spec
        if loss is not None and spec(loss).shape not in ((), (1,)):
            raise CaptureError("loss", f"returns shape {spec(loss).shape}", "return one number (mean or sum)")
        for name, ref in metrics.items():
            if spec(ref).is_map:
                raise CaptureError(f"metric {name}", f"returns a map of shape {spec(ref).shape}", "sum it up")
        buffers = {node.name: node.outputs[0] for node in self.build.nodes if node.kind is Kind.BUFFER}
        for name, ref in updates.items():
            if spec(ref).is_map or spec(ref).shape != buffers[name].shape or spec(ref).dtype != buffers[name].dtype:
                raise buffer_written(name)

    def _pruned(
        self, outputs: tuple[Ref, ...], loss: Ref | None, metrics: dict[str, Ref], updates: dict[str, Ref]
    ) -> Graph:
        """The graph without nodes that nothing returned depends on. Sources stay."""
        nodes = self.build.nodes
        alive: set[int] = set()
        stack = [ref.node for ref in (*outputs, *([loss] if loss else []), *metrics.values(), *updates.values())]
        while stack:
            index = stack.pop()
            if index not in alive:
                alive.add(index)
                stack.extend(ref.node for ref in nodes[index].operands)
        kept = [node for node in nodes if node.index in alive or node.kind in SOURCES]
        number = {node.index: i for i, node in enumerate(kept)}

        def moved(value: Any) -> Any:
            return substitute(value, lambda ref: Ref(number[ref.node], ref.out))

        return Graph(
            tuple(
                replace(
                    node,
                    index=number[node.index],
                    args=moved(node.args),
                    kwargs={key: moved(value) for key, value in node.kwargs.items()},
                    operands=moved(node.operands),
                )
                for node in kept
            ),
            self.constants,
            moved(outputs),
            moved(loss),
            {name: moved(ref) for name, ref in metrics.items()},
            self.training,
            {name: moved(ref) for name, ref in updates.items()},
        )
