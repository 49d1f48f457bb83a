"""The pool: base paths drawn once, with everything of the frozen network that a control's training needs.

Under the base chain, reweighting whole paths by w_y ∝ p(y|x0)^γ gives the target's paths exactly.  The control
regresses on them: with unit_k = s'²/a' where step k lands,

    min over u of  E_{y, path ~ w_y, k} std_k²/2 · |u(x_k, x̂0_k, k, y) − r_k|²,    r_k = (x0 − x̂0_k)/unit_k − b(x_k, k).

Its optimum (DERIVED): u = (E_target[x0|x_k] − E_base[x0|x_k])/unit_k, the target's denoiser minus the base chain's own,
when b = E_base[(x0 − x̂0_k)/unit_k | x_k] is what the finite chain itself leaves between its samples and its predictions
(zero for an exact denoiser with infinitely many steps).  Nothing moves for a flat classifier.  The optimum is the best
control up to terms of the order of one step.  No gradient of the reward, no call of the backbone, no path is simulated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gencontrol.algorithms.ctrl.chain import ControlChain
from gencontrol.algorithms.online.rollout import chunks
from gencontrol.models.conditions.base import Conditioned
from gencontrol.models.conditions.control import control_net
from gencontrol.process.schedule import column
from gencontrol.rng import Keyed, row_keys, stream_seed
from gencontrol.types import Cond

#: every _HELD-th path is kept from training: the signal to stop
HELD = 8


@dataclass(frozen=True)
class Rows:
    """A batch of the pool: states, the base's predictions, what they became, and the step of each."""

    x: Float[Tensor, "b *d"]
    hat: Float[Tensor, "b *d"]
    x0: Float[Tensor, "b *d"]
    step: Int64[Tensor, " b"]


