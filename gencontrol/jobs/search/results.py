"""What a search leaves behind: the tree or particles to go on from, samples as files, tables, and search.json."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gencontrol.errors import RewardError
from gencontrol.files import FileLayer, disk_errors

if TYPE_CHECKING:
    from gencontrol.sampling.tree.nodes import Ints
    from gencontrol.sampling.tree.tree import DiffusionTree

SUMMARY, SAMPLES = "search.json", "samples"
#: Saving may take at most this share of the time (ours): a large tree is saved less often.
_SAVING_SHARE = 0.1
COLUMNS = ("prompt", "sampler", "rank", "reward", "nfe", "reward_calls", "seconds", "file")
#: Nodes of a tree that are drawn (ours: what fits on a page and can still be told apart).
MAX_DRAWN = 240
_MAX_REWARDS = 4000  # kept for the histogram
_DECODE = 16  # samples in one pass of the decoder
_OURS = re.compile(r"\d{3}_(\d{2,}|base)\.(wav|png|txt)")


@dataclass(frozen=True)
class Found:
    """What was found for one prompt.

    Args:
        samples: clean states [k *d], best first, or None.
        rewards: of the samples.
        base: the best sample of the model alone [1 *d], or None; `base_reward` is its reward.
        nfe: model calls for this prompt.
        summary: for the report; holds "reward_calls".
    """

    prompt: str
    samples: Any
    rewards: Sequence[float]
    base: Any
    base_reward: float | None
    nfe: int
    summary: Mapping[str, Any]


def read_json(file: Path) -> Any:
    """Return what a file says; None where there is none or it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_results(
    path: Path,
    found: Sequence[Found],
    facts: Mapping[str, Any],
    decode: Callable[[Any], Any],
    pipeline: Any,
) -> list[dict[str, Any]]:
    """Write the samples of all prompts, the tables, and search.json last; prints the table and returns its rows.

    Args:
        path: the run folder.
        facts: of the whole search, for search.json: sampler, seconds, excluded (reason → samples) and others.
        decode: clean states → samples, on the CPU.
        pipeline: what the samples are of; it knows how they become files.

    Raises:
        DiskError: the disk is full; what lay there before is intact.
        RewardError: no prompt has a sample.
    """
    if not any(each.rewards for each in found):
        why = "; ".join(f"{reason} ({count})" for reason, count in facts["excluded"].items())
        raise RewardError(f"no sample could be scored: {why or 'the reward returned no number'}.")
    files, artefacts, written = FileLayer(), artefacts_of(pipeline), set()

    def write(stem: str, sample: Any) -> list[str]:
        """The files of one sample, the one to listen to or look at first."""
        contents = artefacts(stem, sample)
        names = sorted(contents, key=lambda name: not name.endswith(".wav"))
        for name in names:
            files.replace_file(path / SAMPLES / name, contents[name])
        written.update(names)
        return [f"{SAMPLES}/{name}" for name in names]

    rows, prompts = [], []
    with disk_errors("the samples", path / SAMPLES):
        files.make_folder(path / SAMPLES)
        for index, each in enumerate(found):
            base = None
            if each.base is not None:
                base = {"files": write(f"{index:03d}_base", decode(each.base)[0]), "reward": each.base_reward}
            samples = []
            for first in range(0, len(each.rewards), _DECODE):
                for rank, sample in enumerate(decode(each.samples[first : first + _DECODE]), first + 1):
                    names = write(f"{index:03d}_{rank:02d}", sample)
                    reward, calls = each.rewards[rank - 1], each.summary["reward_calls"]
                    seconds = round(facts["seconds"], 2)
                    row = (each.prompt, facts["sampler"], rank, reward, each.nfe, calls, seconds, names[0])
                    rows.append(dict(zip(COLUMNS, row, strict=True)))
                    samples.append({"files": names, "reward": reward})
            prompts.append({"prompt": each.prompt, "nfe": each.nfe, **each.summary, "base": base, "samples": samples})
        for old in (path / SAMPLES).iterdir():
            if _OURS.fullmatch(old.name) and old.name not in written:
                old.unlink()
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with disk_errors("the results", path):
        files.replace_file(path / "results.csv", table.getvalue().encode())
        files.replace_file(path / "results.json", _as_json(rows))
        files.replace_file(path / SUMMARY, _as_json({"finished": True, **facts, "prompts": prompts}))
    for line in rows:
        print(f"{path / line['file']}  {line['reward']:8.4f}  {line['prompt']}")
    return rows


