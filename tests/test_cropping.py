"""Crops of a tile's map, and how their gradients lie."""

from __future__ import annotations

import pytest
import torch

from wholegrad.graph.rules.cropping import cropped


@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("edges", [(1, 2, 3, 0), (0, 0, 0, 1), (0, 0, 0, 0)], ids=str)
def test_a_crop_and_its_gradient(form: torch.memory_format, edges: tuple[int, int, int, int]) -> None:
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64).contiguous(memory_format=form).requires_grad_()
    top, bottom, left, right = edges
    wanted = x[:, :, top : 7 - bottom, left : 9 - right]
    found = cropped(x, edges)
    assert found.equal(wanted) and found.data_ptr() == wanted.data_ptr()
    given = torch.randn_like(wanted).contiguous(memory_format=form)
    (grad,) = torch.autograd.grad(found, x, given)
    assert grad.equal(torch.autograd.grad(wanted, x, given)[0])
    assert grad.is_contiguous(memory_format=form)
