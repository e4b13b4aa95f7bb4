"""wholegrad: train convolutional networks end to end on gigapixel images, exactly, in the memory that there is."""

from wholegrad.api import backward, measure, plan
from wholegrad.errors import WholegradError
from wholegrad.plan.plan import Plan
from wholegrad.run.executor import Progress

__version__ = "0.1.0"
__all__ = ["Plan", "Progress", "WholegradError", "backward", "measure", "plan"]
