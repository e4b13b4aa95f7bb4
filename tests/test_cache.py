"""Captured graphs are kept, and not used again where tracing might have seen something else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import wholegrad as wg

GAIN = 1.0


def image() -> torch.Tensor:
    return torch.rand(3, 16, 18, generator=torch.Generator().manual_seed(0))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Dropout(0.5), nn.LeakyReLU(0.1))


def square(output: torch.Tensor, target: Any) -> torch.Tensor:
    return (output**2).mean()


def gained(output: torch.Tensor, target: Any) -> torch.Tensor:
    return GAIN * (output**2).mean()


def graph(net: nn.Module, loss: Any = square) -> Any:
    return wg.plan(net, loss, image(), tile=(8, 8)).graph


def test_weights_change_and_the_graph_stays() -> None:
    net = model()
    first = graph(net)
    with torch.no_grad():
        net[0].weight.add_(1)
    assert graph(net) is first


def test_an_attribute_changes_and_the_graph_is_new() -> None:
    net = model()
    first = graph(net)
    net[1].p = 0.25
    second = graph(net)
    net[2].negative_slope = 0.3
    assert second is not first and graph(net) is not second


def test_a_closure_or_a_global_changes_and_the_graph_is_new(monkeypatch: Any) -> None:
    net, share = model(), 0.5

    def shared(output: torch.Tensor, target: Any) -> torch.Tensor:
        return share * (output**2).mean()

    first = graph(net, shared)
    share = 0.25
    assert graph(net, shared) is not first
    kept = graph(net, gained)
    monkeypatch.setitem(globals(), "GAIN", 2.0)
    assert graph(net, gained) is not kept


def test_a_module_is_replaced_or_a_hook_added_and_the_graph_is_new() -> None:
    net = model()
    first = graph(net)
    net[2] = nn.ReLU()
    second = graph(net)
    handle = net[2].register_forward_hook(lambda module, args, output: output * 2)
    third = graph(net)
    handle.remove()
    assert len({id(each) for each in (first, second, third)}) == 3 and graph(net) is second


def test_dropout_draws_anew_each_step_and_again_from_the_same_seed() -> None:
    net = model()
    torch.manual_seed(3)
    losses = [wg.backward(net, square, image()).item() for _ in range(2)]
    torch.manual_seed(3)
    assert losses == [wg.backward(net, square, image()).item() for _ in range(2)]
    assert losses[0] != losses[1]
    assert wg.backward(net, square, image(), seed=5) == wg.backward(net, square, image(), seed=5)
