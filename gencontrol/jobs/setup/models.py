"""Models: which pipeline one is, and how large, from small files and headers before it is loaded; and loading."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gencontrol.errors import UsageError
from gencontrol.jobs.setup.checks import download_hint

Medium = Literal["audio", "image"]

#: class that fine-tunes and samples, by what comes out
PIPELINES: dict[Medium, str] = {"audio": "TextToAudioPipeline", "image": "TextToImagePipeline"}
#: what is optimised, and how, where neither is named
DEFAULT_REWARD: dict[Medium, str] = {"audio": "clap", "image": "compositional"}


def folder_of(model: str) -> Path | None:
    """Return where a model lies, or None for a hub id.

    Raises:
        EnvironmentMissing: a bundled model is not in this installation.
    """
    from gencontrol.pipelines.hub.hub import BUNDLED_NAMES, bundled_folder

    if model in BUNDLED_NAMES:
        return bundled_folder(BUNDLED_NAMES[model])
    path = Path(model).expanduser()
    return path if path.is_dir() else None


def medium_of_class(name: str, model: str) -> Medium:
    """Return what a pipeline class makes.

    Raises:
        UsageError: it is none that can be fine-tuned.
    """
    from gencontrol.pipelines.backends.foreign_audio import FOREIGN
    from gencontrol.pipelines.search.diffusers import IMAGES

    if name == PIPELINES["audio"] or name in FOREIGN:
        return "audio"
    if name == PIPELINES["image"] or name in IMAGES:
        return "image"
    known = ", ".join([*PIPELINES.values(), *FOREIGN, *IMAGES])
    raise UsageError(f"--model {model} is a {name}; this takes {known}.")


def medium_of(model: str, task: str) -> Medium | None:
    """Return what a model makes, before anything loads; None for a hub id without --task.

    Args:
        model: bundled name, folder or hub id.
        task: "auto", "audio" or "image".

    Raises:
        UsageError: --task contradicts the folder, or the folder's pipeline cannot be fine-tuned.
    """
    from gencontrol.pipelines.hub.hub import read_index

    if model == "bundled" and task == "image":
        model = "bundled-image"
    folder = folder_of(model)
    found = None if folder is None else medium_of_class(str(read_index(folder)["_class_name"]), model)
    if task == "auto":
        return found
    asked: Medium = "image" if task == "image" else "audio"
    if found not in (None, asked):
        raise UsageError(f"--task {task}, but --model {model} makes {found}s; leave --task out or name another model.")
    return asked


def load_pipeline(model: str, device: str, *, online: bool, task: str = "auto", lora: str | None = None) -> Any:
    """Load a model in float32 (autocast gives the lower precision) onto the device, with a LoRA where one is named.

    Raises:
        UsageError, EnvironmentMissing: see `from_pretrained` and `load_lora_weights`.
    """
    from gencontrol import pipelines
    from gencontrol.pipelines.hub.hub import LoadOptions, locate

    medium = medium_of(model, task)
    if model == "bundled" and medium == "image":
        model = "bundled-image"
    with download_hint(model, online=online):
        if medium is None:
            index, _ = locate(model, LoadOptions(local_files_only=not online), "text_to_audio")
            medium = medium_of_class(str(index["_class_name"]), model)
        kind: Any = getattr(pipelines, PIPELINES[medium])
        pipeline = kind.from_pretrained(model, local_files_only=not online)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    return pipeline.to(device)


def adopt(pipeline: Any) -> Any:
    """Return a loaded pipeline as one of ours that can be fine-tuned and drawn from; it shares the components.

    Raises:
        UsageError: it is neither one of ours nor a class of diffusers that can be wrapped.
    """
    from gencontrol import pipelines

    name = type(pipeline).__name__
    kind: Any = getattr(pipelines, PIPELINES[medium_of_class(name, f"a loaded {name}")])
    return pipeline if isinstance(pipeline, kind) else kind(pipeline)


# ---------------------------------------------------------------- sizes, from the headers of files

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
