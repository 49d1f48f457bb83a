"""gencontrol: steer pretrained generative models towards a reward.

A base model is a law p(x | c); everything here moves it towards p(x | c)·exp(r(x, c)/τ) — in the weights, while
sampling, on the result, or in value functions.  Importing this package loads neither torch nor any model library.

What the command line does is a function here, loaded when it is first asked for:
`gencontrol.finetune(pipeline, reward, output="runs/a").pipeline`.
"""

from typing import TYPE_CHECKING

from gencontrol._compat import guard_torchvision as _guard_torchvision
from gencontrol._version import __version__
from gencontrol.registry import lazily as _lazily

if TYPE_CHECKING:
    from gencontrol.jobs.collect import collect
    from gencontrol.jobs.compose import compose
    from gencontrol.jobs.evaluate import evaluate
    from gencontrol.jobs.finetune import finetune
    from gencontrol.jobs.pretrain import pretrain
    from gencontrol.jobs.sample import sample
    from gencontrol.jobs.search.job import search

__all__ = ["__version__", "collect", "compose", "evaluate", "finetune", "pretrain", "sample", "search"]

#: the jobs as functions; once the package of this name is imported, `gencontrol.train` is that, and can be called too
_JOBS = ("collect", "compose", "evaluate", "finetune", "pretrain", "sample", "train")
__getattr__ = _lazily(__name__, {**{name: f"jobs.{name}" for name in _JOBS}, "search": "jobs.search.job"})

_guard_torchvision()
