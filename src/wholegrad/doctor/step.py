"""One small training step in tiles against whole-image autograd: the proof that all of it works together here."""

from __future__ import annotations

import time

import torch
from torch import nn

from wholegrad.api import backward, plan
from wholegrad.doctor.finding import Finding, Findings, State
from wholegrad.losses import bce_loss

SIZE, TILE = (112, 144), (48, 64)  # pixels
EXACT = 1e-12  # of the largest element of a gradient, in float64


def look_at_step() -> Findings:
    """Gradients of a small network, down and up again, on a small image."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.1), nn.ConvTranspose2d(4, 1, 4, 2, 1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    image = torch.rand(3, *SIZE, generator=generator, dtype=torch.float64)
    target = (torch.rand(1, *SIZE, generator=generator) > 0.5).to(torch.uint8)
    bce_loss(model(image[None]), target[None]).backward()  # type: ignore[no-untyped-call]
    true = {name: _gradient(each).clone() for name, each in model.named_parameters()}
    model.zero_grad()
    begin = time.perf_counter()
    made = plan(model, bce_loss, image, target, tile=TILE)
    backward(model, bce_loss, image, target, plan=made)
    seconds = time.perf_counter() - begin
    apart = max(
        float((_gradient(each) - true[name]).abs().max() / true[name].abs().max())
        for name, each in model.named_parameters()
    )
    if not apart <= EXACT:
        mend = "run wholegrad verify, which names the op responsible, and report what it says"
        yield Finding("gradients", f"are off by {apart:.1e} from whole-image autograd", apart, State.BROKEN, mend)
        return
    text = f"agree with whole-image autograd to {apart:.1e}, planned and run in {seconds:.1f} s"
    yield Finding("gradients", text, {"apart": apart, "seconds": seconds})


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad
