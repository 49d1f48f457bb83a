"""docs/methods/ctrl.md#e-ctrl-1 and docs/methods/ctrl.md#e-ctrl-3: CTRL where everything is known
(docs/methods/ctrl.md#experiments).

Rows of docs/methods/ctrl.md#e-ctrl-1: full backpropagation for γ = 1 and 3, through the last half of the steps, adjoint
matching, and the pool.  log Z and the true shares of the modes come from base samples of the same chain, reweighted.
J is measured on paths that training did not see.  The best control of the chain, by dynamic programming, says how much
of a gap is the chain's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.algorithms.base import StepContext
from gencontrol.algorithms.ctrl.ctrl import Ctrl
from gencontrol.bench.base import Check, Loop, kept, over_seeds, run_in_memory, table
from gencontrol.bench.ctrl.worlds import MEANS, STD, WEIGHTS, ExactNetwork, Slope, make_ctrl, two_classes
from gencontrol.process import GaussianProcess
from gencontrol.process.schedule import Schedule

#: row → options of Ctrl
VARIANTS: dict[str, dict[str, Any]] = {
    "full backprop": {"backprop": "full"},
    "full backprop, γ = 3": {"backprop": "full", "gamma": 3.0},
    "last half of the steps": {"backprop": "truncated"},
    "adjoint matching": {"backprop": "adjoint"},
    "pool": {"backprop": "pool", "oversample": 0.0},
}


def mode_shares(x: Float[Tensor, "n 2"], weights: Float[Tensor, " n"]) -> Float[Tensor, " 3"]:
    """Share of each mode among weighted samples, by the nearest mean."""
    nearest = torch.cdist(x.double(), torch.tensor(MEANS).double()).argmin(1)
    shares = torch.zeros(len(MEANS), dtype=torch.float64).index_add_(0, nearest, weights.double())
    return shares / shares.sum()


def judge(ctrl: Ctrl, samples: int, seed: int) -> dict[str, float]:
    """Measure J, gap, KL, mode TV, mean error and ESS of each label on fresh paths."""
    ctx = StepContext(seed=seed, step=0, micro_batch=samples)
    base, values = ctrl.base_rewards(samples, ctx, "bench/truth")
    found: dict[str, float] = {}
    for row in range(len(ctrl.rows)):
        paths = ctrl.correct("toy", row, samples, seed=seed)
        scaled = ctrl.config.gamma * values[:, row]
        truth = torch.softmax(scaled, 0)
        log_z = float(torch.logsumexp(scaled, 0)) - math.log(len(scaled))
        j = float((ctrl.config.gamma * paths.rewards - paths.kl).mean())
        even = torch.ones(len(paths.x))
        mean = (truth[:, None] * base.double()).sum(0)
        corrected = torch.softmax(paths.log_weights, 0)
        target = mode_shares(base, truth)
        found |= {
            f"log Z {row}": log_z,
            f"J {row}": j,
            f"gap {row}": log_z - j,
            f"KL {row}": float(paths.kl.mean()),
            f"TV {row}": 0.5 * float((mode_shares(paths.x, even) - target).abs().sum()),
            f"TV corrected {row}": 0.5 * float((mode_shares(paths.x, corrected) - target).abs().sum()),
            f"mean error {row}": float((paths.x.double().mean(0) - mean).norm()),
            f"ESS {row}": paths.ess,
        }
    return found


def _mixture_run(label: str, seed: int, iterations: int, batch: int, steps: int, samples: int) -> dict[str, Any]:
    """One training of a row: its measures before and after, and the running gap of every iteration."""
    options = VARIANTS[label]
    extra: dict[str, int] = {"backprop_steps": steps // 2} if options["backprop"] == "truncated" else {}
    if options["backprop"] == "pool":
        extra = {"pool": samples, "pool_batch": 2 * batch, "base_updates": 2 * iterations}
    ctrl = make_ctrl(
        two_classes(),
        ExactNetwork(MEANS, WEIGHTS, STD),
        2,
        seed=seed,
        steps=steps,
        prompts_per_round=batch,
        bound_samples=samples,
        probe=10 if options["backprop"] == "pool" else 0,
        **options,
        **extra,
    )
    init = judge(ctrl, samples, seed) if label == "full backprop" else {}
    records: list[dict[str, float]] = []
    for lr, share in ((3e-3, 0.5), (1e-3, 0.3), (3e-4, 0.2)):  # a stepped cosine
        records += run_in_memory(
            Later(ctrl, len(records)), max(1, round(share * iterations)), Loop(lr, samples), seed=seed
        )
    gaps = [r.get("ctrl/gap", math.nan) for r in records]
    return {"init": init, "row": judge(ctrl, samples, seed), "gaps": gaps}


def _best_run(gamma: float, seed: int, steps: int, samples: int) -> dict[str, float]:
    """What the best control of this chain reaches: the rest of the gap is no fault of the training."""
    from gencontrol.bench.ctrl.optimum import best_control

    reward = two_classes()
    network = ExactNetwork(MEANS, WEIGHTS, STD)
    ctrl = make_ctrl(reward, network, 2, seed=seed, steps=steps, prompts_per_round=2, bound_samples=2, gamma=gamma)
    base, values = ctrl.base_rewards(samples, StepContext(seed=seed, step=0, micro_batch=samples), "bench/truth")
    found: dict[str, float] = {}
    for row in range(len(ctrl.rows)):
        scaled = gamma * values[:, row]
        log_z = float(torch.logsumexp(scaled, 0)) - math.log(len(scaled))

        def log_prob(x: Tensor, row: int = row) -> Tensor:
            return gamma * reward.log_probs(x)[:, row]

        best = best_control(ctrl.chain(), log_prob, samples=samples, seed=seed)
        target = mode_shares(base, torch.softmax(scaled, 0))
        tv = 0.5 * float((mode_shares(best.x, torch.ones(len(best.x))) - target).abs().sum())
        rest = dict.fromkeys((f"{name} {row}" for name in ("KL", "TV corrected", "mean error", "ESS")), math.nan)
        found |= {f"log Z {row}": log_z, f"J {row}": best.j, f"gap {row}": log_z - best.j, f"TV {row}": tv, **rest}
    return found


def mixture_part(
    *,
    seeds: Sequence[int],
    iterations: int,
    batch: int,
    steps: int,
    samples: int,
    say: Callable[[str], None],
    keep: Path | None = None,
) -> dict[str, Any]:
    """docs/methods/ctrl.md#e-ctrl-1: all rows over all seeds; finished runs are kept in the folder `keep`."""
    rows: dict[str, list[dict[str, float]]] = {"init": []}
    curves: dict[str, dict[float, float]] = {}
    settings = {"iterations": iterations, "batch": batch, "steps": steps, "samples": samples}
    for label, options in VARIANTS.items():
        rows[label] = []
        for seed in seeds:
            given = {"label": label, "options": options, "seed": seed, **settings}
            run = kept(keep, f"mixture_{seed}", given, partial(_mixture_run, label, seed, **settings))
            rows[label].append(run["row"])
            rows["init"] += [run["init"]] if run["init"] else []
            if seed == seeds[0]:
                curves[label] = {i + 1.0: v for i, v in enumerate(run["gaps"]) if math.isfinite(v) and v > 0}
            say(f"mixture {label}, seed {seed}: gaps {rows[label][-1]['gap 0']:.3f} {rows[label][-1]['gap 1']:.3f}")
    for gamma in (1.0, 3.0):
        label = "best control of this chain" + (", γ = 3" if gamma == 3.0 else "")
        given = {"label": label, "seed": seeds[0], "steps": steps, "samples": samples}
        rows[label] = [kept(keep, "mixture_best", given, partial(_best_run, gamma, seeds[0], steps, samples))]
        say(f"mixture {label}: " + ", ".join(f"{k} {v:.3f}" for k, v in rows[label][0].items() if v == v))
    return {
        "rows": rows,
        "settings": settings,
        "checks": _mixture_checks(rows),
        "table": _mixture_table(rows, iterations, batch, steps),
        "curves": {"E-CTRL-1: running gap log Z − J": ("iteration", curves)},
    }


