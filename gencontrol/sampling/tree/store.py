"""Trees after they were grown: new temperature or reward, merging, and one safetensors file per forest.

A file names the model, condition, prompts and reward that it belongs to by fingerprints, since states mean nothing
under another model; what differs is named.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gencontrol.errors import UsageError
from gencontrol.files import FileLayer, disk_errors, feed
from gencontrol.sampling.chain import cond_leaves, make_chain
from gencontrol.sampling.loop import STEPS
from gencontrol.sampling.scoring import Scorer
from gencontrol.sampling.state import Step
from gencontrol.sampling.tree.growth import Forest, TreeConfig, combine_moments, reward_twist
from gencontrol.sampling.tree.rules import Boltzmann, Rule, Uct, Widening
from gencontrol.types import Cond

FORMAT = "gencontrol-tree-1"
_SAMPLES = 64  # numbers per tensor that enter a model's fingerprint
_PART = 1024  # leaves that are moved to the device together


def retilt(tree: Forest, temperature: float | None, reward: Any) -> None:
    """Set a temperature or reward and back all values up again; see `DiffusionTree.retilt`."""
    if temperature is not None and (not math.isfinite(temperature) or temperature <= 0):
        raise UsageError(f"temperature is {temperature}; it must be > 0.")
    if reward is not None:
        if tree.config.guidance > 0:
            raise UsageError("this tree was grown along its reward's gradient; build a new one for another.")
        _score_again(tree, reward)
    if temperature is not None:
        tree.config = replace(tree.config, temperature=temperature)
        twist = reward_twist(tree.scorer, tree.config.guidance / temperature, tree.config.max_grad_norm)
        tree.chain = replace(tree.chain, twist=twist)
    tree.config = replace(tree.config, retilted=True)
    tree.back_up_all()


def _score_again(tree: Forest, reward: Any) -> None:
    """Score every stored leaf by a new reward; the tree changes only when all are scored."""
    nodes, old = tree.nodes, tree.scorer
    scorer = Scorer(reward, old.decode, old.context, old.batch, old.repeats, calls=old.calls)
    leaves = tree.leaves
    roots = nodes.root_of(leaves)
    found = []
    for first in range(0, len(leaves), _PART):
        part = slice(first, first + _PART)
        x = tree.pools[-1].take(nodes["row"][leaves[part]], tree.chain.device)
        found.append(scorer(x, torch.from_numpy(roots[part])))
    tree.scorer = scorer
    for name, value in {"valid": 0, "mean": 0.0, "m2": 0.0, "best": math.nan}.items():
        tree.counts[name][:] = value
    if found:
        values, valid = torch.cat([part.values for part in found]), torch.cat([part.valid for part in found])
        tree.enter_rewards(leaves, roots, values.numpy(), valid.numpy())


def merge(tree: Forest, other: Forest) -> None:
    """Join the children of the roots; see `DiffusionTree.merge`."""
    mine, theirs = _identity(tree), _identity(other)
    for key, value in mine.items():
        if theirs[key] != value:
            raise UsageError(f"these trees cannot be merged: their {key} differs.")
    if shared := tree.seeds & other.seeds:
        raise UsageError(f"both trees hold the rollouts of seed {min(shared)}; build them with different seeds.")
    nodes, added, roots = tree.nodes, other.nodes, tree.roots
    shift = nodes.size - roots
    rows = added["row"].copy()
    for level, pool in enumerate(other.pools, 1):
        states = pool.all()
        if states is not None:
            rows[added["level"] == level] += tree.pools[level - 1].add(states)[0] if len(states) else 0
    columns = {name: column[roots:] for name, column in added.arrays().items()}
    parent = np.where(columns["parent"] < roots, columns["parent"], columns["parent"] + shift)
    ids = nodes.add(added.size - roots, **(columns | {"parent": parent, "row": rows[roots:]}))
    nodes["start"][ids] = nodes["count"][ids] = 0
    nodes.link(parent, ids)
    nodes["drawn"][:roots] += added["drawn"][:roots]
    nodes["visits"][:roots] += added["visits"][:roots] - 1
    columns = other.rollouts.arrays()
    tree.rollouts.add(other.rollouts.size, **(columns | {"leaf": columns["leaf"] + shift}))
    _merge_counts(tree, other)
    tree.seeds |= other.seeds
    tree.remember_tokens()
    tree.back_up_all()


def _merge_counts(tree: Forest, other: Forest) -> None:
    """Add calls, rewards' mean and spread."""
    a, b = tree.counts, other.counts
    combine_moments(a, b["valid"], b["mean"], b["m2"])
    a["best"][:] = np.fmax(a["best"], b["best"])
    a["nfe"][:] += b["nfe"]
    tree.rounds += other.rounds
    tree.scorer.add_counters(other.scorer.counters())


