"""Folders of small models: config.json, which names the class, and model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.files import replacing


def write_model(folder: str | Path, name: str, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write the folder; the weights appear whole or not at all.

    Args:
        name: of the class.
        config: what JSON can hold.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": name, **config}, indent=1) + "\n")
    with replacing(folder / "model.safetensors") as staged:
        save_file({key: value.contiguous().cpu() for key, value in weights.items()}, staged)


def read_config(folder: str | Path, name: str) -> dict[str, Any]:
    """Return the config of a folder that `write_model` wrote for the class `name`.

    Raises:
        UsageError: there is none, or it is that of another class.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise UsageError(
            f"no {name} at '{folder}': config.json is missing; give a folder that its save_pretrained wrote."
        )
    table: dict[str, Any] = json.loads(path.read_text())
    if table.pop("_class_name", None) != name:
        raise UsageError(f"'{path}' does not describe a model of class {name}; check the folder.")
    return table


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a folder that `write_model` wrote, on the CPU and in the stored dtype."""
    return load_file(Path(folder) / "model.safetensors")
