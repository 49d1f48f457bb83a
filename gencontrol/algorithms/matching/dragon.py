"""DRAGON: fine-tuning towards rewards of samples, of a sample against a law, or of the whole law (arXiv 2504.15217).

A round draws two (or more) on-policy generations per prompt, splits them into a positive set D+ and a negative set D−
by their effect on the reward (`sets`), and takes a few optimizer steps on a contrast of denoising errors
(`preference`): Diffusion-KTO, Diffusion-DPO or regression on D+.  The reward needs no gradient.  What the paper's
text does not settle (exchange rule, refresh of the reference, hyperparameters) is ours and labelled so in
`DragonConfig`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gencontrol.algorithms.base import Collected, LossOut, StepContext
from gencontrol.algorithms.matching.preference import LOSSES, Errors, kto_baseline
from gencontrol.algorithms.matching.sets import Grouping, Rule, build_sets
from gencontrol.algorithms.online.base import OnPolicyConfig, Several, Tuning
from gencontrol.algorithms.online.rollout import predict, squared_error
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.config import Count, Natural, NonNegative, Positive, options
from gencontrol.errors import NumericsError
from gencontrol.models.roles import Roles
from gencontrol.process.gaussian import GaussianProcess
from gencontrol.rewards.base import Reward, SetReward
from gencontrol.rng import stream
from gencontrol.types import Cond, cat_cond, index_cond

#: Rounds in a row that the stop rule may end before their first update.
_HALTED_ROUNDS = 3
#: Below this share of the denoising error a spread of g is rounding and calibrates nothing.
_FLAT = 1e-6
#: Range of std(g)/ℓ_ref that the calibration of β believes; at its ends β·ℓ_ref is 1000 and 10.
_SPREAD = (1e-3, 1e-1)


@options
class DragonConfig(OnPolicyConfig):
    """Options of `Dragon`; "ours" marks what the paper's available text does not give (docs/methods/dragon.md#options).

    Of the shared ones 256 prompts, 8 updates, 20 demonstration steps, "euler" and the average are ours; 2 generations
    and 40 evaluation steps are the paper's, as is the idea of cheaper demonstrations.

    Args:
        pairs_per_update: pairs in one optimizer step; 0 = all of the round (ours).
        loss: "kto" unpaired, "dpo" paired (both in the paper), "positive" regression on D+ (ours, a peer).
        beta: sharpness of the contrast, > 0; "auto" makes beta·std(g) = 1 after the first optimizer step (ours).
        reference: model that the contrast compares with: the base ("frozen"), the policy at the start of each round
            ("per_round", ours), or the EMA at the start of each round ("ema", ours; needs ema_decay > 0).
        kl_coef: in units of beta (of 1 with loss "positive"), so that the pull to the base keeps its strength when beta
            is calibrated (0.02, ours).
        split: accept an exchange when R(D+) rises ("positive"), when R(D+) − R(D−) rises ("gap"), rank by leave-one-out
            "influence", or split at "random" (a control that must not train anything) (ours).
        sweeps: passes of exchanges over the pairs for set rewards (2, ours).
        grouping: for more than two generations, "best_worst" or top and bottom "halves" (ours).
        stop_ratio: end a round's updates when ℓ_θ(D+) > stop_ratio·ℓ_ref(D+), e.g. 1.05; 0 = never (0, ours).
    """

    generations: Several = 2
    pairs_per_update: Natural = 0
    loss: Literal["kto", "dpo", "positive"] = "kto"
    beta: Positive | Literal["auto"] = "auto"
    reference: Literal["frozen", "per_round", "ema"] = "per_round"
    kl_coef: NonNegative = 0.02
    split: Rule = "positive"
    sweeps: Count = 2
    grouping: Grouping = "best_worst"
    stop_ratio: NonNegative = 0.0

    def __post_init__(self) -> None:
        if self.grouping == "halves" and self.generations % 2:
            raise ValueError(f"generations = {self.generations}; expected an even number with grouping = 'halves'")
        if self.reference == "ema" and self.ema_decay == 0:
            raise ValueError("reference = 'ema' needs ema_decay > 0")
        if self.stop_ratio and self.stop_ratio <= 1:
            raise ValueError(f"stop_ratio = {self.stop_ratio}; expected 0 (never) or a ratio above 1, e.g. 1.05")


@dataclass(frozen=True)
class Round:
    """A round's pairs on this rank: latents, conditions, global pair numbers, and ℓ_ref [sides p] of each update."""

    positive: Float[Tensor, "p *d"]
    negative: Float[Tensor, "p *d"]
    cond: Cond
    pair: Int64[Tensor, " p"]
    total: int
    references: list[Float[Tensor, "s q"]]


