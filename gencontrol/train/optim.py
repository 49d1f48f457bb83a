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

from gencontrol.algorithms.base import Algorithm, HasParameterGroups, ParameterGroup
from gencontrol.errors import CheckpointError, UsageError
from gencontrol.train.config import TrainConfig


def learning_rate(
    config: TrainConfig, position: float, peak: float | None = None, schedule: str | None = None
) -> float:
    """Learning rate at `position` = step index + update / updates of that step, in [0, steps).

    Args:
        config: of the run; its warmup and steps always hold.
        peak, schedule: in the place of its `lr` and `lr_schedule`.
    """
    peak, schedule = peak or config.lr, schedule or config.lr_schedule
    rise = min(1.0, (position + 1) / config.warmup) if config.warmup else 1.0
    if schedule == "constant" or position < config.warmup:
        return peak * rise
    progress = min(1.0, (position - config.warmup) / max(1, config.steps - config.warmup))
    fall = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * fall


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


def make_optimizers(algorithm: Algorithm, config: TrainConfig) -> dict[str, Optimizer]:
    """Return the optimizer of each parameter group, in the order of their turns; one called "" without groups.

    Raises:
        UsageError: no groups, a parameter in none or in two of them, or what `name_parameters` refuses.
    """
    roles = algorithm.roles
    if not isinstance(algorithm, HasParameterGroups):
        return {"": Optimizer(name_parameters(roles.module, roles.trainable()), config)}
    groups = dict(sorted(algorithm.parameter_groups().items(), key=lambda item: item[1].turn))
    named = name_parameters(roles.module, [p for group in groups.values() for p in group.parameters])
    names = {id(parameter): name for name, parameter in named.items()}
    every = dict(roles.module.named_parameters())
    left = [name for name, p in every.items() if id(p) not in names and any(p is q for q in roles.trainable())]
    empty = [name for name, group in groups.items() if not group.parameters]
    if left or empty:
        raise UsageError(
            f"parameter_groups(): parameters in no group {left[:5]}, groups without a parameter {empty}; put each "
            "trainable parameter into one group, or switch its gradient off before the roles are made."
        )
    return {
        name: Optimizer({names[id(p)]: p for p in group.parameters}, config, group) for name, group in groups.items()
    }


def strip_prefix(name: str) -> str:
    """Remove what torch.compile and DDP put into parameter names."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


class Optimizer:
    """AdamW over the named parameters of one group, with weight decay on those of two or more axes only.

    Args:
        named: parameters by their names in the checkpoint.
        config: of the run.
        group: the settings that differ from the run's; its `parameters` are not looked at.
    """

    def __init__(
        self, named: Mapping[str, nn.Parameter], config: TrainConfig, group: ParameterGroup | None = None
    ) -> None:
        self.named, self.config, self.group = dict(named), config, group or ParameterGroup(())
        mine = self.group
        self.max_grad_norm = config.max_grad_norm if mine.max_grad_norm is None else mine.max_grad_norm
        decays = config.weight_decay if mine.weight_decay is None else mine.weight_decay
        # one group of torch's for each decay (a second costs half a step of a small network), and for each kind of
        # tensor, because fused steps take no mixture of shards and whole ones
        groups: dict[Any, dict[str, Any]] = {}
        for p in named.values():
            decay = decays if p.ndim >= 2 else 0.0
            groups.setdefault((decay, type(p)), {"params": [], "weight_decay": decay})["params"].append(p)
        fused = all(p.device.type in ("cpu", "cuda") for p in named.values())
        self.adamw = torch.optim.AdamW(
            list(groups.values()), lr=mine.lr or config.lr, betas=mine.betas or config.betas, eps=mine.eps, fused=fused
        )

    def rate(self, position: float) -> float:
        """Learning rate of this group at a position of the run; see `learning_rate`."""
        return learning_rate(self.config, position, self.group.lr, self.group.lr_schedule)

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
        for parameter in self.named.values():
            parameter.grad = None

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
