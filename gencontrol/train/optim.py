"""Optimizer, learning rate and loss scale; all of them are plain state that a checkpoint holds exactly.

The learning rate is a pure function of the position in the run, so there is no scheduler object that could advance
too fast or be forgotten.  AdamW: Loshchilov and Hutter 2019 (arXiv 1711.05101).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gencontrol.errors import CheckpointError, UsageError
from gencontrol.train.config import TrainConfig


def learning_rate(config: TrainConfig, position: float) -> float:
    """Learning rate at `position` = step index + update / updates of that step, in [0, steps)."""
    rise = min(1.0, (position + 1) / config.warmup) if config.warmup else 1.0
    if config.lr_schedule == "constant" or position < config.warmup:
        return config.lr * rise
    progress = min(1.0, (position - config.warmup) / max(1, config.steps - config.warmup))
    fall = 1 - progress if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * fall


def name_parameters(module: nn.Module, parameters: Sequence[nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return the trainable parameters under their names in `module`; those outside it are called extra.0, extra.1…

    Raises:
        UsageError: none is trainable, one occurs twice, or one is in half precision.
    """
    known = {id(parameter): strip_prefix(name) for name, parameter in module.named_parameters()}
    named: dict[str, nn.Parameter] = {}
    for parameter in parameters:
        name = known.get(id(parameter), f"extra.{len(named)}")
        if name in named:
            raise UsageError(f"parameter '{name}' is listed twice as trainable; list it once.")
        if parameter.dtype not in (torch.float32, torch.float64):
            raise UsageError(
                f"trainable parameter '{name}' is {parameter.dtype}; keep trainable weights in float32 and choose "
                "precision = bf16 or fp16 for the networks instead."
            )
        named[name] = parameter
    if not named:
        raise UsageError("the algorithm has no trainable parameter; check its roles or its LoRA targets.")
    return named


def strip_prefix(name: str) -> str:
    """Remove what torch.compile and DDP put into parameter names."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


class Optimizer:
    """AdamW over named parameters, with weight decay on those of two or more axes only."""

    def __init__(self, named: Mapping[str, nn.Parameter], config: TrainConfig) -> None:
        self.named = dict(named)
        groups = [
            {"params": [p for p in named.values() if (p.ndim >= 2) is wide and type(p) is kind], "weight_decay": decay}
            for wide, decay in ((True, config.weight_decay), (False, 0.0))
            for kind in dict.fromkeys(
                type(p) for p in named.values()
            )  # fused steps take no mixture of shards and whole
        ]
        groups = [group for group in groups if group["params"]]
        fused = all(p.device.type in ("cpu", "cuda") for p in named.values())
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=1e-8, fused=fused)

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, in the order of their names' first appearance."""
        return list(self.named.values())

    def step(self, lr: float) -> None:
        """Take one step with the gradients that the parameters hold."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Moments and step counts: {parameter: {"step" [], "exp_avg", "exp_avg_sq" shaped like it}}."""
        return {name: dict(self.adamw.state[p]) for name, p in self.named.items() if p in self.adamw.state}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore `state_dict()`.

        Raises:
            CheckpointError: names or shapes differ from this model's.
        """
        unknown = sorted(set(state) - set(self.named))
        missing = sorted(set(self.named) - set(state)) if state else []
        if unknown or missing:
            raise CheckpointError(
                f"the optimizer state does not fit this model: missing {missing[:5]}, unexpected {unknown[:5]}; "
                "resume with the model (and LoRA settings) that the run began with."
            )
        for name, entries in state.items():
            parameter = self.named[name]
            for key, value in entries.items():
                if key != "step" and value.shape != parameter.shape:
                    raise CheckpointError(
                        f"optimizer state '{name}.{key}' has shape {tuple(value.shape)}, the model has "
                        f"{tuple(parameter.shape)}; resume with the model that the run began with."
                    )
            # fused AdamW on CUDA keeps its step counts there; on the CPU both lie on the CPU
            self.adamw.state[parameter] = {k: v.detach().clone().to(parameter.device) for k, v in entries.items()}


@dataclass
class LossScale:
    """Dynamic loss scale of fp16 (Micikevicius et al. 2018, arXiv 1710.03740); a constant 1 otherwise."""

    enabled: bool = False
    scale: float = 1.0
    good: int = 0
    growth_interval: int = 2000

    @classmethod
    def start(cls, config: TrainConfig) -> LossScale:
        """The scale of a new run: 2^16 over the micro-batch, because losses are sums."""
        if config.precision != "fp16":
            return cls()
        return cls(enabled=True, scale=2.0 ** (16 - math.ceil(math.log2(config.micro_batch))))

    def update(self, *, overflow: bool) -> None:
        """Halve after an overflow, double after `growth_interval` good steps."""
        if not self.enabled:
            return
        if overflow:
            self.scale, self.good = max(self.scale / 2, 2.0**-14), 0
        else:
            self.good += 1
            if self.good >= self.growth_interval:
                self.scale, self.good = min(self.scale * 2, 2.0**24), 0

    def state_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"scale": self.scale, "good": self.good}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.scale, self.good = float(state["scale"]), int(state["good"])


def gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the gradients; a parameter without one is given zeros, so that all ranks hold the same list."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [p.grad for p in parameters if p.grad is not None]


def scale_gradients(grads: Sequence[Tensor], factor: float) -> None:
    """Multiply gradients in place."""
    torch._foreach_mul_(list(grads), factor)


def clip_gradients(grads: Sequence[Tensor], norm: float, max_norm: float) -> float:
    """Clip gradients of a 2-norm to another one (0 = do not) and return it; non-finite norms change nothing."""
    if max_norm > 0 and math.isfinite(norm) and norm > max_norm:
        scale_gradients(grads, max_norm / (norm + 1e-6))
    return norm
