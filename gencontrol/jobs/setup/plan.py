"""`--dry-run`: sizes of a model, from the headers of its files alone."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gencontrol.errors import UsageError

_NETWORKS = ("transformer", "unet")
_MAX_HEADER = 100 * 2**20  # bytes; what the safetensors format allows


@dataclass(frozen=True)
class Sizes:
    """Parameter counts: `network` is trained or carries the adapter, `rest` is frozen, `trainable` is what moves."""

    network: int
    rest: int
    trainable: int


def read_shapes(file: Path) -> dict[str, list[int]]:
    """Return tensor name → shape from the header of a safetensors file.

    Raises:
        UsageError: not a safetensors file.
    """
    try:
        with open(file, "rb") as handle:
            (size,) = struct.unpack("<Q", handle.read(8))
            if size > _MAX_HEADER:
                raise ValueError(f"header of {size} bytes")
            header = json.loads(handle.read(size))
        return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UsageError(f"'{file}' is not a safetensors file ({error}); download or save the model again.") from error


def count_parameters(folder: Path, lora_rank: int, targets: Sequence[str] = ()) -> Sizes:
    """Count the parameters of a pipeline folder and of an adapter; rank 0 trains all of the network.

    Raises:
        UsageError: no network in the folder, or lora_targets that fit no layer.
    """
    network: dict[str, list[int]] = {}
    rest = 0
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        for file in sorted(part.rglob("*.safetensors")):
            shapes = read_shapes(file)
            if part.name in _NETWORKS:
                network |= shapes
            else:
                rest += sum(math.prod(shape) for shape in shapes.values())
    if not network:
        raise UsageError(f"'{folder}' has no weights in {' or '.join(_NETWORKS)}/; it is not a whole pipeline.")
    total = sum(math.prod(shape) for shape in network.values())
    if not lora_rank:
        return Sizes(total, rest, total)
    from gencontrol.models.roles import lora_targets

    names = lora_targets(_skeleton(network), tuple(targets) or None)
    return Sizes(total, rest, sum(lora_rank * sum(network[f"{name}.weight"]) for name in names))


def _skeleton(shapes: Mapping[str, list[int]]) -> Any:
    """A module tree with the file's linear layers and no memory behind them, for choosing targets by name."""
    from torch import nn

    root = nn.Module()
    for key, shape in shapes.items():
        if key.endswith(".weight") and len(shape) == 2:
            *path, last = key.removesuffix(".weight").split(".")
            node = root
            for name in path:
                if name not in dict(node.named_children()):
                    node.add_module(name, nn.Module())
                node = node.get_submodule(name)
            node.add_module(last, nn.Linear(shape[1], shape[0], bias=False, device="meta"))
    return root


def human_bytes(count: int) -> str:
    """Write a size for people."""
    if count < 2**20:
        return f"{count / 2**10:.1f} KiB"
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"
