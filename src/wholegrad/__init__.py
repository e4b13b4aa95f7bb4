"""wholegrad: train convolutional networks end to end on gigapixel images, exactly, in the memory that there is."""

from wholegrad.api import backward, measure, plan
from wholegrad.errors import WholegradError
from wholegrad.export import export
from wholegrad.plan.plan import Plan
from wholegrad.predict import predict
from wholegrad.run.device import Device, open_device
from wholegrad.run.distributed.ranks import Ranks, open_ranks
from wholegrad.run.executor import Progress
from wholegrad.segment import segment
from wholegrad.slide.copy import copy_slide
from wholegrad.slide.mask import open_mask
from wholegrad.slide.slide import open_slide
from wholegrad.verify import verify

__version__ = "0.1.0"
__all__ = [
    "Device",
    "Plan",
    "Progress",
    "Ranks",
    "WholegradError",
    "backward",
    "copy_slide",
    "export",
    "measure",
    "open_device",
    "open_mask",
    "open_ranks",
    "open_slide",
    "plan",
    "predict",
    "segment",
    "verify",
]
