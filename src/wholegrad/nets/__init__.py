"""Networks that ship with wholegrad, in plain ``torch.nn``."""

from wholegrad.nets.unet import GigapixelUNet, unet4492

__all__ = ["GigapixelUNet", "unet4492"]
