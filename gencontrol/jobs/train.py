"""`train`: policies from demonstrations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gencontrol.config import BelowOne, Count, Natural, NonNegative, Positive, build, dump_toml, options
from gencontrol.errors import UsageError, nearest
from gencontrol.jobs.setup.environment import choose_device, prepare
from gencontrol.jobs.setup.runs import open_run, running
from gencontrol.jobs.setup.settings import Start, called, describe, place
from gencontrol.robotics.policies.config import ChunkSizes
from gencontrol.train.config import TrainConfig

if TYPE_CHECKING:
    from gencontrol.robotics.datasets.episodes import Episodes
    from gencontrol.robotics.policies.diffusion import GenerativePolicy


@options
class TrainRun:
    """The [run] section.

    Args:
        algorithm: diffusion-policy or flow-policy.
        dataset: file or folder of demonstrations.
        format: of the data set; empty finds it from the path.
        keys: observations that the policy reads; empty reads all.
        held_out: share of the episodes that only the evaluation sees.
        limit: at most so many episodes, the first ones; 0 takes all.
        output: the run folder (default: runs/ALGORITHM).
        dataset_hash: written by a run, so that other data are noticed; not meant to be set.
    """

    algorithm: str = "diffusion-policy"
    dataset: str = ""
    format: str = ""
    keys: tuple[str, ...] = ()
    held_out: BelowOne = 0.1
    limit: Natural = 0
    output: str = ""
    dataset_hash: str | None = None


@options
class TrainOptions(TrainConfig):
    """The [train] section: the training loop.

    Args:
        lr: peak learning rate (default: 3e-4, 1e-3 for the backbone mlp).
        warmup: steps of linear rise (default: 500, at most a tenth of the steps).
        micro_batch: largest number of windows in one pass (default: the batch).
        save_every: steps between checkpoints (default: 2000, at most a fifth of the steps).
        eval_every: steps between evaluations; 0 = never (default: a tenth of the steps).
    """

    steps: Count = 20000
    lr: Positive = 3e-4
    lr_schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup: Natural = 500
    weight_decay: NonNegative = 1e-6
    save_every: Count = 2000
    eval_every: Natural = 2000


@dataclass(frozen=True)
class TrainResult:
    """What a training made.

    Args:
        folder: the run folder, with metrics.jsonl, final/ and report.html.
        metrics: the last line of metrics.jsonl.
    """

    folder: Path
    metrics: Mapping[str, Any]

    @property
    def policy(self) -> GenerativePolicy:
        """The trained policy, loaded anew from final/ at each access."""
        from gencontrol.robotics.policies.loading import load_policy

        policy: GenerativePolicy = load_policy(self.folder)
        return policy


def train(
    dataset: str | Path | Episodes,
    *,
    algorithm: str = "diffusion-policy",
    output: str | Path | None = None,
    mode: Literal["auto", "resume", "fresh"] = "auto",
    allow_change: Sequence[str] = (),
    **options: Any,
) -> TrainResult:
    """Train a policy on demonstrations; the same call goes on where an earlier one was stopped.

    Args:
        dataset: file or folder of demonstrations, or Episodes.
        algorithm: diffusion-policy, flow-policy, or package.module:Class.
        output: the run folder; None: runs/ALGORITHM.
        mode: "auto" goes on in a used folder, "resume" insists on it, "fresh" refuses one.
        allow_change: options such as "train.lr" that may differ from those of the run folder.
        options: fields of TrainRun, TrainOptions, of the algorithm's Config, of ChunkSizes and of the policy's Config,
            e.g. steps=5000, backbone="mlp", horizon=8.

    Raises:
        UsageError, CheckpointError: what cannot work, and what to do; nothing is written.
        NumericsError, Preempted: as `Trainer.fit`.
    """
    table = place(options, {"run": TrainRun, "train": TrainOptions, **variants(algorithm)})
    table["run"] |= {"dataset": called(dataset), "algorithm": algorithm}
    table["run"] |= {} if output is None else {"output": str(output)}
    live = None if isinstance(dataset, (str, Path)) else dataset
    result = run(table, Start(mode=mode, allow=tuple(allow_change)), live)
    assert result is not None  # None is a dry run's
    return result


def variants(name: str | None) -> dict[str, tuple[type, ...]]:
    """Return the options of an algorithm and of the policy that it makes; None is the default's."""
    from gencontrol.registry import TRAIN, find, resolve_dotted

    algorithm = find(TRAIN, name or TrainRun.algorithm, "algorithm")
    policy = resolve_dotted(algorithm.policy_class, "policy")
    return {"algorithm": (algorithm.Config,), "policy": (ChunkSizes, policy.Config)}


