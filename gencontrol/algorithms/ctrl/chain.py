"""The controlled chain of CTRL, differentiable, with its path KL and log-ratio; and its lean adjoint.

With mean_new, mean_old of a step and their difference d: KL = |d|²/(2 std²), log p_new − log p_old = d·z/std + KL for
the noise z that was used.  Their sums are exact for any control (docs/methods/ctrl.md#law-6 and
docs/methods/ctrl.md#law-7).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gencontrol.process.gaussian import GaussianProcess
from gencontrol.rng import Keyed, randn
from gencontrol.sampling.control.controlled import ControlGuided
from gencontrol.types import Cond


@dataclass(frozen=True)
class ControlledPath:
    """A batch of paths: last states, Σ KL [b] and Σ log p_new − log p_old [b] (detached), all states if kept."""

    x: Float[Tensor, "b *d"]
    kl: Float[Tensor, " b"]
    log_ratio: Float[Tensor, " b"]
    states: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class ControlChain:
    """Model, grid and noise level; see `gencontrol.sampling.control.controlled.ControlPlan`.

    Args:
        model: with `both`.
        grid: decreasing times.
        eta: noise level.
        frozen_gradient: whether gradients flow through the frozen network to x_t (P5).
        checkpointing: recompute each step in the backward pass.
        autocast: context of the network calls.
        poll: called before each step.
    """

    model: ControlGuided
    grid: Sequence[float]
    eta: float
    frozen_gradient: bool = True
    checkpointing: bool = False
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    poll: Callable[[], None] = lambda: None

    @property
    def steps(self) -> int:
        """Number of steps; the last one is deterministic."""
        return len(self.grid) - 1

    @property
    def process(self) -> GaussianProcess:
        """The model's noise law."""
        assert isinstance(self.model.process, GaussianProcess)
        return self.model.process

    def start(self, shape: Sequence[int], keys: Int64[Tensor, " b"], device: torch.device) -> Float[Tensor, "b *d"]:
        """Draw the first states, one per key."""
        return self.process.prior((len(keys), *shape), Keyed(keys), device)

    def noise(self, x: Float[Tensor, "b *d"], keys: Int64[Tensor, " b"], index: int) -> Float[Tensor, "b *d"]:
        """The noise of step `index`: a pure function of (key, index)."""
        return randn(x.shape, Keyed(keys, index + 1), x.device, x.dtype)

    def weights(self, index: int, like: Tensor) -> tuple[float, float, float]:
        """Return (w0, w1, std) of a step: mean = w0·x0 + w1·eps."""
        if self.grid[index + 1] == 0.0:
            return 1.0, 0.0, 0.0
        w0, w1, std = self.process.step_weights(self.grid[index], self.grid[index + 1], self.eta, like)
        return float(w0), float(w1), float(std)

    def means(
        self, x: Float[Tensor, "b *d"], index: int, cond: Cond
    ) -> tuple[Float[Tensor, "b *d"], Float[Tensor, "b *d"]]:
        """Return the controlled and the base mean of a step."""
        w0, w1, std = self.weights(index, x)
        with self.autocast():
            new, old = self.model.both(x, self.grid[index], cond, frozen_gradient=self.frozen_gradient)
        base = old.x0 if std == 0.0 else old.mix(w0, w1)
        if new is None:
            return base, base
        return (new.x0 if std == 0.0 else new.mix(w0, w1)), base

    def run(
        self,
        x: Float[Tensor, "b *d"],
        keys: Int64[Tensor, " b"],
        cond: Cond,
        *,
        gradient_from: int = 0,
        keep: bool = False,
    ) -> ControlledPath:
        """Run the chain from x at grid[0].

        Args:
            gradient_from: before this step states carry no gradient; the KL of those steps still does, through the
                control alone (P4: otherwise shared weights raise it unpunished).
            keep: keep all states, detached.
        """
        kl, log_ratio = x.new_zeros(len(x)), x.new_zeros(len(x))
        states = [x.detach()]
        for index in range(self.steps):
            self.poll()
            std = self.weights(index, x)[2]
            free = index < gradient_from
            x = x.detach() if free else x
            if self.checkpointing and torch.is_grad_enabled():
                new, old = checkpoint(self.means, x, index, cond, use_reentrant=False, preserve_rng_state=False)
            else:
                new, old = self.means(x, index, cond)
            if std == 0.0:
                x = new
            else:
                step_kl = GaussianProcess.path_kl(new, old, std)
                noise = self.noise(x, keys, index)
                push = ((new - old) / std).detach()
                log_ratio = log_ratio + (push * noise).flatten(1).sum(1) + step_kl.detach()
                kl = kl + step_kl
                x = new + std * noise
            if keep:
                states.append(x.detach())
        return ControlledPath(x, kl, log_ratio, tuple(states) if keep else ())

    def adjoints(
        self, states: Sequence[Float[Tensor, "b *d"]], cond: Cond, gradient: Float[Tensor, "b *d"]
    ) -> list[Float[Tensor, "b *d"]]:
        """Return the lean adjoint after each step, [ã_1 … ã_K], from ã_K = gradient of the scaled reward.

        ã_i = (∂ mean_old/∂x_i)ᵀ ã_{i+1}: the base chain alone (adjoint matching, Domingo-Enrich et al. 2024, lean
        adjoint).  DERIVED: for controls that move the mean, u_i = E[ã_{i+1} | x_i] is the optimum of the discrete
        chain too, since at the optimum the control's own term drops out (envelope theorem).
        """
        after = [gradient.detach()]
        for index in reversed(range(1, self.steps)):
            self.poll()
            with torch.enable_grad():
                leaf = states[index].detach().requires_grad_()
                mean = self.base_mean(leaf, index, cond)
                (pulled,) = torch.autograd.grad(mean, leaf, grad_outputs=after[-1].to(mean.dtype))
            after.append(pulled.detach())
        return after[::-1]

    def base_mean(self, x: Float[Tensor, "b *d"], index: int, cond: Cond) -> Float[Tensor, "b *d"]:
        """Return the base mean of a step."""
        w0, w1, std = self.weights(index, x)
        with self.autocast():
            old = self.model.both(x, self.grid[index], self.model.plain(cond))[1]
        return old.x0 if std == 0.0 else old.mix(w0, w1)

    def regression(
        self,
        states: Sequence[Float[Tensor, "b *d"]],
        adjoints: Sequence[Float[Tensor, "b *d"]],
        cond: Cond,
        steps: Sequence[int],
    ) -> Float[Tensor, " b"]:
        """Return Σ std²·|u − ã|²/2 [b] over the chosen stochastic steps, u = (mean_new − mean_old)/std²."""
        total = states[0].new_zeros(len(states[0]))
        for index in steps:
            self.poll()
            std = self.weights(index, states[0])[2]
            new, old = self.means(states[index], index, cond)
            total = total + GaussianProcess.path_kl(new, old.detach() + std * std * adjoints[index], std)
        return total
