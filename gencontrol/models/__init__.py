"""Models: denoisers, exact members of the family, backbones and their roles; names load when asked for."""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "Denoiser": "gencontrol.models.denoiser",
    "EnumerableTokens": "gencontrol.models.exact",
    "GaussianMixture": "gencontrol.models.exact",
}

__all__ = ["Denoiser", "EnumerableTokens", "GaussianMixture"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'gencontrol.models' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)
