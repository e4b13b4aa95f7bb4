"""What tracing may see is compared before a graph or a plan is used again: nothing that changed is overlooked."""

from __future__ import annotations

import copy
import functools
import gc
import sys
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import wholegrad as wg
from wholegrad.errors import PlanError
from wholegrad.looks import _installed as installed
from wholegrad.looks import difference, looks

GAIN = 1.0
ELSEWHERE = types.ModuleType("elsewhere")  # a module of the user's own
exec("K = 1.0\ndef k():\n    return K", vars(ELSEWHERE))


class Settings:
    gain = 1.0


@dataclass
class Options:
    inner: dict[str, list[float]] = field(default_factory=lambda: {"gains": [1.0]})


def deep() -> float:
    return deeper()


def deeper() -> float:
    return deepest()


def deepest() -> float:
    return GAIN


class Net(nn.Module):
    """A convolution times what many places hold."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.drop = nn.Conv2d(3, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Dropout(0.0)
        self.options, self.array, self.tensor = Options(), np.ones(3), torch.ones(1)
        self.call = functools.partial(torch.mul, **{"other": 1.0})
        self.flag = 1
        self.double()

    def helper(self) -> float:
        return deep()

    @property
    def held(self) -> float:
        return Settings.gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = self.helper() * self.held * self.scale * ELSEWHERE.k() * (2.0 if self.flag is True else 1.0)
        factor *= self.options.inner["gains"][0] * float(self.array[0]) * self.tensor.item()
        result: torch.Tensor = self.call(self.drop(self.norm(self.conv(x)))) * factor
        return result


class Weighted:
    """A loss that is an object of the user's own."""

    def __init__(self) -> None:
        self.weight = 1.0

    def compute(self, output: torch.Tensor, target: Any) -> torch.Tensor:
        return self.weight * (output**3 + output).mean()


def image() -> torch.Tensor:
    return torch.rand(3, 12, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def replaced(name: str, value: Any) -> Callable[..., None]:
    return lambda net, loss, patch: setattr(net, name, value)


CHANGES: dict[str, Callable[[Net, Weighted, pytest.MonkeyPatch], Any]] = {
    "an attribute of a child": lambda net, loss, patch: setattr(net.drop, "p", 1.0),
    "eps of a norm": lambda net, loss, patch: setattr(net.norm, "eps", 0.1),
    "a convolution's dilation": lambda net, loss, patch: (setattr(net.conv, "dilation", (2, 2)),
                                                          setattr(net.conv, "padding", (2, 2))),
    "a global, three helpers deep": lambda net, loss, patch: patch.setitem(globals(), "GAIN", 2.0),
    "a global of another module": lambda net, loss, patch: patch.setattr(ELSEWHERE, "K", 2.0),
    "a function of another module": lambda net, loss, patch: patch.setattr(ELSEWHERE, "k", lambda: 2.0),
    "a class attribute": lambda net, loss, patch: patch.setattr(Net, "scale", 2.0),
    "a method of the class": lambda net, loss, patch: patch.setattr(Net, "helper", lambda self: 3.0),
    "another class's attribute": lambda net, loss, patch: patch.setattr(Settings, "gain", 2.0),
    "a list in a dictionary in a dataclass": lambda net, loss, patch: net.options.inner["gains"].__setitem__(0, 2.0),
    "an array in place": lambda net, loss, patch: net.array.__setitem__(0, 2.0),
    "another array": replaced("array", np.full(3, 2.0)),
    "a tensor in place": lambda net, loss, patch: net.tensor.fill_(2.0),
    "another tensor": replaced("tensor", torch.full((1,), 2.0)),
    "keywords of a partial": lambda net, loss, patch: net.call.keywords.update(other=2.0),
    "1 becomes True": replaced("flag", True),
    "forward of the instance": lambda net, loss, patch: setattr(net, "forward", lambda x: net.conv(x) * 3),
    "a hook": lambda net, loss, patch: net.conv.register_forward_hook(lambda module, given, output: 2 * output),
    "a child": replaced("drop", nn.Tanh()),
    "evaluation mode of a child": lambda net, loss, patch: net.norm.eval(),
    "an attribute of the loss": lambda net, loss, patch: setattr(loss, "weight", 2.0),
    "a function of PyTorch's": lambda net, loss, patch: patch.setattr(nn.Dropout, "forward", lambda self, x: x * 2),
}  # fmt: skip


def gradient(net: nn.Module, loss: Any, plan: Any = None) -> torch.Tensor:
    net.zero_grad()
    wg.backward(net, loss, image(), plan=plan)
    grad = net.conv.weight.grad
    return grad.clone()


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_change_makes_another_graph_and_refuses_the_plan(
    change: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, loss = Net(), Weighted()
    plan = wg.plan(net, loss.compute, image())
    assert wg.plan(net, loss.compute, image()).graph is plan.graph  # though a bound method is another object each time
    before = gradient(net, loss.compute, plan)
    change(net, loss, monkeypatch)
    with pytest.raises(PlanError, match=r"plan: was made for .*plan again"):
        wg.backward(net, loss.compute, image(), plan=plan)
    after = gradient(net, loss.compute)
    net.zero_grad()
    loss.compute(net(image()[None]), None).backward()
    torch.testing.assert_close(after, net.conv.weight.grad, rtol=1e-10, atol=1e-14)
    assert (after - before).abs().max() > 1e-5 * before.abs().max()


def test_a_difference_is_named() -> None:
    net, loss = Net(), Weighted()
    before = looks(model=net, loss=loss.compute)
    assert difference(before, looks(model=net, loss=loss.compute)) is None
    net.drop.p = 0.5
    assert difference(before, looks(model=net, loss=loss.compute)) == "model.drop.p = 0.0"


def test_a_copy_of_a_model_looks_the_same() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.BatchNorm2d(2), nn.LeakyReLU(0.2)).double()

    one, loss = net(), nn.MSELoss()
    assert (
        looks(model=one, loss=loss)
        == looks(model=copy.deepcopy(one), loss=nn.MSELoss())
        == looks(model=net(), loss=loss)
    )
    plan = wg.plan(one, loss, image(), torch.zeros(2, 12, 14, dtype=torch.float64))
    wg.backward(net(), nn.MSELoss(), image(), torch.zeros(2, 12, 14, dtype=torch.float64), plan=plan)


def test_a_loss_that_holds_the_model_does_not_keep_it_alive() -> None:
    def step() -> weakref.ref[nn.Module]:
        net = nn.Sequential(nn.Conv2d(3, 2, 3)).double()

        def decayed(output: torch.Tensor, target: Any) -> torch.Tensor:
            return (output**2).mean() + (net[0].weight ** 2).sum()

        wg.backward(net, decayed, image())
        return weakref.ref(net)

    gone = step()
    gc.collect()
    assert gone() is None


def test_endless_structures_end() -> None:
    ring: list[Any] = [1]
    ring.append(ring)
    chain: list[Any] = []
    for _ in range(3 * sys.getrecursionlimit()):
        chain = [chain]
    assert looks(ring=ring, chain=chain) == looks(ring=ring, chain=chain)


def test_code_of_libraries_is_told_by_where_it_lies() -> None:
    """PyTorch may lie outside of this environment's own packages; a user's folder is no library."""
    for file in (torch.nn.functional.__file__, np.__file__, "/usr/lib/python3/dist-packages/monai/x.py"):
        assert file is not None and installed(file)
    assert not installed("/home/me/torch_nets/net.py") and not installed(__file__)
