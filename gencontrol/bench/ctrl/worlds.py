"""Small worlds in which CTRL's optimum is known: a 2-D mixture with two classes, and a linear-Gaussian chain.

docs/methods/ctrl.md#e-ctrl-1: modes (−2, 0), (2, 0), (0, 2), weights .6, .3, .1, deviation .5, exact denoiser.
The page measured a diffusion whose first state keeps a little memory; here it is the rectified flow, which has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gencontrol.algorithms.ctrl.ctrl import Ctrl, CtrlConfig
from gencontrol.bench.toys import toy_task
from gencontrol.models.conditions.base import add_condition
from gencontrol.models.conditions.labels import split_prompt
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.exact import GaussianMixture
from gencontrol.models.roles import Roles
from gencontrol.process import GaussianProcess, Linear
from gencontrol.rewards.base import checked
from gencontrol.types import Cond, Prediction, RewardContext, RewardOut

MEANS = ((-2.0, 0.0), (2.0, 0.0), (0.0, 2.0))
WEIGHTS = (0.6, 0.3, 0.1)
STD = 0.5


class ExactNetwork(nn.Module):
    """A Gaussian mixture with equal isotropic components as a network: its V prediction, in the dtype of x."""

    means: Tensor
    log_weights: Tensor

    def __init__(self, means: Sequence[Sequence[float]], weights: Sequence[float], std: float) -> None:
        super().__init__()
        self.register_buffer("means", torch.tensor(means))
        self.register_buffer("log_weights", torch.tensor(weights).log())
        self.variance, self.process = std * std, GaussianProcess(Linear())

    def forward(self, x: Float[Tensor, "b d"], t: Float[Tensor, " b"], cond: Cond = None) -> Float[Tensor, "b d"]:
        """Return a·eps − s·x0 of the posterior; the same as `GaussianMixture`, without its float64."""
        coeffs = self.process.at(t, x)
        a, s = torch.as_tensor(coeffs.a), torch.as_tensor(coeffs.s)
        spread = a * a * self.variance + s * s
        gaps = x[:, None] - a[..., None] * self.means
        share = torch.softmax(self.log_weights - gaps.square().sum(-1) / (2 * spread), dim=1)
        gap = (share[..., None] * gaps).sum(1)
        mean = (share[..., None] * self.means).sum(1)
        x0 = mean + a * self.variance / spread * gap
        return a * (s / spread * gap) - s * x0


def mixture() -> GaussianMixture:
    """The base of docs/methods/ctrl.md#e-ctrl-1 in closed form."""
    return GaussianMixture(
        torch.tensor(MEANS), STD**2 * torch.eye(2).expand(3, 2, 2), torch.tensor(WEIGHTS), GaussianProcess(Linear())
    )


@dataclass(frozen=True)
class Linears:
    """Reward log p(label | x) of a softmax over x·W + b; the label "y" is in metadata or prompt."""

    weight: Float[Tensor, "d m"]
    bias: Float[Tensor, " m"]
    name: str = "linears"
    kind: Literal["item", "set"] = "item"
    differentiable: bool = True

    def log_probs(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b m"]:
        """log p of all labels."""
        return torch.log_softmax(x @ self.weight.to(x) + self.bias.to(x), dim=1)

    def __call__(self, samples: Tensor, context: RewardContext) -> RewardOut:
        """log p of each sample's label."""
        texts = context.metadata.get("y") or [split_prompt(prompt)[1]["y"] for prompt in context.prompts or ()]
        labels = torch.tensor([int(value) for value in texts])
        return checked(self.name, self.log_probs(samples).gather(1, labels[:, None])[:, 0], len(samples))


@dataclass(frozen=True)
class Slope:
    """Reward a·x for either label: the linear reward of docs/methods/ctrl.md#e-ctrl-3."""

    slope: float
    name: str = "slope"
    kind: Literal["item", "set"] = "item"
    differentiable: bool = True

    def __call__(self, samples: Tensor, context: RewardContext) -> RewardOut:
        """a·x."""
        return checked(self.name, self.slope * samples[:, 0], len(samples))


def two_classes() -> Linears:
    """The fixed classifier of docs/methods/ctrl.md#e-ctrl-1; class 0 asks for the left and below (ours: the page's is
    not kept).
    """
    return Linears(torch.tensor([[-1.0, 0.0], [-0.6, 0.0]]), torch.tensor([1.2, 0.0]))


def make_ctrl(
    reward: Any, network: nn.Module, size: int, *, seed: int, inject: Any = "residual", **options: Any
) -> Ctrl:
    """Return a Ctrl on vectors [size] with a two-valued condition."""
    base = Denoiser(network, GaussianProcess(Linear()), Prediction.V)
    denoiser = add_condition(base, shape=(size,), cardinality=2, seed=seed, inject=inject)
    config = CtrlConfig(**({"checkpointing": False} | options))
    names = Ctrl.role_names(config)
    return Ctrl(toy_task(denoiser, size), reward, config, roles=Roles(denoiser.network, names), seed=seed)
