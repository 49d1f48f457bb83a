"""`gencontrol train` with its options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from gencontrol.cli.commands import (
    RUN,
    TRAINING,
    WHAT,
    AllowChange,
    Device,
    DryRun,
    EvalEvery,
    Fresh,
    Keep,
    Lr,
    LrSchedule,
    Many,
    MaxGradNorm,
    MicroBatch,
    Number,
    Output,
    Overrides,
    Precision,
    Resume,
    SaveEvery,
    Seed,
    Set,
    Steps,
    Text,
    Threads,
    Track,
    Warmup,
    _option,
)


def train(
    ctx: typer.Context,
    overrides: Overrides = None,
    algorithm: Annotated[
        Text, _option("--algorithm", "The method (default: diffusion-policy).", WHAT, "diffusion-policy|flow-policy")
    ] = None,
    dataset: Annotated[
        Text, _option("--dataset", "Demonstrations: LeRobot, robomimic, Minari, zarr.", WHAT, "FOLDER|FILE")
    ] = None,
    keys: Annotated[Many, _option("--key", "An observation to read; repeat for more (default: all).", WHAT)] = None,
    backbone: Annotated[Text, _option("--backbone", "The network.", WHAT, "unet|transformer|mlp")] = None,
    horizon: Annotated[Number, _option("--horizon", "Actions in a chunk.", WHAT)] = None,
    n_obs: Annotated[Number, _option("--n-obs", "Observations in the history.", WHAT)] = None,
    n_action: Annotated[Number, _option("--n-action", "Actions executed of a chunk.", WHAT)] = None,
    steps: Steps = None,
    lr: Lr = None,
    lr_schedule: LrSchedule = None,
    warmup: Warmup = None,
    max_grad_norm: MaxGradNorm = None,
    batch: Annotated[Number, _option("--batch", "Windows of one step.", TRAINING)] = None,
    micro_batch: MicroBatch = None,
    precision: Precision = None,
    seed: Seed = None,
    device: Device = None,
    threads: Threads = None,
    output: Output = None,
    save_every: SaveEvery = None,
    keep: Keep = None,
    eval_every: EvalEvery = None,
    track: Track = None,
    resume: Resume = None,
    fresh: Fresh = None,
    allow_change: AllowChange = None,
    config: Annotated[Text, _option("--config", "Sections run, train, algorithm and policy.", RUN, "FILE.toml")] = None,
    set_: Set = None,
    dry_run: DryRun = None,
) -> None:
    """Train a policy on demonstrations; the result, final/, is what `evaluate` takes.

    Example: gencontrol train --algorithm diffusion-policy --dataset data/fetch --output runs/fetch
    """
    from gencontrol.jobs.train import command

    command(ctx.params)


#: command name → (function, panel of the help)
TABLE: dict[str, tuple[Callable[..., Any], str]] = {"train": (train, "Robots")}
