"""One safetensors file per forest.

A file names the model, condition, prompts and reward that it belongs to by fingerprints, since states mean nothing
under another model; what differs is named.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gencontrol.errors import UsageError
from gencontrol.files import FileLayer, disk_errors, feed
from gencontrol.sampling.chain import Chain, cond_leaves
from gencontrol.sampling.loop import STEPS
from gencontrol.sampling.scoring import Scorer
from gencontrol.sampling.state import Step
from gencontrol.sampling.tree.rules import Boltzmann, Rule, Shrunk, Uct

FORMAT = "gencontrol-tree-1"
_SAMPLES = 64  # numbers per tensor that enter a model's fingerprint
#: what a file may name; classes are never looked up by a name that a stranger wrote
_CLASSES: dict[str, Any] = {
    **{kind.__name__: kind for kind in (Boltzmann, Shrunk, Uct)},
    **{kind.__name__: kind for kind in STEPS.values()},
}


def write_tree(path: str | Path, facts: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file, atomically.

    Raises:
        DiskError: the disk is full or the folder cannot be written.
    """
    from safetensors.torch import save

    plain = {"format": FORMAT, **facts, "checksum": _checksum(tensors)}
    target = Path(path)
    with disk_errors("the tree", target.parent):
        files = FileLayer()
        files.make_folder(target.parent)
        files.replace_file(target, save(tensors, metadata={"tree": json.dumps(plain)}))


def read_tree(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a tree file says and its tensors.

    Raises:
        UsageError: missing, cut short, or not a tree file.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path)
    if not file.is_file():
        raise UsageError(f"tree file '{file}' does not exist; check the path.")
    try:
        with safe_open(str(file), framework="pt") as opened:
            plain = json.loads((opened.metadata() or {}).get("tree", "{}"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, ValueError, OSError) as error:
        raise UsageError(f"tree file '{file}' cannot be read ({error}); it is damaged or not a tree.") from error
    if plain.get("format") != FORMAT:
        raise UsageError(f"'{file}' is not a tree file of this version ({FORMAT}); build the tree again.")
    if plain.get("checksum") != _checksum(tensors):
        raise UsageError(f"tree file '{file}' is damaged: its checksum does not fit; take a copy or build it again.")
    return plain, tensors


def stored(value: Rule | Step) -> dict[str, Any]:
    """Return a rule or step as its class name and fields.

    Raises:
        UsageError: a class of the user's own, which no file can name.
    """
    name = type(value).__name__
    if name not in _CLASSES or not dataclasses.is_dataclass(value):
        raise UsageError(f"a tree with {name} cannot be saved: only the rules and steps of gencontrol have a name.")
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {"class": name} | {k: stored(v) if isinstance(v, Step) else v for k, v in fields.items()}


def restored(facts: Mapping[str, Any]) -> Any:
    """Return the rule or step that `stored` wrote."""
    fields = {k: restored(v) if isinstance(v, Mapping) else v for k, v in facts.items() if k != "class"}
    return _CLASSES[facts["class"]](**fields)


def identity(chain: Chain, scorer: Scorer, law: tuple[Any, ...], temperature: float) -> dict[str, str]:
    """Return what must agree for two trees to speak of the same problem; law: step, branch and guidance."""
    return {
        "model": fingerprint(chain.model),
        "condition": _digest(cond_leaves(chain.cond)),
        "prompt": _digest([json.dumps(list(scorer.context.prompts or []))]),
        "reward": scorer.reward.name,
        "time grid, step or branch": _digest([repr([chain.grid, chain.item_shape, *law])]),
        "temperature": f"{temperature:g}",
    }


def fingerprint(model: Any) -> str:
    """Return a short digest of a model: classes, plain settings, and up to 64 numbers of every tensor."""
    parts: list[Any] = [repr(model.process)]
    if not isinstance(model, nn.Module):
        return _digest([*parts, type(model).__name__, *_settings(vars(model))])
    for name, module in model.named_modules():
        parts += [f"{name} {type(module).__name__}", *_settings(vars(module))]
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        parts += [name, *_few(tensor)]
    return _digest(parts)


def _settings(attributes: dict[str, Any]) -> list[Any]:
    """Numbers, texts, lists of them and tensors among an object's attributes (such as the scale of a control)."""
    parts: list[Any] = []
    for name, value in sorted(attributes.items()):
        numbers = isinstance(value, list | tuple) and all(isinstance(each, int | float | str) for each in value)
        if name != "training" and (numbers or isinstance(value, int | float | str)):
            parts.append(f"{name} {value}")
        elif isinstance(value, Tensor):
            parts += [name, *_few(value)]
        elif isinstance(value, Mapping) and value and all(isinstance(each, Tensor) for each in value.values()):
            parts += [name, *(part for each in value.values() for part in _few(each))]
    return parts


def _few(tensor: Tensor) -> list[Any]:
    """Shape and up to 64 numbers of a tensor."""
    flat = tensor.detach().flatten()
    places = torch.linspace(0, max(0, flat.numel() - 1), min(_SAMPLES, flat.numel())).long()
    return [tuple(tensor.shape), flat[places.to(flat.device)]]


def _checksum(tensors: dict[str, Tensor]) -> str:
    """Digest of the bytes of all tensors and their names."""
    return str(feed(hashlib.blake2b(digest_size=16), tensors).hexdigest())


def _digest(parts: list[Any]) -> str:
    """Twelve hexadecimal digits of texts and tensors."""
    state = hashlib.blake2b(digest_size=6)
    for part in parts:
        data = part.detach().double().cpu().numpy().tobytes() if isinstance(part, Tensor) else str(part).encode()
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()