def run(table: dict[str, dict[str, Any]], start: Start, live: Episodes | None = None) -> TrainResult | None:
    """Check the options (dry run: print them), read the data set, train, and write final/, its card and report.html.

    Args:
        live: demonstrations that were handed over as an object.

    Raises:
        UsageError: an option or the data set does not fit; nothing is written.
    """
    from gencontrol.registry import TRAIN, find, resolve_dotted

    table["run"].setdefault("output", f"runs/{table['run'].get('algorithm', TrainRun.algorithm)}")
    run = build(TrainRun, table["run"], "run")
    if live is None:
        _check_dataset(run.dataset)
    algorithm = find(TRAIN, run.algorithm, "algorithm")
    options = build(algorithm.Config, table["algorithm"], "algorithm")
    train = build(TrainOptions, {**_defaults(table, options.batch), **table["train"]}, "train")
    if train.shard:
        raise UsageError("train.shard is an option of gencontrol finetune; policies fit on one device.")
    prepare(threads=train.threads)
    kind = resolve_dotted(algorithm.policy_class, "policy")
    sizes, config = _policy(kind, table["policy"])
    plan, unhashed = _described(run, train, options, sizes, config), (*start.allow, "run.dataset_hash")
    checked = open_run(run.output, plan, mode=start.mode, allow=unhashed)  # before a large data set is read
    if start.dry_run:
        print(dump_toml(checked.table), end="")
        return None
    from gencontrol.robotics.datasets.convert import read_episodes
    from gencontrol.robotics.policies.cloning import fingerprint
    from gencontrol.robotics.policies.cloning import prepare as prepare_cloning

    episodes = live or read_episodes(
        run.dataset, format=run.format or None, keys=list(run.keys) or None, limit=run.limit or None
    )
    run = dataclasses.replace(run, dataset_hash=fingerprint(episodes))
    folder = open_run(run.output, _described(run, train, options, sizes, config), mode=start.mode, allow=start.allow)
    device = choose_device(train.device)
    made = prepare_cloning(
        kind, episodes, config, sizes, keys=run.keys, held_out=run.held_out, seed=train.seed, device=device
    )
    counts = {"train": len(made.train), "held_out": 0 if made.held_out is None else len(made.held_out)}
    facts = {"kind": "policy", "dataset": run.dataset, "env": dict(episodes.env), "windows": counts}
    facts["episodes"] = dict(zip(("train", "held_out"), made.episodes, strict=True))
    cloned = algorithm(made.policy, made.train, options, held_out=made.held_out, seed=train.seed)
    with running(folder, train, facts) as trainer:
        summary = trainer.fit(cloned)
    return TrainResult(folder.path, summary["metrics"])


def _check_dataset(path: str) -> None:
    make = "make one: gencontrol collect --env … --output"
    if not path:
        raise UsageError(f"--dataset is missing; name a data set ({make} data/demos).")
    if not Path(path).expanduser().exists():
        raise UsageError(f"there is no data set at '{path}'; check --dataset ({make} {path}).")


def _defaults(table: Mapping[str, Mapping[str, Any]], batch: int) -> dict[str, Any]:
    """Settings of [train] unless given: those of Diffusion Policy, with the perceptron's larger rate."""
    steps = table["train"].get("steps", 20000)
    if not isinstance(steps, int):
        return {}
    return {
        "steps": steps,
        "lr": 1e-3 if table["policy"].get("backbone") == "mlp" else 3e-4,
        "lr_schedule": "cosine",
        "warmup": min(500, steps // 10),
        "weight_decay": 1e-6,
        "micro_batch": batch,
        "save_every": max(1, min(2000, steps // 5)),
        "eval_every": max(1, steps // 10),
    }


def _policy(kind: Any, table: Mapping[str, Any]) -> tuple[Any, Any]:
    """Build the sizes of the chunk and the options of the policy from one section.

    Raises:
        UsageError: an option that neither has.
    """
    sizes, options = ([field.name for field in dataclasses.fields(part)] for part in (ChunkSizes, kind.Config))
    if unknown := [key for key in table if key not in sizes and key not in options]:
        known = sorted([*sizes, *options])
        raise UsageError(
            f"[policy] has no option '{unknown[0]}'.{nearest(unknown[0], known)} Options: {', '.join(known)}."
        )
    chunk = build(ChunkSizes, {key: value for key, value in table.items() if key in sizes}, "policy")
    return chunk, build(kind.Config, {key: value for key, value in table.items() if key in options}, "policy")


def _described(run: TrainRun, train: Any, options: Any, sizes: Any, config: Any) -> dict[str, dict[str, Any]]:
    plan = describe([("run", run), ("train", train), ("algorithm", options), ("policy", config)])
    return {**plan, "policy": {**describe([("policy", sizes)])["policy"], **plan["policy"]}}