def save(tree: Forest, path: str | Path) -> None:
    """Write one safetensors file, atomically.

    Raises:
        UsageError: the rule or step is not one of ours and has no name to store.
        DiskError: the disk is full or the folder cannot be written.
    """
    from safetensors.torch import save as to_bytes

    plain = {
        "format": FORMAT,
        "identity": _identity(tree),
        "config": asdict(tree.config) | {"select": _stored(tree.config.select, {"Boltzmann", "Uct"})},
        "step": _stored(tree.chain.step, {type_.__name__ for type_ in STEPS.values()}),
        "grid": tree.chain.grid,
        "item_shape": tree.chain.item_shape,
        "roots": tree.roots,
        "rounds": tree.rounds,
        "seeds": sorted(tree.seeds),
        "repeats": tree.scorer.repeats,
        "scorer": tree.scorer.counters(),
    }
    tensors = {f"nodes.{name}": column for name, column in tree.nodes.arrays().items()}
    tensors |= {f"rollouts.{name}": column for name, column in tree.rollouts.arrays().items()}
    tensors |= {f"counts.{name}": column for name, column in tree.counts.arrays().items()}
    tensors["slots"] = tree.nodes.slots()
    found = {name: torch.from_numpy(np.ascontiguousarray(value).copy()) for name, value in tensors.items()}
    for level, pool in enumerate(tree.pools):
        if (states := pool.all()) is not None:
            found[f"states.{level}"] = states.cpu()
    plain["checksum"] = _checksum(found)
    target = Path(path)
    with disk_errors("the tree", target.parent):
        files = FileLayer()
        files.make_folder(target.parent)
        files.replace_file(target, to_bytes(found, metadata={"tree": json.dumps(plain)}))


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
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


def restore(
    tree: Forest,
    plain: dict[str, Any],
    tensors: dict[str, Tensor],
    model: Any,
    scorer: Scorer,
    cond: Cond,
    autocast: Callable[[], AbstractContextManager[Any]],
    store: torch.device | str | None,
) -> None:
    """Fill a tree with what `read` returned.

    Raises:
        UsageError: the file belongs to another model, condition, prompt or reward.
    """
    stored = dict(plain["config"])
    select, widening = stored.pop("select"), Widening(**stored.pop("widening"))
    rule: Rule = (Uct if select.pop("class") == "Uct" else Boltzmann)(**select)
    config = TreeConfig(**(stored | {"branch": tuple(stored["branch"]), "select": rule, "widening": widening}))
    chain = make_chain(
        model,
        plain["item_shape"],
        roots=plain["roots"],
        step=_step(plain["step"]),
        times=plain["grid"],
        cond=cond,
        autocast=autocast,
        twist=reward_twist(scorer, config.guidance / config.temperature, config.max_grad_norm),
    )
    Forest.__init__(tree, chain, scorer, config, torch.device(store) if store is not None else chain.device)
    for key, value in _identity(tree).items():
        if plain["identity"][key] != value:
            raise UsageError(
                f"this tree was built with another {key} ({plain['identity'][key]}, now {value}); "
                f"give the same {key}, or build a new tree."
            )
    for name, table in {"nodes": tree.nodes, "rollouts": tree.rollouts, "counts": tree.counts}.items():
        columns = {key: tensors[f"{name}.{key}"].numpy() for key in table.arrays()}
        table.size = 0
        table.add(len(next(iter(columns.values()))), **columns)
    tree.nodes.set_slots(tensors["slots"].numpy())
    for level, pool in enumerate(tree.pools):
        if f"states.{level}" in tensors:
            pool.add(tensors[f"states.{level}"])
    tree.remember_tokens()
    tree.rounds, tree.seeds = plain["rounds"], set(plain["seeds"])
    scorer.set_counters(plain["scorer"])


def _stored(value: Rule | Step, known: set[str]) -> dict[str, Any]:
    """A rule or step as its class name and fields.

    Raises:
        UsageError: a class of the user's own.
    """
    name = type(value).__name__
    if name not in known or not dataclasses.is_dataclass(value):
        raise UsageError(f"a tree with {name} cannot be saved: only the rules and steps of gencontrol have a name.")
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {"class": name} | {k: _stored(v, known) if isinstance(v, Step) else v for k, v in fields.items()}


def _step(stored: dict[str, Any]) -> Step:
    """The step that `_stored` wrote."""
    kinds = {type_.__name__: type_ for type_ in STEPS.values()}
    fields = {
        key: _step(value) if isinstance(value, dict) else value for key, value in stored.items() if key != "class"
    }
    return kinds[stored["class"]](**fields)


def _identity(tree: Forest) -> dict[str, str]:
    """What must agree for two trees to speak of the same problem."""
    chain, context = tree.chain, tree.scorer.context
    law = [chain.grid, chain.item_shape, repr(chain.step), tree.config.branch, tree.config.guidance]
    return {
        "model": fingerprint(chain.model),
        "condition": _digest(cond_leaves(chain.cond)),
        "prompt": _digest([json.dumps(list(context.prompts or []))]),
        "reward": tree.scorer.reward.name,
        "time grid, step or branch": _digest([repr(law)]),
        "temperature": f"{tree.config.temperature:g}",
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