def _as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def clean(value: float) -> float | None:
    """A finite number, else None: JSON has no NaN."""
    return float(value) if math.isfinite(value) else None


def artefacts_of(pipeline: Any) -> Callable[[str, Any], Mapping[str, bytes]]:
    """Return how samples become files: as a pipeline of ours writes them, else as pictures at their size."""
    from gencontrol.data.images import to_pil
    from gencontrol.pipelines import Pipeline

    def picture(stem: str, sample: Any) -> dict[str, bytes]:
        buffer = io.BytesIO()
        to_pil(sample).save(buffer, format="PNG")
        return {f"{stem}.png": buffer.getvalue()}

    return pipeline.artefacts if isinstance(pipeline, Pipeline) else picture


def clean_staging(path: Path) -> None:
    """Delete half-written files; they are never read."""
    for kind in ("safetensors", "json", "jsonl", "csv", "toml"):
        for file in path.glob(f".tmp_*.{kind}_*"):
            file.unlink()


def headline(record: Mapping[str, Any]) -> str:
    """The numbers to watch."""
    best = record["reward/best"]
    return f"best {best:.4g}" if math.isfinite(best) else "nothing scored yet"


def mean(values: Sequence[float]) -> float:
    """Mean of the finite values; NaN without one."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


# ---------------------------------------------------------------- trees


class Saver:
    """Saves a tree every so often, but never for more than a tenth of the time."""

    def __init__(self, tree: DiffusionTree, file: Path, every: float) -> None:
        self._tree, self._file, self._every = tree, file, every
        self._saved = tree.rounds if file.exists() else -1
        self._due = time.monotonic() + every

    def when_due(self) -> None:
        """Save where it is time."""
        if time.monotonic() >= self._due:
            self.save()

    def save(self) -> None:
        """Save unless the file holds this very state."""
        if self._saved == self._tree.rounds:
            return
        begin = time.monotonic()
        try:
            self._tree.save(self._file)
        except BaseException:
            clean_staging(self._file.parent)  # a full disk must not keep half a tree
            raise
        self._saved = self._tree.rounds
        taken = time.monotonic() - begin
        self._due = time.monotonic() + max(self._every, taken / _SAVING_SHARE if self._every else 0.0)


def of_tree(tree: DiffusionTree, root: int, prompt: str, count: int, readout: str) -> Found:
    """Return what a tree found for a prompt, and the best of its plain base samples.

    Args:
        readout: "best", or "distinct" draws from the tree's law.
    """
    from gencontrol.pipelines.search.tree_search import read

    leaves = read(tree, root, count, readout) if tree.counts["valid"][root] else None
    leaf = tree.rollouts["leaf"].astype(np.int64)
    plain = (tree.rollouts["start"] == 0) & tree.nodes["ready"][leaf] & (tree.nodes.root_of(leaf) == root)
    mine = leaf[plain]
    base = tree.gather(mine[[np.argmax(tree.nodes["value"][mine])]]) if len(mine) else None
    return Found(
        prompt,
        None if leaves is None else leaves.x,
        [] if leaves is None else leaves.rewards.tolist(),
        None if base is None else base.x,
        None if base is None else float(base.rewards[0]),
        int(tree.counts["nfe"][root]),
        summarise(tree, root, None if leaves is None else int(leaves.nodes[0])),
    )


def summarise(tree: DiffusionTree, root: int, chosen: int | None) -> dict[str, Any]:
    """Return the summary of one root as plain values (JSON).

    Args:
        chosen: leaf of rank 1, whose path is marked; None where nothing is valid.

    Keys: stats, warnings, reward_calls, plain (paths from the root), base_rewards, grown_rewards, curve and base_curve
    ([calls, best reward] where it rises), tree (see `drawn`).
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stats = tree.stats(root)
    nodes = tree.nodes
    mine = nodes.root_of(tree.rollouts["leaf"].astype(np.int64)) == root
    leaf = tree.rollouts["leaf"][mine].astype(np.int64)
    start = tree.rollouts["start"][mine].astype(np.int64)
    base, valid = start == 0, nodes["ready"][leaf]
    # model calls of each rollout: the steps after the node that it started from
    cost = tree.chain.steps - np.array([0, *tree.config.branch])[start]
    reward = np.where(valid, nodes["value"][leaf], -np.inf)
    leaves = nodes.at_level(tree.config.last)
    leaves = leaves[nodes.root_of(leaves) == root]
    grown = np.setdiff1d(leaves[nodes["ready"][leaves]], leaf[base])
    return {
        "stats": {key: clean(value) for key, value in stats.items()},
        "warnings": [str(item.message) for item in caught],
        "reward_calls": len(leaves) * tree.scorer.repeats,
        "plain": int(base.sum()),
        "base_rewards": _thinned(nodes["value"][leaf[base & valid]]),
        "grown_rewards": _thinned(nodes["value"][grown]),
        "curve": _curve(cost, reward),
        "base_curve": _curve(cost[base], reward[base]),
        "tree": drawn(tree, root, chosen),
    }


