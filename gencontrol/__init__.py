"""gencontrol: steer pretrained generative models towards a reward.

A base model is a law p(x | c); everything here moves it towards p(x | c)·exp(r(x, c)/τ) — in the weights, while
sampling, on the result, or in value functions.  Importing this package loads neither torch nor any model library.
"""

import os as _os

from gencontrol._compat import guard_torchvision as _guard_torchvision

__version__ = "0.1.0"

_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if not _os.path.isdir(_os.path.join(_os.path.dirname(__file__), "pipelines")) and _os.path.isfile(
    _os.path.join(_root, "setup.cfg")
):
    __path__.append(_root)  # a source checkout: pipelines/, rewards/ and robotics/ lie beside this folder

_guard_torchvision()
