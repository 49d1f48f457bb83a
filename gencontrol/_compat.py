"""Other packages: makes a CUDA build of torchvision harmless beside a CPU build of torch, and silences loading bars.

torchvision has no CPU wheels on the registry; where another package brings it, its compiled part cannot load and even
`import torchvision` fails, and with it transformers, diffusers and peft.  Defining the two operators that its Python
part registers fake kernels for is enough for everything that needs no compiled operator.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _TorchvisionGuard:
    """Import hook that acts once, when torchvision is first asked for, and does not exist afterwards."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Define the missing operators where torchvision's compiled part cannot load; find nothing itself."""
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        import importlib.util

        spec = importlib.util.find_spec("torchvision")
        if spec is not None and spec.origin is not None and not _loads(spec.origin):
            _define_operators()
        return spec


def _loads(origin: str) -> bool:
    import ctypes
    import pathlib

    import torch  # noqa: F401 - its libraries must be in the process before the extension is tried

    try:
        ctypes.CDLL(str(pathlib.Path(origin).parent / "_C.so"))
    except OSError:
        return False
    return True


def _define_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)  # the definitions live as long as this object


_KEPT: list[Any] = []


def guard_torchvision() -> None:
    """Install the hook in front of the import system, unless torchvision is loaded or the hook is there already."""
    if "torchvision" not in sys.modules and not any(isinstance(f, _TorchvisionGuard) for f in sys.meta_path):
        sys.meta_path.insert(0, _TorchvisionGuard())


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the loading bars of transformers and diffusers inside the block unless stderr is a terminal."""
    if sys.stderr.isatty():
        yield
        return
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(log, log.is_progress_bar_enabled()) for log in (transformers_logging, diffusers_logging)]
    for log, _ in before:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, enabled in before:
            if enabled:
                log.enable_progress_bar()
