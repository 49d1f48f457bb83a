"""`gencontrol bench crd`, part exact: CRD's exact mode against its default where the tilt p(x)·exp(r(x)/β)/Z is known.

A one-dimensional mixture of two Gaussians, r(x) = x, is fine-tuned by the class `Crd` with old and sampler frozen at
the base.  Two networks: "family", the exact velocity of a mixture with trainable means, spreads and weights, in which
the only denoiser of zero loss is the tilt's; and "free", the base's exact velocity plus a small MLP, in which the loss
has many minima and descent from the base finds one near the tilt (see `gencontrol.algorithms.forward.crd`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gencontrol.algorithms.forward.crd import Crd, CrdConfig
from gencontrol.bench.base import Check, Loop, run_in_memory, table
from gencontrol.bench.toys import toy_task
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.exact import GaussianMixture
from gencontrol.models.roles import Roles
from gencontrol.process import GaussianProcess, Linear
from gencontrol.rewards.base import checked
from gencontrol.rng import Keyed, row_keys, stream_seed
from gencontrol.sampling import sample
from gencontrol.stats import Estimate, student_t
from gencontrol.types import Cond, Prediction, RewardContext, RewardOut

MEANS, SPREADS, WEIGHTS = (-1.2, 1.0), (0.6, 0.5), (0.6, 0.4)
#: where densities are compared
_GRID = torch.linspace(-6.0, 6.0, 241, dtype=torch.float64)

#: options of the modes; all see the same number of rows
MODES: Mapping[str, Mapping[str, Any]] = {
    "default": {"weighting": "adaptive", "train_times": 8},
    "default, w = 1": {"weighting": "none", "train_times": 8},
    "bound's weight, single draws": {"weighting": "elbo", "train_times": 8},
    "bound's weight, mean of 8 draws": {"weighting": "elbo", "draws_per_sample": 8, "train_times": 1},
    "exact": {"weighting": "elbo", "draws_per_sample": 8, "unbiased": True, "train_times": 1},
}


def base_law() -> GaussianMixture:
    """The mixture that is tilted."""
    spread = torch.tensor(SPREADS).double().square().view(2, 1, 1)
    return GaussianMixture(torch.tensor(MEANS).view(2, 1), spread, torch.tensor(WEIGHTS), GaussianProcess(Linear()))


class FirstCoordinate:
    """Item reward r(x) = x."""

    name, differentiable = "first-coordinate", False
    kind: Literal["item", "set"] = "item"

    def __call__(self, samples: Tensor, context: RewardContext) -> RewardOut:
        """One value per sample."""
        return checked(self.name, samples[:, 0], len(samples))


class MixtureVelocity(nn.Module):
    """Exact velocity of a trainable mixture on the line as a rectified flow."""

    def __init__(self) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.tensor(MEANS).double())
        self.logs = nn.Parameter(torch.tensor(SPREADS).double().log())
        self.logits = nn.Parameter(torch.tensor(WEIGHTS).double().log())

    def forward(self, xt: Float[Tensor, "b 1"], t: Float[Tensor, " b"], cond: Cond = None) -> Float[Tensor, "b 1"]:
        """Predict E[ε − x0 | x_t]."""
        a, s, variance = 1 - t.double()[:, None], t.double()[:, None], (2 * self.logs).exp()
        total = a.square() * variance + s.square()
        gap = xt.double() - a * self.means
        share = torch.softmax(self.logits - 0.5 * gap.square() / total - 0.5 * total.log(), 1)
        velocity = s / total * gap - self.means - a * variance / total * gap
        return (share * velocity).sum(1, keepdim=True)


class FreeVelocity(nn.Module):
    """The base's exact velocity plus an MLP that starts at zero."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.base = MixtureVelocity().requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "crd-exact/init"))
            last = nn.Linear(64, 1)
            self.body = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), last).double()
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, xt: Float[Tensor, "b 1"], t: Float[Tensor, " b"], cond: Cond = None) -> Float[Tensor, "b 1"]:
        """Predict the velocity."""
        time = t.double()[:, None]
        features = torch.cat([xt.double(), time, time.square()], 1)
        return self.base(xt, t) + self.body(features)


def log_masses(density: Callable[[Tensor], Tensor]) -> Float[Tensor, " n"]:
    """Log-probabilities of the cells between the grid's points, by the midpoint rule."""
    middle = (_GRID[1:] + _GRID[:-1]) / 2
    return torch.log_softmax(density(middle[:, None]), 0)


