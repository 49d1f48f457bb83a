"""Training: one loop for every algorithm (`trainer`), atomic checkpoints, health, signals, tracking, processes.

Import what you need from the modules; this package itself imports nothing of ours, so that reports start without torch.
"""

import importlib
import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """This package can be called: `gencontrol.train(dataset, …)`, the job that trains a policy, has the same name."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return importlib.import_module("gencontrol.jobs.train").train(*args, **options)


sys.modules[__name__].__class__ = _Callable
