"""gencontrol: steer pretrained generative models towards a reward.

A base model is a law p(x | c); everything here moves it towards p(x | c)·exp(r(x, c)/τ) — in the weights, while
sampling, on the result, or in value functions.  Importing this package loads neither torch nor any model library.
"""

from gencontrol._compat import guard_torchvision as _guard_torchvision

__version__ = "0.1.0"

_guard_torchvision()
