"""Numbers that the official code of published methods computed on small inputs (tests/fixtures/golden)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "fixtures" / "golden"


@cache
def cases(name: str) -> dict[str, dict[str, Any]]:
    """The cases of file `name` with their configuration."""
    with safe_open(str(FOLDER / f"{name}.safetensors"), "pt") as file:
        return dict(json.loads(file.metadata()["cases"]))


def tensors(name: str, case: str = "") -> dict[str, Tensor]:
    """The tensors of one case by their short names, and those that all cases share; without a case, those alone."""
    with safe_open(str(FOLDER / f"{name}.safetensors"), "pt") as file:
        keys = list(file.keys())
        shared = {key: file.get_tensor(key) for key in keys if "/" not in key}
        own = {
            key.removeprefix(f"{case}/"): file.get_tensor(key) for key in keys if case and key.startswith(f"{case}/")
        }
    if case and not own:
        raise KeyError(f"{name} has no case {case!r}")
    return shared | own


@cache
def official(method: str) -> dict[str, dict[str, Any]]:
    """The presets of a method's official configuration files: preset -> name -> value."""
    return dict(json.loads((FOLDER / "official_configs.json").read_text())[method]["presets"])


def relative(found: Any, expected: Any) -> float:
    """Largest difference over the largest expected size."""
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    return float((found - expected).detach().abs().max() / expected.abs().max())