def _thinned(values: np.ndarray) -> list[float]:
    """Rewards, evenly thinned."""
    return [float(value) for value in values[:: max(1, math.ceil(len(values) / _MAX_REWARDS))]]


def _curve(cost: Ints, reward: np.ndarray) -> list[list[float]]:
    """[model calls, best reward so far] of rollouts wherever it rises, and at the end."""
    calls, best = np.cumsum(cost), np.maximum.accumulate(reward)
    rises = np.flatnonzero(np.diff(best, prepend=-np.inf) > 0)
    places = np.union1d(rises, [len(best) - 1]) if len(rises) else rises
    return [[float(calls[i]), float(best[i])] for i in places]


def drawn(tree: DiffusionTree, root: int, chosen: int | None, most: int = MAX_DRAWN) -> dict[str, Any]:
    """Return the nodes to draw: the marked path, and on every level the most visited children of drawn nodes.

    Of equally visited ones the better are taken.  A level may use what the levels above it left of its share.

    Returns: times (of every level; the first is where the root's children are drawn from noise), nodes as
    [parent, level, value or None, visits, children that are not drawn], parents first; path (places in nodes),
    total (nodes of this root).
    """
    nodes, last = tree.nodes, tree.config.last
    path: list[int] = []
    here = -1 if chosen is None else chosen
    while here >= 0:
        path.insert(0, here)
        here = int(nodes["parent"][here])
    kept: Ints = np.array([root])
    rows = kept
    for level in range(1, last + 1):
        room = (most - len(rows)) // (last + 1 - level)
        ids = nodes.children(kept).ids
        value = np.where(nodes["ready"][ids], nodes["value"][ids], -np.inf)
        order = np.lexsort((ids, -value, -nodes["visits"][ids].astype(np.int64), ~np.isin(ids, path)))
        kept = np.sort(ids[order[: max(room, 1)]])
        rows = np.concatenate([rows, kept])
    place = {int(node): index for index, node in enumerate(rows)}
    shown = np.bincount(nodes["parent"][rows[1:]], minlength=nodes.size)
    grid = tree.chain.grid
    return {
        "times": [grid[0], *(grid[index] for index in tree.config.branch)],
        "nodes": [
            [
                place.get(int(nodes["parent"][node]), -1),
                int(nodes["level"][node]),
                float(nodes["value"][node]) if nodes["ready"][node] else None,
                int(nodes["visits"][node]),
                int(nodes["count"][node] - shown[node]),
            ]
            for node in rows
        ],
        "path": [place[node] for node in path],
        "total": int((nodes.root_of(np.arange(nodes.size)) == root).sum()),
    }
