"""Settings of a training run: one flat dataclass with ranges; needs no torch, so a dry run is quick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from gencontrol.config import Count, Natural, NonNegative, Positive, options
from gencontrol.errors import UsageError

#: Keys of [train] that may change between two starts of one run: they cannot alter what is learned.
HARMLESS = frozenset({"save_every", "keep", "eval_every", "log_every", "track", "threads", "device", "shard"})


@options
class TrainConfig:
    """Settings of the Trainer; "step" is a training step (collect and its updates), counted from 1 when finished.

    Args:
        steps: training steps in all, ≥ 1.
        seed: of all random streams, ≥ 0.
        lr: peak learning rate, > 0.
        lr_schedule: after the warmup stay constant, or go to 0 at `steps` linearly or by a half cosine.
        warmup: steps of linear rise from lr/warmup to lr, ≥ 0.
        weight_decay: decoupled, on parameters with two or more axes, ≥ 0.
        betas: of AdamW, each in [0, 1).
        max_grad_norm: gradients are clipped to this 2-norm; 0 measures without clipping.
        micro_batch: largest number of items in one forward and backward pass, ≥ 1.
        precision: of the networks' autocast; weights stay float32; fp16 uses a loss scaler; "auto" is bf16 where the
            device is fast in it, else fp32.
        save_every: steps between checkpoints, ≥ 1 (the last step is always saved).
        keep: newest checkpoints kept, ≥ 1.
        eval_every: steps between evaluations; 0 = never, else also before the first and after the last step.
        log_every: steps that a line of metrics.jsonl sums up, ≥ 1; the last step and evaluations always end one.
        track: second log beside metrics.jsonl.
        max_bad_steps: non-finite updates in a row before the run stops, ≥ 1.
        device: "auto" accepts where the algorithm's weights lie; "cpu" or "cuda" insist on it.
        threads: CPU threads of torch; 0 leaves torch's choice.
        compile: run the network through torch.compile.
        shard: split weights, gradients, Adam moments and role copies over the processes (FSDP2); needs two or more.
    """

    steps: Count = 1000
    seed: Natural = 0
    lr: Positive = 1e-4
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: Natural = 0
    weight_decay: NonNegative = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: NonNegative = 1.0
    micro_batch: Count = 32
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    save_every: Count = 100
    keep: Count = 2
    eval_every: Natural = 0
    log_every: Count = 1
    track: Literal["none", "tensorboard"] = "none"
    max_bad_steps: Count = 3
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Natural = 0
    compile: bool = False
    shard: bool = False

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {self.betas}; expected two numbers in [0, 1)")
        if self.shard and self.compile:
            raise ValueError(
                "shard = true with compile = true; choose one, shards are gathered outside of the compiler"
            )
        if self.warmup >= self.steps and self.warmup > 0 and self.lr_schedule != "constant":
            raise ValueError(f"warmup = {self.warmup} leaves nothing of steps = {self.steps}; expected warmup < steps")


def check_processes(config: TrainConfig, world_size: int) -> None:
    """Check options that depend on the number of processes.

    Raises:
        UsageError: `shard` with one process.
    """
    if config.shard and world_size == 1:
        raise UsageError(
            "train.shard = true splits the weights over processes, and there is one; start with torchrun "
            "--nproc-per-node 2 -m gencontrol … (or accelerate launch --multi_gpu, not --cpu), or leave shard out."
        )


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested table as {"section.key": value} with tuples as lists and None left out."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        elif value is not None:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return {"section.key": (old, new)} for every setting that differs; a missing one is shown as None."""
    before, after = flatten(old), flatten(new)
    keys = sorted(before.keys() | after.keys())
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def is_harmless(key: str, new: Mapping[str, Any]) -> bool:
    """Whether a changed setting cannot alter what is learned: logging keys, and `steps` where lr does not use it."""
    section, _, name = key.partition(".")
    if section != "train":
        return False
    return name in HARMLESS or (name == "steps" and new.get("train", {}).get("lr_schedule") == "constant")
