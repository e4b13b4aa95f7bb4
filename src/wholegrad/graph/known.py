"""Values that code looks at while it is traced, where they follow from buffers and constants alone.

Some losses check their class weights (``if weight.min() < 0: raise``), a norm may average over the steps that a buffer
counts. Such a value is computed from the real buffers along the traced graph; the graph then holds for these buffers'
values, which it remembers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only


class _UnknownError(Exception):
    """The value depends on more than buffers."""


class Known:
    """Answers for one trace.

    Args:
        buffers: real tensors by the position of their placeholder in the graph, each with its name.

    Attributes:
        looked_at: the buffers on which an answer depended, by name.
    """

    def __init__(self, buffers: Mapping[int, tuple[str, torch.Tensor]]) -> None:
        self._buffers = buffers
        self.looked_at: dict[str, torch.Tensor] = {}

    def number(self, ghost: torch.Tensor) -> Any:
        """The value of a tensor of one element, or None if it does not follow from buffers alone."""
        mode = get_proxy_mode()
        slot = None if mode is None else get_proxy_slot(ghost, mode.tracer, None)
        if mode is None or slot is None:
            return None
        read: dict[str, torch.Tensor] = {}
        with _disable_current_modes(), torch.no_grad():
            try:
                value = self._evaluate(slot.proxy.node, getattr(mode.tracer, "root", None), {}, read)
            except _UnknownError:
                return None
            self.looked_at.update(read)
            return value.item()

    def _evaluate(self, last: torch.fx.Node, root: Any, done: dict[torch.fx.Node, Any], read: dict[str, Any]) -> Any:
        placeholders = {node: i for i, node in enumerate(last.graph.nodes) if node.op == "placeholder"}
        needed = _ancestors(last)
        for node in (node for node in last.graph.nodes if node in needed):
            if node.op == "placeholder":
                if placeholders[node] not in self._buffers:
                    raise _UnknownError
                name, tensor = self._buffers[placeholders[node]]
                read[name] = tensor.detach().clone()
                done[node] = tensor.detach().clone()  # which in-place ops may change
            elif node.op == "get_attr":
                done[node] = getattr(root, str(node.target))
            else:
                args, kwargs = tree_map_only(torch.fx.Node, done.__getitem__, (node.args, dict(node.kwargs)))
                done[node] = node.target(*args, **{key: value for key, value in kwargs.items() if key != "device"})
        return done[last]


def _ancestors(node: torch.fx.Node) -> set[torch.fx.Node]:
    found, stack = set(), [node]
    while stack:
        each = stack.pop()
        if each not in found:
            found.add(each)
            stack.extend(each.all_input_nodes)
    return found
