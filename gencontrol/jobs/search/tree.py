"""Growing the trees of a search: resume, spend the budget, save now and then, leave on a signal without loss.

A round is a pure function of the tree, so a search that was killed and started again ends with the same bits.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gencontrol.errors import CheckpointError, Preempted, RewardError, UsageError
from gencontrol.files import FileLayer
from gencontrol.jobs.search.model import SearchModel
from gencontrol.jobs.search.output import PromptResult, write_results
from gencontrol.jobs.search.settings import TREES, SearchConfig, branch_of, parse_widening
from gencontrol.jobs.search.summary import summarise
from gencontrol.types import RewardContext

if TYPE_CHECKING:
    from gencontrol.jobs.search.search import SearchJob
    from gencontrol.sampling.tree.readout import Leaves
    from gencontrol.sampling.tree.tree import DiffusionTree
    from gencontrol.train.run_folder import MetricsFile
    from gencontrol.train.signals import SignalGuard

TREE = "tree.safetensors"
#: Saving may take at most this share of the time (ours): a large tree is saved less often.
_SAVING_SHARE = 0.1


def run(job: SearchJob, model: SearchModel, reward: Any) -> None:
    """Grow one tree per prompt up to the budget and write the results.

    Raises:
        Preempted: a signal came; the tree is saved.
        RewardError: nothing could be scored.
        UsageError, CheckpointError: the tree in the folder is of another search, or damaged.
        DiskError: the tree or the results could not be written.
    """
    from gencontrol.train.run_folder import MetricsFile

    path = job.folder.path
    clean_staging(path)
    tree = open_tree(path / TREE, job, model, reward)
    metrics = MetricsFile(path / "metrics.jsonl", FileLayer())
    metrics.rewind(tree.rounds)
    rows = metrics.read()
    log = _Log(metrics, rows[-1].get("time/wall", 0.0) if rows else 0.0, len(job.prompts) * job.search.nfe)
    grow(tree, job.search, path / TREE, log)
    results = read_out(tree, job.prompts, job.search, log.seconds())
    write_results(job, model, results, tree.scorer.reasons)


def clean_staging(path: Path) -> None:
    """Delete half-written files that a killed process left; they are never read."""
    for pattern in (".tmp_*.safetensors_*", ".tmp_*.json_*", ".tmp_*.jsonl_*", ".tmp_*.csv_*", ".tmp_*.toml_*"):
        for file in path.glob(pattern):
            file.unlink()


def open_tree(file: Path, job: SearchJob, model: SearchModel, reward: Any) -> DiffusionTree:
    """Return the tree of the run folder, or a new one.

    Raises:
        UsageError: the file is of another model, prompt or reward.
        CheckpointError: the file is damaged; it is left as it is.
    """
    from gencontrol.sampling.tree.tree import DiffusionTree

    config, problem = job.search, model.problem
    context = RewardContext(prompts=problem.prompts, sampling_rate=problem.sampling_rate)
    shared: dict[str, Any] = {"cond": problem.cond, "decode": problem.decode, "context": context}
    shared |= {"autocast": model.autocast}
    if file.exists():
        try:
            return DiffusionTree.load(file, problem.model, reward, **shared)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, UsageError) and "damaged" not in str(error):
                raise UsageError(f"'{file}': {error}") from error
            why = str(error) if isinstance(error, UsageError) else f"tree file '{file}' is damaged ({error})."
            raise CheckpointError(
                f"{why[:400]} Nothing was changed; put a good copy there, or name another --output to start anew."
            ) from error
    select, widening = TREES[config.sampler]
    return DiffusionTree(
        problem.model,
        reward,
        (len(problem.prompts), *problem.item_shape),
        steps=problem.steps,
        times=problem.times,
        branch=branch_of(config, problem.steps),
        temperature=config.temperature,
        select=config.select or select,
        backup=config.backup,
        widening=parse_widening(config.widening or widening),
        leaf_batch=config.leaf_batch,
        generator=config.seed,
        guidance=config.gradient,
        max_grad_norm=config.max_grad_norm or None,
        **shared,
    )


@dataclass
class _Log:
    """Writes metrics.jsonl and shows progress; `before` are the seconds of earlier processes."""

    metrics: MetricsFile
    before: float
    total: int

    def __post_init__(self) -> None:
        from gencontrol.train.tracking import Progress

        self._begin = time.monotonic()
        self._progress = Progress(self.total, visible=True, unit="model call", describe=_headline)

    def seconds(self) -> float:
        """Seconds spent on this search so far, earlier processes included."""
        return self.before + time.monotonic() - self._begin

    def start(self, tree: DiffusionTree) -> None:
        """Show where the search stands."""
        self._progress.start(tree.nfe)

    def round(self, tree: DiffusionTree) -> None:
        """Log a finished round."""
        best = tree.counts["best"].tolist()
        log_z = [tree.log_z_tree(root) for root in range(tree.roots)]
        record: dict[str, Any] = {
            "step": tree.rounds,
            "nfe": tree.nfe,
            "reward_calls": tree.reward_calls,
            "reward/best": _mean(best),
            "log_z": _mean(log_z),
            "excluded": tree.scorer.excluded,
            "time/wall": self.seconds(),
        }
        if tree.roots > 1:
            record |= {"reward/best_each": [_finite(value) for value in best]}
        self.metrics.append(record)
        self._progress.show(tree.nfe, record)

    def close(self) -> None:
        """Make the lines durable and leave the terminal as it was."""
        self._progress.close()
        self.metrics.sync()


def _headline(record: Mapping[str, Any]) -> str:
    """The numbers to watch."""
    best = record["reward/best"]
    return f"best {best:.4g}" if np.isfinite(best) else "nothing scored yet"


def _mean(values: Sequence[float]) -> float:
    """Mean of the finite values; NaN without one."""
    finite = [value for value in values if np.isfinite(value)]
    return sum(finite) / len(finite) if finite else float("nan")


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def grow(tree: DiffusionTree, config: SearchConfig, file: Path, log: _Log) -> None:
    """Spend the budget; the tree is saved every `save_every` seconds, at the end, and when a signal ends it."""
    from gencontrol.train.signals import SignalGuard

    saver = _Saver(tree, file, config.save_every)
    log.start(tree)
    with SignalGuard() as guard:
        try:
            for _ in rounds(tree, config.nfe, guard):
                log.round(tree)
                saver.when_due()
        except (Preempted, RewardError):
            saver.save()  # what was found before stays
            raise
        finally:
            log.close()
        saver.save()


def rounds(tree: DiffusionTree, nfe: int, guard: SignalGuard) -> Iterator[None]:
    """Grow by rounds while a whole path fits into `nfe` calls of a root, counted from the very beginning.

    Unlike `DiffusionTree.build`, whose budget counts from now on, this gives the same rounds however often the search
    was interrupted.

    Raises:
        Preempted: a signal came; the tree is as it was before the round.
    """
    from gencontrol.sampling.tree.tree import MAX_IDLE_ROUNDS

    idle = 0
    while True:
        guard.poll()
        room = (nfe - tree.counts["nfe"]) // tree.chain.steps
        width = np.clip(room, 0, tree.config.leaf_batch)
        if not width.any():
            return
        spent = tree.nfe
        tree.grow(width, guard.poll)
        idle = idle + 1 if tree.nfe == spent else 0
        if idle >= MAX_IDLE_ROUNDS:
            warnings.warn("the tree holds all it will find; a larger --widening goes on.", stacklevel=2)
            return
        yield


class _Saver:
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


def read_out(tree: DiffusionTree, prompts: Sequence[str], config: SearchConfig, seconds: float) -> list[PromptResult]:
    """Return the samples of every prompt: the best leaves of dts-star, distinct draws from the tree's law of dts.

    Raises:
        RewardError: no sample of any prompt could be scored.
    """
    if not tree.counts["valid"].any():
        why = "; ".join(f"{reason} ({count})" for reason, count in tree.scorer.reasons.items())
        raise RewardError(f"reward '{tree.scorer.reward.name}' scored none of {tree.scorer.excluded} samples: {why}.")
    results = []
    for root, prompt in enumerate(prompts):
        leaves = _leaves(tree, config, root)
        first = _first_base(tree, root)
        results.append(
            PromptResult(
                prompt,
                None if leaves is None else leaves.x,
                [] if leaves is None else leaves.rewards.tolist(),
                None if first is None else first.x,
                None if first is None else float(first.rewards[0]),
                int(tree.counts["nfe"][root]),
                seconds,
                summarise(tree, root, None if leaves is None else int(leaves.nodes[0])),
            )
        )
    return results


def _leaves(tree: DiffusionTree, config: SearchConfig, root: int) -> Leaves | None:
    """Samples of a root, best first; None where none is valid."""
    count = min(config.count, len(tree.leaf_law(root)[0])) if tree.counts["valid"][root] else 0
    if not count:
        return None
    if config.sampler == "dts-star":
        return tree.best(count, root=root)
    drawn = tree.draw(count, root=root, rule="robust", replace=False)
    order = drawn.rewards.argsort(descending=True, stable=True)
    return type(drawn)(*(part[order.to(part.device)] for part in drawn))


def _first_base(tree: DiffusionTree, root: int) -> Leaves | None:
    """The first rollout that is a plain sample of the model and could be scored."""
    leaf = tree.rollouts["leaf"].astype(np.int64)
    mine = (tree.rollouts["start"] == 0) & tree.nodes["ready"][leaf]
    mine &= tree.nodes.root_of(leaf) == root
    found = leaf[mine][:1]
    return tree.gather(found) if len(found) else None
