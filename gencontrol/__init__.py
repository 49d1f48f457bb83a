"""gencontrol: steer pretrained generative models towards a reward.

A base model is a law p(x | c); everything here moves it towards p(x | c)·exp(r(x, c)/τ) — in the weights, while
sampling, on the result, or in value functions.  Importing this package loads neither torch nor any model library.
"""

from gencontrol._compat import guard_torchvision as _guard_torchvision
from gencontrol._version import __version__ as __version__

_guard_torchvision()
