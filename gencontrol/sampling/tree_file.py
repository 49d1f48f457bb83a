"""Trees after they were grown: new temperature or reward, merging, and one safetensors file per forest.

A file names the model, condition, prompts and reward that it belongs to by fingerprints, since states mean nothing
under another model; what differs is named.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gencontrol.errors import UsageError
from gencontrol.files import FileLayer, disk_errors
from gencontrol.sampling.chain import make_chain
from gencontrol.sampling.loop import STEPS
from gencontrol.sampling.scoring import Scorer
from gencontrol.sampling.state import Step
from gencontrol.sampling.tree_growth import Forest, TreeConfig, reward_twist
from gencontrol.sampling.tree_rules import Boltzmann, Rule, Uct, Widening
from gencontrol.types import Cond, map_cond

FORMAT = "gencontrol-tree-1"
_SAMPLES = 64  # numbers per tensor that enter a model's fingerprint


def retilt(tree: Forest, temperature: float | None, reward: Any) -> None:
    """Set a temperature or reward and back all values up again; see `DiffusionTree.retilt`."""
    if temperature is not None:
        if not math.isfinite(temperature) or temperature <= 0:
            raise UsageError(f"temperature is {temperature}; it must be > 0.")
        tree.config = replace(tree.config, temperature=temperature)
    if reward is not None:
        if tree.config.guidance > 0:
            raise UsageError("this tree was grown along its reward's gradient; build a new one for another.")
        old = tree.scorer
        tree.scorer = Scorer(reward, old.decode, old.context, old.batch, old.repeats, calls=old.calls)
        _score_again(tree)
    for level in range(tree.config.last - 1, -1, -1):
        tree.nodes.back_up(tree.nodes.at_level(level), tree.config.inverse_temperature, hard=tree.config.hard)


def _score_again(tree: Forest) -> None:
    """Score every stored leaf by the present reward."""
    nodes, counts = tree.nodes, tree.counts
    leaves = nodes.at_level(tree.config.last)
    roots = nodes.root_of(leaves)
    for name, value in {"valid": 0, "mean": 0.0, "m2": 0.0, "best": math.nan}.items():
        counts[name][:] = value
    tree.excluded = []
    for first in range(0, len(leaves), 1024):
        part = slice(first, first + 1024)
        x = tree.pools[-1].take(nodes["row"][leaves[part]], tree.chain.device)
        scores = tree.scorer(x, torch.from_numpy(roots[part]))
        tree.enter_rewards(leaves[part], roots[part], scores.values.numpy(), scores.valid.numpy())


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
    columns |= {"parent": parent, "row": rows[roots:], "start": 0, "count": 0}
    ids = nodes.add(added.size - roots, **columns)
    for above, child in zip(parent.tolist(), ids.tolist(), strict=True):
        nodes.link(above, child)
    nodes["drawn"][:roots] += added["drawn"][:roots]
    nodes["visits"][:roots] += added["visits"][:roots] - 1
    columns = other.rollouts.arrays()
    tree.rollouts.add(other.rollouts.size, **(columns | {"leaf": columns["leaf"] + shift}))
    tree.excluded += [node + shift for node in other.excluded]
    _merge_counts(tree, other)
    tree.seeds |= other.seeds
    nodes.back_up(np.arange(roots), tree.config.inverse_temperature, hard=tree.config.hard)


def _merge_counts(tree: Forest, other: Forest) -> None:
    """Add calls, rewards' mean and spread (Chan et al. 1979)."""
    a, b = tree.counts, other.counts
    total = a["valid"] + b["valid"]
    gap = b["mean"] - a["mean"]
    share = b["valid"] / np.maximum(total, 1)
    a["m2"][:] = a["m2"] + b["m2"] + gap**2 * a["valid"] * share
    a["mean"][:] = a["mean"] + gap * share
    a["best"][:] = np.fmax(a["best"], b["best"])
    a["valid"][:] = total
    a["nfe"][:] += b["nfe"]
    tree.rounds += other.rounds
    tree.scorer.calls += other.scorer.calls
    tree.scorer.excluded += other.scorer.excluded


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
        "excluded": tree.excluded,
        "repeats": tree.scorer.repeats,
        "scorer": {"calls": tree.scorer.calls, "excluded": tree.scorer.excluded, "reasons": tree.scorer.reasons},
    }
    tensors = {f"nodes.{name}": column for name, column in tree.nodes.arrays().items()}
    tensors |= {f"rollouts.{name}": column for name, column in tree.rollouts.arrays().items()}
    tensors |= {f"counts.{name}": column for name, column in tree.counts.arrays().items()}
    tensors["slots"] = tree.nodes.slots()
    found = {name: torch.from_numpy(np.ascontiguousarray(value).copy()) for name, value in tensors.items()}
    for level, pool in enumerate(tree.pools):
        if (states := pool.all()) is not None:
            found[f"states.{level}"] = states.cpu().contiguous().clone()
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
    tree.rounds, tree.seeds, tree.excluded = plain["rounds"], set(plain["seeds"]), list(plain["excluded"])
    scorer.calls, scorer.excluded = plain["scorer"]["calls"], plain["scorer"]["excluded"]
    scorer.reasons = dict(plain["scorer"]["reasons"])


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
        "condition": _digest(_tensors(chain.cond)),
        "prompt": _digest([json.dumps(list(context.prompts or []))]),
        "reward": tree.scorer.reward.name,
        "time grid, step or branch": _digest([repr(law)]),
        "temperature": f"{tree.config.temperature:g}",
    }


def fingerprint(model: Any) -> str:
    """Return a short digest of a model: classes, plain settings, and up to 64 numbers of every tensor."""
    parts: list[Any] = [repr(model.process)]
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str) and k != "training"}
            parts.append(f"{name} {type(module).__name__} {sorted(plain.items())}")
        for name, tensor in sorted(model.state_dict().items()):
            flat = tensor.detach().flatten()
            places = torch.linspace(0, max(0, flat.numel() - 1), min(_SAMPLES, flat.numel())).long()
            parts += [f"{name} {tuple(tensor.shape)}", flat[places.to(flat.device)]]
    else:
        parts.append(type(model).__name__)
    return _digest(parts)


def _tensors(cond: Cond) -> list[Tensor]:
    """All tensors of a condition."""
    found: list[Tensor] = []
    map_cond(lambda leaf: found.append(leaf) or leaf, cond)  # type: ignore[func-returns-value]  # append returns None
    return found


def _digest(parts: list[Any]) -> str:
    """Twelve hexadecimal digits of texts and tensors."""
    state = hashlib.blake2b(digest_size=6)
    for part in parts:
        data = part.detach().double().cpu().numpy().tobytes() if isinstance(part, Tensor) else str(part).encode()
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()