@dataclass
class PathPool:
    """Base paths of one chain.

    Args:
        x0: last states [n *d].
        states, hats: x_k and x̂0_k of the stochastic steps [K n *d], half precision.
        times, units, stds: of these steps [K].
        prompts: number of prompts, which take turns.
    """

    x0: Float[Tensor, "n *d"]
    states: Float[Tensor, "k n *d"]
    hats: Float[Tensor, "k n *d"]
    times: Float[Tensor, " k"]
    units: Float[Tensor, " k"]
    stds: Float[Tensor, " k"]
    prompts: int
    base_part: nn.Module | None = None
    _embed: int = 0

    @classmethod
    @torch.no_grad()
    def draw(
        cls,
        chain: ControlChain,
        shape: Sequence[int],
        count: int,
        cond: Callable[[Sequence[int]], Cond],
        *,
        prompts: int,
        seed: int,
        micro: int,
        device: torch.device,
        unit: Callable[[Tensor], Tensor],
        name: str = "ctrl/pool",
    ) -> PathPool:
        """Draw `count` paths of the base.

        Args:
            cond: base condition of path numbers.
            unit: move of x0 per unit of push at times [k].
        """
        steps = chain.steps - 1
        states = torch.empty((steps, count, *shape), dtype=torch.float16)
        hats = torch.empty_like(states)
        ends = []
        for part in chunks(count, micro):
            items = torch.arange(part.start, part.stop)
            keys, given = row_keys(seed, name, items), cond(items.tolist())
            x = chain.start(shape, keys, device)
            for index in range(chain.steps):
                chain.poll()
                w0, w1, std = chain.weights(index, x)
                with chain.autocast():
                    old = chain.model.both(x, chain.grid[index], given)[1]
                if std == 0.0:
                    x = old.x0
                    break
                states[index, part], hats[index, part] = x.half().cpu(), old.x0.half().cpu()
                x = old.mix(w0, w1) + std * chain.noise(x, keys, index)
            ends.append(x.float().cpu())
        times = torch.tensor(chain.grid[:steps], dtype=torch.float32)
        stds = torch.tensor([chain.weights(index, x)[2] for index in range(steps)])
        return cls(torch.cat(ends), states, hats, times, unit(times).cpu(), stds, prompts)

    def __len__(self) -> int:
        return len(self.x0)

    @property
    def steps(self) -> int:
        """Number of stochastic steps."""
        return len(self.times)

    def scale(self) -> list[float]:
        """Root mean square of (x0 − x̂0_k)/unit_k: the size of the push of every step."""
        return [
            float((self.x0 - self.hats[k].float()).square().mean().sqrt() / self.units[k]) for k in range(self.steps)
        ]

    def rows(self, paths: Int64[Tensor, " b"], steps: Int64[Tensor, " b"], device: torch.device) -> Rows:
        """Take rows of the pool."""
        picked = (self.states[steps, paths], self.hats[steps, paths], self.x0[paths])
        x, hat, x0 = (value.to(device, torch.float32) for value in picked)
        return Rows(x, hat, x0, steps.to(device))

    def target(self, rows: Rows, scale: Float[Tensor, " k"]) -> Float[Tensor, "b *d"]:
        """Return r of every row; `scale` is that of the control's output."""
        step = rows.step
        found = (rows.x0 - rows.hat) / column(self.units.to(rows.x)[step], rows.x)
        if self.base_part is None:
            return found
        with torch.no_grad():
            return found - column(scale.to(rows.x)[step], rows.x) * self._part(self.base_part, rows)

    def price(self, error: Float[Tensor, "b *d"], step: Int64[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Return K·std_k²/2·|error|²: one uniform step's share of the sum over steps."""
        return 0.5 * self.steps * self.stds.to(error)[step].square() * error.square().flatten(1).sum(1)

    def _part(self, network: nn.Module, rows: Rows) -> Tensor:
        none = rows.x.new_zeros(len(rows.x), self._embed)
        found: Tensor = network(rows.x, rows.hat, self.times.to(rows.x)[rows.step], none)
        return found

    def fit_base_part(
        self, network: Conditioned, scale: Float[Tensor, " k"], *, updates: int, batch: int, seed: int, lr: float = 2e-3
    ) -> None:
        """Fit b, a control without labels of the same size, to all training paths alike."""
        config, device = network.config, next(iter(network.own_parameters().values())).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "ctrl/base part"))
            part = control_net(config.shape, config.embed, config.width, config.depth, half=config.half).to(device)
        self._embed = config.embed
        optimizer = torch.optim.AdamW(part.parameters(), lr=lr, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
        scale, even = scale.to(device), torch.full((len(self),), 1.0 / len(self), dtype=torch.float64)
        averaged = copy.deepcopy(part)
        for update in range(updates):
            paths, steps = self.drawn(even[:, None], torch.zeros(batch).long(), seed, f"ctrl/base part/{update}")
            rows = self.rows(paths, steps, device)
            wide = column(scale[rows.step], rows.x)
            loss = self.price(wide * self._part(part, rows) - self.target(rows, scale), rows.step).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(part.parameters(), 50.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for mean, value in zip(averaged.parameters(), part.parameters(), strict=True):
                    mean.lerp_(value, max(1 - 0.99, 1 / (update + 1)))
        self.base_part = averaged.requires_grad_(False)

    def drawn(
        self,
        weights: Float[Tensor, "n m"],
        rows: Int64[Tensor, " b"],
        seed: int,
        name: str,
        items: Tensor | None = None,
    ) -> tuple[Int64[Tensor, " b"], Int64[Tensor, " b"]]:
        """Draw a training path of each label row by its weights, and a step uniformly; a pure function of the items."""
        items = torch.arange(len(rows)) if items is None else items
        uniform = Keyed(row_keys(seed, name, items)).uniform((len(items), 2))
        paths = torch.empty(len(rows), dtype=torch.long)
        for row in rows.unique().tolist():
            kept = weights[:, row].clone()
            kept[HELD - 1 :: HELD] = 0.0
            cumulative = kept.cumsum(0)
            mine = rows == row
            paths[mine] = torch.searchsorted(cumulative, uniform[mine, 0] * cumulative[-1], right=True)
        steps = (uniform[:, 1] * self.steps).long().clamp(max=self.steps - 1)
        return paths.clamp(max=len(self) - 1), steps

    @torch.no_grad()
    def reached(
        self,
        weights: Float[Tensor, "n m"],
        labels: Int64[Tensor, "m a"],
        push: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        scale: Float[Tensor, " k"],
        *,
        count: int,
        seed: int,
        device: torch.device,
    ) -> float:
        """Estimate the mean over labels of Σ std²/2·(2u·r − u²) on held-out paths of the target: how much of
        KL(target‖base) the control has learned.
        """
        held = torch.arange(HELD - 1, len(self), HELD)
        uniform = Keyed(row_keys(seed, "ctrl/reached", torch.arange(count))).uniform((count, 3))
        row = (uniform[:, 0] * len(labels)).long()
        cumulative = weights[held].T.cumsum(1)[row]
        place = torch.searchsorted(cumulative, (uniform[:, 1] * cumulative[:, -1])[:, None], right=True)[:, 0]
        steps = (uniform[:, 2] * self.steps).long()
        rows = self.rows(held[place.clamp(max=len(held) - 1)], steps, device)
        u = push(rows.x, rows.hat, self.times.to(device)[rows.step], labels[row].to(device))
        r = self.target(rows, scale)
        return float((self.price(r, rows.step) - self.price(u - r, rows.step)).mean())