def tilt_gap(network: nn.Module, exact: Float[Tensor, " n"], draws: int, seed: int) -> float:
    """KL(exact tilt ‖ law of the network) in nats: by quadrature for the family, by a histogram of ODE samples else."""
    if isinstance(network, MixtureVelocity):
        spread = (2 * network.logs.detach()).exp().view(2, 1, 1)
        law = GaussianMixture(
            network.means.detach().view(2, 1), spread, network.logits.detach().softmax(0), GaussianProcess(Linear())
        )
        found = log_masses(law.log_prob)
        return float((exact.exp() * (exact - found)).sum())
    denoiser = Denoiser(network, GaussianProcess(Linear()), Prediction.VELOCITY)
    keys = row_keys(seed, "crd-exact/eval", torch.arange(draws))
    with torch.no_grad():
        x = sample(denoiser, (draws, 1), steps=40, step="heun", generator=Keyed(keys))
    cells = _GRID[::6]  # 40 cells of 0.3
    count = torch.histogram(x.double().flatten().clamp(-5.99, 5.99), cells).hist + 0.5
    coarse = exact.exp().view(-1, 6).sum(1)
    return float((coarse * (coarse.log() - (count / count.sum()).log())).sum())


@dataclass(frozen=True)
class Effort:
    """How long each run trains: rounds of `samples` samples, rate, and draws of the free network's histogram."""

    rounds: int = 150
    samples: int = 256
    lr: float = 1e-2
    draws: int = 20_000


def run_mode(network: nn.Module, options: Mapping[str, Any], beta: float, effort: Effort, seed: int) -> nn.Module:
    """Fine-tune a network towards exp(x/β); returns it with the mean of the last half's weights."""
    task = toy_task(Denoiser(network, GaussianProcess(Linear()), Prediction.VELOCITY), 1)
    config = CrdConfig(
        beta=beta,
        target="reward",
        prompts_per_round=1,
        generations=effort.samples,
        updates_per_round=1,
        demo_steps=20,
        kl_coef=0.0,
        ema_decay=0.0,
        time_range=0.999,
        old_decay="offline",
        sampling_decay="offline",
        **options,
    )
    crd = Crd(task, FirstCoordinate(), config, roles=Roles(network, Crd.role_names(config)), seed=seed)
    mean = [torch.zeros_like(p) for p in crd.roles.trainable()]
    half = effort.rounds // 2

    def gather(step: int) -> None:
        if step >= half:
            torch._foreach_add_(mean, [p.detach() / (effort.rounds - half) for p in crd.roles.trainable()])

    run_in_memory(crd, effort.rounds, Loop(effort.lr, micro_batch=1 << 20), seed=seed, on_step=gather)
    with torch.no_grad():
        torch._foreach_copy_([p.data for p in crd.roles.trainable()], mean)
    return network


def run(*, beta: float, seeds: Sequence[int], effort: Effort, say: Callable[[str], None]) -> dict[str, Any]:
    """Compare all modes on both networks; returns table, checks, numbers."""
    exact = log_masses(base_law().tilt(linear=torch.tensor([1.0 / beta])).log_prob)
    gaps: dict[str, dict[str, list[float]]] = {}
    for kind in ("family", "free"):
        for label, options in {"base": None, **MODES}.items():
            for seed in seeds:
                network: nn.Module = MixtureVelocity() if kind == "family" else FreeVelocity(seed)
                if options is not None:
                    run_mode(network, options, beta, effort, seed)
                gap = tilt_gap(network, exact, effort.draws, seed)
                gaps.setdefault(label, {}).setdefault(kind, []).append(gap)
            say(f"exact, {kind}, {label}: KL {gaps[label][kind]}")
    rows: list[list[Estimate | float | str]] = [
        [label, student_t(by["family"]), student_t(by["free"])] for label, by in gaps.items()
    ]
    title = f"KL(exact tilt ‖ model) in nats, β = {beta:g}; floor of the last column about {20 / effort.draws:.1g}"
    checks = []
    for kind in ("family", "free"):
        mine, default = (sum(gaps[k][kind]) / len(seeds) for k in ("exact", "default"))
        claim = f"{kind}: the exact mode's KL to the tilt is at most a tenth of the default's"
        checks.append(Check(claim, f"{mine:.4f} against {default:.4f}", mine <= 0.1 * default and math.isfinite(mine)))
    return {"table": table(title, ["mode", "family", "free network"], rows), "checks": checks, "curves": {}, "kl": gaps}
