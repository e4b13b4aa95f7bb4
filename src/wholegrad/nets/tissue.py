"""The tissue network that ships: the 4492-parameter U-Net, trained to tell tissue from glass on slides of many stains.

It sees slides at 4 um a pixel whose glass and ink were evened out (``wholegrad.slide.balance``); ``wg.segment`` does
both. ``weights/tissue4492.md`` is its model card: data, licences, scores, where it fails. ``examples/tissue`` makes it.
"""

from __future__ import annotations

from importlib.resources import as_file, files

from safetensors.torch import load_file

from wholegrad.nets.unet import GigapixelUNet, unet4492

MPP = 4.0  # um a pixel


def tissue4492() -> GigapixelUNet:
    """The network with its weights, in evaluation mode: evened-out RGB ``(N, 3, H, W)`` in, a logit a pixel out."""
    model = unet4492()
    with as_file(files("wholegrad.nets") / "weights" / "tissue4492.safetensors") as path:
        model.load_state_dict(load_file(path))
    return model.eval()
