"""What CTRL reports beside its loss: the bound log Z of each label, the running J, and the path-reweighting corrector.

J(y) = E[γ log p(y|x0) − Σ KL] ≤ log Z(y), Z(y) = E_base[p(y|x0)^γ]; for γ = 1 the Z of all labels sum to 1 (DERIVED,
docs/methods/ctrl.md#objective).  The gap says how far training is from its optimum, so it decides which labels are
drawn (P13) and when to stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gencontrol.algorithms.base import Collectives
from gencontrol.algorithms.ctrl.chain import ControlChain
from gencontrol.types import Cond

#: weight of the newest batch in the running J of a label
_NEWEST = 0.1


def log_mean_exp(values: Float[Tensor, "n m"]) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Return log mean exp over the rows, float64, and its standard error (delta method)."""
    wide = values.double()
    top = wide.max(0).values
    weights = torch.exp(wide - top)
    mean = weights.mean(0)
    error = weights.std(0) / (mean * math.sqrt(len(wide))) if len(wide) > 1 else torch.full_like(mean, math.nan)
    return top + mean.log(), error


@dataclass
class Ledger:
    """Running J and the bound of every label row.

    Args:
        rows: number of label rows.
        log_z, error: bound and its standard error [rows]; NaN until it was estimated.
        j, seen: running J [rows] and the number of updates that contributed to it.
        ess: effective share of the last update's paths under reweighting, in (0, 1].
    """

    rows: int
    log_z: Tensor = field(default_factory=lambda: torch.empty(0))
    error: Tensor = field(default_factory=lambda: torch.empty(0))
    j: Tensor = field(default_factory=lambda: torch.empty(0))
    seen: Tensor = field(default_factory=lambda: torch.empty(0))
    ess: float = math.nan
    _sums: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        self.log_z = torch.full((self.rows,), math.nan, dtype=torch.float64)
        self.error, self.j = self.log_z.clone(), self.log_z.clone()
        self.seen = torch.zeros(self.rows, dtype=torch.float64)
        self.clear()

    def clear(self) -> None:
        """Forget what `add` was given since the last `close`."""
        self._sums = torch.zeros(4, self.rows, dtype=torch.float64)

    def add(self, row: Int64[Tensor, " b"], reward: Tensor, kl: Tensor, log_ratio: Tensor) -> None:
        """Take in items: their label rows, scaled rewards γ·log p, path KL and log-ratio."""
        row = row.cpu()
        level = torch.nan_to_num(self.log_z, 0.0)[row]
        # weights relative to the bound are of order one, so that ranks can add them
        weight = torch.exp((reward - log_ratio).double().cpu() - level).clamp(max=1e12)
        columns = [torch.ones_like(weight), (reward - kl).double().cpu(), weight, weight.square()]
        for place, values in enumerate(columns):
            self._sums[place].index_add_(0, row, values)

    def close(self, group: Collectives) -> None:
        """Move the running J by what was added since, on all ranks together."""
        count, j, weight, square = torch.tensor(
            group.sum_numbers(self._sums.flatten().tolist()), dtype=torch.float64
        ).reshape(4, self.rows)
        here = count > 0
        if not bool(here.any()):
            self.clear()
            return
        new = j / count.clamp(min=1)
        # the first ones are averaged, later ones forgotten at a fixed rate
        rate = torch.maximum(1.0 / (self.seen + 1), torch.tensor(_NEWEST, dtype=torch.float64))
        moved = torch.where(self.seen > 0, torch.nan_to_num(self.j, 0.0) * (1 - rate) + rate * new, new)
        self.j = torch.where(here, moved, self.j)
        self.seen = self.seen + here.double()
        share = weight.square() / (square * count.clamp(min=1)).clamp(min=1e-300)
        self.ess = float(share[here].mean())
        self.clear()

    @property
    def gap(self) -> Float[Tensor, " m"]:
        """log Z − J of every row; NaN where one is not known."""
        return self.log_z - self.j

    def mean_gap(self) -> float:
        """Mean gap over all rows; NaN until every row was seen."""
        return float(self.gap.mean())

    def shares(self, oversample: float) -> Float[Tensor, " m"]:
        """Probability with which each row is drawn: uniform, and `oversample` of it in proportion to the gap."""
        uniform = torch.full((self.rows,), 1.0 / self.rows, dtype=torch.float64)
        gap = self.gap
        if bool(gap.isnan().any()) or float(gap.clamp(min=0).sum()) <= 0:
            return uniform
        gap = gap.clamp(min=0)
        return (1 - oversample) * uniform + oversample * gap / gap.sum()

    def metrics(self, names: list[str]) -> dict[str, float]:
        """Numbers to log; single rows only where they are few."""
        if bool(self.j.isnan().all()):
            return {}
        found = {"ctrl/gap": self.mean_gap(), "ctrl/bound": float(self.log_z.mean()), "ctrl/ess": self.ess}
        if self.rows <= 16:
            for name, j, bound in zip(names, self.j.tolist(), self.log_z.tolist(), strict=True):
                found |= {f"ctrl/j/{name}": j, f"ctrl/bound/{name}": bound}
        return {key: value for key, value in found.items() if math.isfinite(value)}

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {"log_z": self.log_z, "error": self.error, "j": self.j, "seen": self.seen, "ess": str(self.ess)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        for name in ("log_z", "error", "j", "seen"):
            setattr(self, name, torch.as_tensor(state[name], dtype=torch.float64).clone())
        self.ess = float(state["ess"])


@dataclass(frozen=True)
class Corrected:
    """Tuned samples x with exact weights for the target, their rewards and path KL.

    The weights have mean Z for any control (docs/methods/ctrl.md#law-7); at its optimum they are constant given x_T.
    """

    x: Float[Tensor, "n *d"]
    log_weights: Float[Tensor, " n"]
    rewards: Float[Tensor, " n"]
    kl: Float[Tensor, " n"]

    @property
    def log_z(self) -> float:
        """log of the mean weight."""
        return float(log_mean_exp(self.log_weights[:, None])[0])

    @property
    def ess(self) -> float:
        """Effective share of the samples, in (0, 1]."""
        shares = torch.softmax(self.log_weights.double(), 0)
        return float(1.0 / (shares.square().sum() * len(shares)))

    def resample(self, count: int, generator: torch.Generator) -> Float[Tensor, "m *d"]:
        """Draw with the weights: samples of the target, with repeats where the control is far from its optimum."""
        shares = torch.softmax(self.log_weights.double().cpu(), 0)
        rows = torch.multinomial(shares, count, replacement=True, generator=generator)
        return self.x[rows.to(self.x.device)]


@torch.no_grad()
def reweighted(
    chain: ControlChain,
    x: Float[Tensor, "n *d"],
    keys: Int64[Tensor, " n"],
    cond: Cond,
    gamma: float,
    reward: Callable[[Tensor], Float[Tensor, " n"]],
) -> Corrected:
    """Run the controlled chain and weigh its samples by exp(γ·reward − [log p_new − log p_base](path))."""
    path = chain.run(x, keys, cond)
    rewards = reward(path.x).double().cpu()
    return Corrected(path.x, gamma * rewards - path.log_ratio.double().cpu(), rewards, path.kl.double().cpu())