@dataclass(frozen=True)
class Micro:
    """Pairs of one micro-batch with shared times and noise, and ℓ_ref; `baseline` None: Q is taken from the batch."""

    positive: Float[Tensor, "p *d"]
    negative: Float[Tensor, "p *d"]
    cond: Cond
    t: Float[Tensor, " p"]
    noise: Float[Tensor, "p *d"]
    reference: Float[Tensor, "s p"]
    beta: float = 1.0
    baseline: float | None = None


@dataclass(frozen=True)
class Spread:
    """Means over an optimizer batch of all ranks: g and its deviation, ℓ(D+) of policy and reference, ℓ_ref of all."""

    mean: float
    std: float
    positive: float
    ref_positive: float
    scale: float


class Dragon(Tuning):
    """The DRAGON algorithm; see the module docstring and `DragonConfig`."""

    Config = DragonConfig
    config: DragonConfig
    name = "dragon"
    title = "DRAGON, distributional rewards (Bai et al. 2025)"
    paper = "arXiv:2504.15217"
    summary = (
        "Samples are split into a better and a worse set by their effect on "
        "the reward, and a contrast of denoising errors tells them apart."
    )

    def __init__(
        self, task: PromptTask, reward: Reward | SetReward, config: DragonConfig, *, roles: Roles, seed: int
    ) -> None:
        """Set up; arguments and errors are those of `Tuning`."""
        super().__init__(task, reward, config, roles=roles, seed=seed)
        self.sides = 1 if config.loss == "positive" else 2
        self._beta: float | None = None if config.beta == "auto" else float(config.beta)
        self._halted = self._halted_rounds = 0

    # ---------------------------------------------------------------- data rule

    def collect(self, ctx: StepContext) -> Collected:
        """Draw groups with the policy, build D+ and D−, and take the reference's denoising errors of all updates."""
        cfg, step = self.config, ctx.step
        pool, metrics = self.draw(ctx)
        begun = time.perf_counter()
        sets = build_sets(
            self.reward,
            pool.scores,
            cfg.generations,
            rule=cfg.split,
            sweeps=cfg.sweeps,
            grouping=cfg.grouping,
            generator=stream(self.seed, "dragon/sets", step),
        )
        built = time.perf_counter()
        mine = pool.owned(sets.positive).nonzero().flatten()
        plus, minus = sets.positive[mine], sets.negative[mine]
        data = Round(pool.take(plus), pool.take(minus), pool.take_cond(plus), mine, len(sets.positive), [])
        updates = cfg.updates_per_round if data.total else 0
        role = {"frozen": "ref", "per_round": "policy", "ema": "ema"}[cfg.reference]
        with self.roles.use(role), torch.no_grad():
            for update in range(updates):
                parts = [self._predict(micro, ctx)[1] for micro in self._cut(data, update, ctx)]
                data.references.append(torch.cat(parts, 1) if parts else torch.zeros(self.sides, 0))
        metrics |= dict(sets.metrics) | {
            "policy/halted_updates": float(self._halted),
            "time/sets": built - begun,
            "time/reference": time.perf_counter() - built,
        }
        if "reward/model" in sets.metrics:
            metrics["reward/mean"] = sets.metrics["reward/model"]
        self._halted = 0
        return Collected(data, updates, metrics)

    def _members(self, data: Round, update: int, step: int) -> Int64[Tensor, " q"]:
        """Return which of this rank's pairs an update uses: a stretch of a permutation of the round's pairs."""
        size = self.config.pairs_per_update
        if not size or size >= data.total:
            return torch.arange(len(data.pair))
        order = torch.randperm(data.total, generator=stream(self.seed, "dragon/order", step))
        chosen = order[(update * size + torch.arange(size)) % data.total]
        return torch.isin(data.pair, chosen).nonzero().flatten()

    def _cut(self, data: Round, update: int, ctx: StepContext) -> Iterable[Micro]:
        """Yield an update's pairs, `ctx.micro_batch` samples at a time, with times and noise of their own per pair."""
        members, device = self._members(data, update, ctx.step), data.positive.device
        items, size = data.pair[members], max(1, ctx.micro_batch // self.sides)
        for part, t, noise in self.noised(items, data.total, data.positive, size, ctx, update):
            rows = members[part].to(device)
            known = len(data.references) > update
            reference = data.references[update][:, part] if known else torch.zeros(self.sides, 0, device=device)
            cond = index_cond(data.cond, rows)
            yield Micro(data.positive[rows], data.negative[rows], cond, t, noise, reference)

    # ---------------------------------------------------------------- loss

    def _stacked(self, micro: Micro) -> tuple[Tensor, Tensor, Tensor, Cond]:
        """Return (x0, t, noise, cond) of D+ and below it D− with the same times and noise; or of D+ alone."""
        if self.sides == 1:
            return micro.positive, micro.t, micro.noise, micro.cond
        x0 = torch.cat([micro.positive, micro.negative])
        return x0, torch.cat([micro.t, micro.t]), torch.cat([micro.noise, micro.noise]), cat_cond([micro.cond] * 2)

    def _predict(self, micro: Micro, ctx: StepContext) -> tuple[Float[Tensor, "b *d"], Float[Tensor, "s p"]]:
        """Return the active role's prediction and ℓ [sides p], D+ in row 0."""
        ctx.poll()
        with ctx.autocast():
            prediction, target = predict(self.task.denoiser, *self._stacked(micro))
        return prediction, squared_error(prediction, target).view(self.sides, -1)

    def minibatches(self, data: Round, update: int, ctx: StepContext) -> Iterable[Micro]:
        """Return the micro-batches of an update with β and Q, or nothing when the stop rule holds."""
        if self._halted:
            self._halted += 1
            return []
        micros = list(self._cut(data, update, ctx))
        if update == 0 and self.config.reference == "per_round":  # θ is the reference: g = 0, nothing to measure
            return [replace(micro, beta=self._beta or 1.0, baseline=0.0) for micro in micros]
        several = ctx.group.world_size > 1 or len(micros) > 1
        calibrating = self._beta is None and self.sides == 2
        spread = None
        if calibrating or self.config.stop_ratio or (several and self.config.loss == "kto"):
            spread = self._spread(micros, ctx)
        if spread is not None and self._past_limit(spread, update):
            return []
        beta = self._beta if self._beta is not None else self._calibrate(spread)
        baseline = None if spread is None else kto_baseline(spread.mean)
        return [replace(micro, beta=beta, baseline=baseline) for micro in micros]

    @torch.no_grad()
    def _spread(self, micros: list[Micro], ctx: StepContext) -> Spread:
        """Measure g over the whole optimizer batch of all ranks with gradient-free passes."""
        sums = torch.zeros(6, dtype=torch.float64)
        with ctx.group.all_or_none(ctx.poll), self.roles.use("policy"):
            for micro in micros:
                errors, ref = self._predict(micro, ctx)[1].double().cpu(), micro.reference.double().cpu()
                g = ref - errors
                row = [g.sum(), g.square().sum(), errors[0].sum(), ref[0].sum(), ref.sum(), torch.tensor(g.numel())]
                sums += torch.stack([value.double() for value in row])
        total, squares, plus, ref_plus, scale, count = ctx.group.sum_numbers(sums.tolist())
        count = max(count, 1.0)
        mean = total / count
        std = max(squares / count - mean * mean, 0.0) ** 0.5
        pairs = count / self.sides
        return Spread(mean, std, plus / pairs, ref_plus / pairs, scale / count)

    def _past_limit(self, spread: Spread, update: int) -> bool:
        """Whether ℓ_θ(D+) has left the stop rule's bound; counts what it ends.

        Raises:
            NumericsError: three rounds in a row ended before their first update: the policy has left the data.
        """
        limit = self.config.stop_ratio
        if not limit or spread.positive <= limit * spread.ref_positive:
            self._halted_rounds = 0 if update == 0 else self._halted_rounds
            return False
        self._halted = 1
        self._halted_rounds += update == 0
        if self._halted_rounds >= _HALTED_ROUNDS:
            raise NumericsError(
                f"the denoising error on D+ is {spread.positive / spread.ref_positive:.3f} times the reference's, "
                f"above stop_ratio = {limit:g}, for {_HALTED_ROUNDS} rounds: the negative term runs "
                "away. Lower lr or beta, use reference = 'per_round', or add kl_coef."
            )
        return True

    def _calibrate(self, spread: Spread | None) -> float:
        """Return β for this update while none is fixed, and fix β = 1/std(g) once θ has left the reference.

        At θ = ref g vanishes and every β gives the same direction, so any value serves.  After the first optimizer step
        std(g) is what one step changes; with β·std(g) = 1 there, the sigmoid saturates after a few steps, which bounds
        how far a round pushes D− away.  The spread is held within `_SPREAD` of ℓ_ref, against a first step that is
        tiny (warm-up) or wild.
        """
        if spread is None:
            return 1.0
        if spread.std <= _FLAT * spread.scale:
            return 1.0 / max(spread.scale, 1e-12)
        low, high = _SPREAD
        self._beta = 1.0 / min(max(spread.std, low * spread.scale), high * spread.scale)
        return self._beta

    def loss(self, micro: Micro, ctx: StepContext) -> LossOut:
        """Contrast of one micro-batch (KTO, DPO or positive-only) plus the pull to the base where kl_coef > 0."""
        x0, t, noise, cond = self._stacked(micro)
        assert isinstance(self.task.denoiser.process, GaussianProcess)
        base = self.base_at(self.task.denoiser.process.corrupt(x0, t, noise), t, cond, ctx)
        with self.roles.use("policy"):
            prediction, errors = self._predict(micro, ctx)
        pairs = Errors(errors[0], errors[1:].flatten(), micro.reference[0], micro.reference[1:].flatten())
        gains = pairs.gains().detach()
        baseline = kto_baseline(float(gains.mean())) if micro.baseline is None else micro.baseline
        losses = LOSSES[self.config.loss](pairs, micro.beta, baseline)
        kl = prediction.new_zeros(()) if base is None else (prediction - base.raw.float()).square().mean()
        means = {"loss/contrast": losses.mean(), "loss/kl": kl, "policy/g_mean": gains.mean()}
        means |= {"policy/g_std": gains.std(unbiased=False), "loss/positive": errors[0].mean()}
        means |= {"loss/ref_positive": micro.reference[0].mean()}
        if self.sides == 2:
            means |= {"loss/negative": errors[1].mean(), "loss/ref_negative": micro.reference[1].mean()}
        metrics: dict[str, float | Tensor] = {key: value.detach().float() * len(losses) for key, value in means.items()}
        metrics |= {"policy/beta": micro.beta * len(losses), "policy/baseline": baseline * len(losses)}
        pull = self.config.kl_coef * (micro.beta if self.sides == 2 else 1.0) * kl
        return LossOut(losses.sum() + pull * len(losses), len(losses), metrics)

    # ---------------------------------------------------------------- the rest of the contract

    def state_dict(self) -> dict[str, Any]:
        """Number of updates, calibrated β (None before), and the counters of the stop rule."""
        own = {"beta": self._beta, "halted": self._halted, "halted_rounds": self._halted_rounds}
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self._beta = None if state["beta"] is None else float(state["beta"])
        self._halted, self._halted_rounds = int(state["halted"]), int(state["halted_rounds"])
