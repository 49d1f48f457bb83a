"""`gencontrol train`: policies from demonstrations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gencontrol.config import build, dump_toml
from gencontrol.errors import UsageError, nearest
from gencontrol.jobs.setup.environment import choose_device, prepare
from gencontrol.jobs.setup.runs import fit, open_run
from gencontrol.jobs.setup.settings import describe, given_flags, merge, run_mode

SECTIONS = ("run", "train", "algorithm", "policy")

ROUTES = {
    **{name: f"run.{name}" for name in ("algorithm", "dataset", "keys", "output")},
    **{name: f"policy.{name}" for name in ("backbone", "horizon", "n_obs", "n_action")},
    "batch": "algorithm.batch",
    **{
        name: f"train.{name}"
        for name in (
            "steps lr lr_schedule warmup max_grad_norm micro_batch precision seed device threads save_every keep "
            "eval_every track"
        ).split()
    },
}


@dataclass(frozen=True)
class TrainRun:
    """The [run] section.

    Args:
        algorithm: diffusion-policy or flow-policy.
        dataset: file or folder of demonstrations.
        format: of the data set; empty finds it from the path.
        keys: observations that the policy reads; empty reads all.
        held_out: share of the episodes that only the evaluation sees.
        limit: at most so many episodes, the first ones; 0 takes all.
        output: the run folder.
        dataset_hash: written by a run, so that other data are noticed; not meant to be set.
    """

    algorithm: str = "diffusion-policy"
    dataset: str = ""
    format: str = ""
    keys: tuple[str, ...] = ()
    held_out: float = 0.1
    limit: int = 0
    output: str = ""
    dataset_hash: str | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.held_out < 1.0 or self.limit < 0:
            raise ValueError("held_out in [0, 1) and limit of at least 0 are needed")


def command(parameters: Mapping[str, Any]) -> None:
    """Train with the options as typer parsed them.

    Raises:
        UsageError: an option or the data set does not fit; nothing is written.
    """
    from gencontrol.registry import TRAIN, find, resolve_dotted
    from gencontrol.train.config import TrainConfig

    overrides = [*(parameters["overrides"] or []), *(parameters["set_"] or [])]
    table = merge(parameters["config"], given_flags(parameters, ROUTES), overrides, SECTIONS)
    table["run"].setdefault("output", f"runs/{table['run'].get('algorithm', TrainRun.algorithm)}")
    run = build(TrainRun, table["run"], "run")
    _check_dataset(run.dataset)
    algorithm = find(TRAIN, run.algorithm, "policy algorithm")
    options = build(algorithm.Config, table["algorithm"], "algorithm")
    train = build(TrainConfig, {**_defaults(table, options.batch), **table["train"]}, "train")
    if train.shard:
        raise UsageError("train.shard is an option of gencontrol finetune; policies fit on one device.")
    prepare(threads=train.threads)
    kind = resolve_dotted(algorithm.policy_class, "policy")
    sizes, config = _policy(kind, table["policy"])
    plan = _described(run, train, options, sizes, config)
    mode, allow = run_mode(parameters), parameters["allow_change"] or ()
    if parameters["dry_run"]:
        print(dump_toml(open_run(run.output, plan, mode=mode, allow=(*allow, "run.dataset_hash")).table), end="")
        return
    open_run(run.output, plan, mode=mode, allow=(*allow, "run.dataset_hash"))  # before a large data set is read
    from gencontrol.robotics.datasets.convert import read_episodes
    from gencontrol.robotics.policies.cloning import fingerprint
    from gencontrol.robotics.policies.cloning import prepare as prepare_cloning

    keys = list(run.keys) or None
    episodes = read_episodes(run.dataset, format=run.format or None, keys=keys, limit=run.limit or None)
    run = dataclasses.replace(run, dataset_hash=fingerprint(episodes))
    folder = open_run(run.output, _described(run, train, options, sizes, config), mode=mode, allow=allow)
    device = choose_device(train.device)
    made = prepare_cloning(
        kind, episodes, config, sizes, keys=run.keys, held_out=run.held_out, seed=train.seed, device=device
    )
    counts = {"train": len(made.train), "held_out": 0 if made.held_out is None else len(made.held_out)}
    facts = {"kind": "policy", "dataset": run.dataset, "env": dict(episodes.env), "windows": counts}
    facts["episodes"] = dict(zip(("train", "held_out"), made.episodes, strict=True))
    fit(folder, train, algorithm(made.policy, made.train, options, held_out=made.held_out, seed=train.seed), facts)


def _check_dataset(path: str) -> None:
    if not path:
        raise UsageError(
            "--dataset is missing; name a data set (make one: gencontrol collect --env … --output data/demos)."
        )
    if not Path(path).expanduser().exists():
        raise UsageError(
            f"there is no data set at '{path}'; check --dataset (make one: gencontrol collect --env … --output {path})."
        )


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
    from gencontrol.robotics.policies.config import ChunkSizes

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