class Later:
    """An algorithm whose steps are counted on from `start`, so that stages of one run draw different noise."""

    def __init__(self, inner: Ctrl, start: int) -> None:
        self.inner, self.start, self.roles = inner, start, inner.roles

    def _at(self, ctx: StepContext) -> StepContext:
        return replace(ctx, step=ctx.step + self.start)

    def collect(self, ctx: StepContext) -> Any:
        """The inner call, later."""
        return self.inner.collect(self._at(ctx))

    def minibatches(self, data: Any, update: int, ctx: StepContext) -> Any:
        """The inner call, later."""
        return self.inner.minibatches(data, update, self._at(ctx))

    def loss(self, micro: Any, ctx: StepContext) -> Any:
        """The inner call, later."""
        return self.inner.loss(micro, self._at(ctx))

    def after_update(self, ctx: StepContext, update: int) -> None:
        """The inner call, later."""
        self.inner.after_update(self._at(ctx), update)

    def evaluate(self, ctx: StepContext) -> Any:
        """The inner call."""
        return self.inner.evaluate(ctx)

    def state_dict(self) -> dict[str, Any]:
        """The inner call."""
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inner call."""
        self.inner.load_state_dict(state)

    def save_final(self, folder: Any) -> None:
        """The inner call."""
        self.inner.save_final(folder)


def _mixture_table(rows: Mapping[str, Sequence[Mapping[str, float]]], iterations: int, batch: int, steps: int) -> str:
    body: list[list[Any]] = []
    for label, found in rows.items():
        e = over_seeds(found)
        for row in (0, 1):
            names = ("log Z", "J", "gap", "KL", "TV", "TV corrected", "mean error", "ESS")
            body.append([label, f"y = {row}", *(e[f"{name} {row}"] for name in names)])
    return table(
        f"E-CTRL-1. {iterations} iterations, batch {batch}, {steps} steps, {len(next(iter(rows.values())))} seeds "
        "(mean ± half the 95 % t interval)",
        ("row", "label", "log Z", "J", "gap", "path KL", "mode TV", "TV reweighted", "mean error", "ESS"),
        body,
    )


def _mixture_checks(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Check]:
    full = over_seeds(rows["full backprop"])
    gaps = sorted(full[f"gap {row}"].value for row in (0, 1))
    tv = max(full[f"TV {row}"].value for row in (0, 1))
    adjoint, cut = over_seeds(rows["adjoint matching"]), over_seeds(rows["last half of the steps"])
    best = over_seeds(rows["best control of this chain"])
    pool = over_seeds(rows["pool"])
    pool_gaps = sorted(pool[f"gap {row}"].value for row in (0, 1))
    reach = ", ".join(f"{best[f'TV {row}'].value:.3f}" for row in (0, 1))
    total = math.exp(full["log Z 0"].value) + math.exp(full["log Z 1"].value)
    adjoint_gaps = sorted(adjoint[f"gap {row}"].value for row in (0, 1))
    below = max(row[f"J {k}"] - row[f"log Z {k}"] for found in rows.values() for row in found for k in (0, 1))
    return [
        Check(
            "E-CTRL-1, γ = 1, full backprop: log Z − J ≤ 0.05 and ≤ 0.25",
            f"{gaps[0]:.3f}, {gaps[1]:.3f}",
            gaps[0] <= 0.05 and gaps[1] <= 0.25,
        ),
        Check(
            "E-CTRL-1, pool: mode TV ≤ 1.3 × the chain's best control, each label",
            ", ".join(f"{pool[f'TV {k}'].value:.3f}" for k in (0, 1)) + f" against {reach}",
            all(pool[f"TV {k}"].value <= 1.3 * best[f"TV {k}"].value for k in (0, 1)),
        ),
        Check(
            "E-CTRL-1, pool: log Z − J ≤ 0.05 and ≤ 0.25",
            ", ".join(f"{gap:.3f}" for gap in pool_gaps),
            pool_gaps[0] <= 0.05 and pool_gaps[1] <= 0.25,
        ),
        Check("E-CTRL-1: mode TV ≤ 0.03", f"{tv:.3f} (best control of this chain: {reach})", tv <= 0.03),
        Check("J ≤ log Z in every row and seed (+0.03 for the error of both estimates)", f"{below:.3f}", below <= 0.03),
        Check("γ = 1: Σ_y Z = 1", f"{total:.4f}", abs(total - 1) < 1e-2),
        Check(
            "adjoint matching reaches the same bounds",
            f"{adjoint_gaps[0]:.3f}, {adjoint_gaps[1]:.3f}",
            adjoint_gaps[0] <= 0.05 and adjoint_gaps[1] <= 0.25,
        ),
        Check(
            "backpropagation through the last half alone, with all of the KL (P4), leaves a larger gap",
            ", ".join(f"{cut[f'gap {k}'].value:.3f}" for k in (0, 1)),
            sum(cut[f"gap {k}"].value for k in (0, 1)) > sum(gaps),
        ),
    ]


# ---- E-CTRL-3 ------------------------------------------------------------------------------------------------------


def chain_law(schedule: Schedule, grid: Sequence[float], eta: float) -> float:
    """Variance of x0 under the chain over N(0, 1) data (each step uses the mean of x0, so that it is below 1)."""
    process = GaussianProcess(schedule)
    variance = schedule.at(grid[0]).s ** 2
    for t, t_next in zip(grid, grid[1:]):
        here = schedule.at(t)
        w0, w1, std = process.step_weights(t, t_next, eta, torch.zeros(1)) if t_next > 0 else (1.0, 0.0, 0.0)
        variance = (float(w0 * here.a + w1 * here.s) / here.scale2) ** 2 * variance + float(std) ** 2
    return variance


#: row of docs/methods/ctrl.md#e-ctrl-3 → options of Ctrl
LINEAR: dict[str, dict[str, Any]] = {
    "full backprop": {"backprop": "full"},
    "adjoint matching": {"backprop": "adjoint"},
    "eta = 0.5 (not exact)": {"backprop": "full", "eta": 0.5, "exact": False},
}


def _linear_run(label: str, seed: int, iterations: int, samples: int, slope: float) -> dict[str, float]:
    """One training of a row, measured against the closed forms."""
    ctrl = make_ctrl(
        Slope(slope),
        ExactNetwork([[0.0]], [1.0], 1.0),
        1,
        seed=seed,
        steps=10,
        prompts_per_round=128,
        bound_samples=16,
        **LINEAR[label],
    )
    run_in_memory(ctrl, iterations, Loop(5e-3, samples), seed=seed)
    found = ctrl.correct("toy", 0, samples, seed=seed + 1000)
    variance = chain_law(GaussianProcess(ctrl.chain().process.schedule).schedule, ctrl.plan.grid, ctrl.config.eta)
    reach = variance * (1 - ctrl.rho2)
    return {
        "rho2": ctrl.rho2,
        "shift": float(found.rewards.mean()) / slope,
        "shift expected": slope * reach,
        "J": float((found.rewards - found.kl).mean()),
        "J expected": slope**2 * reach / 2,
        "log Z": slope**2 * variance / 2,
    }


def linear_part(
    *,
    seeds: Sequence[int],
    iterations: int,
    samples: int,
    say: Callable[[str], None],
    keep: Path | None = None,
    slope: float = 1.3,
) -> dict[str, Any]:
    """docs/methods/ctrl.md#e-ctrl-3: reward a·x on N(0, 1) data, eta 1 and, biased on purpose, 0.5: shift and J against
    closed forms.
    """
    rows: dict[str, list[dict[str, float]]] = {}
    settings = {"iterations": iterations, "samples": samples, "slope": slope}
    for label, options in LINEAR.items():
        rows[label] = []
        for seed in seeds:
            given = {"label": label, "options": options, "seed": seed, **settings}
            rows[label].append(
                kept(keep, f"linear_{seed}", given, partial(_linear_run, label, seed, iterations, samples, slope))
            )
        say(f"linear {label}: " + ", ".join(f"{k} {v.value:.3f}" for k, v in over_seeds(rows[label]).items()))
    keys = ("rho2", "shift", "shift expected", "J", "J expected", "log Z")
    cells = {label: over_seeds(found) for label, found in rows.items()}
    checks = [
        Check(
            f"E-CTRL-3, {label}: J within 0.02 of a²·Var(x0)·(1 − rho²)/2",
            f"{e['J'].value:.4f} against {e['J expected'].value:.4f}",
            abs(e["J"].value - e["J expected"].value) <= 0.02,
        )
        for label, e in cells.items()
    ]
    return {
        "rows": rows,
        "checks": checks,
        "table": table(
            f"E-CTRL-3. {iterations} iterations, 10 steps, {len(seeds)} seeds",
            ("row", *keys),
            [[label, *(e[k] for k in keys)] for label, e in cells.items()],
        ),
        "curves": {},
    }
