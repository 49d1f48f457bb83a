"""CTRL: a new condition y on a pretrained model by KL-regularised control (arXiv 2406.12120; docs/methods/ctrl.md).

The target is p(y|x)^γ·p_pre(x|c)/Z.  A classifier gives log p(y|x) on clean samples; the conditioned model is tuned to
maximise J = E[γ·log p(y|x0)] − E[Σ KL] along its own sampling chain: by regression on reweighted paths of the base
("pool", `gencontrol.algorithms.ctrl.pool`: no backward pass through chain or reward), by backpropagation through the
chain ("full", or "truncated" to its last steps with the KL of all of them) or by adjoint matching ("adjoint").
J ≤ log Z is a computable bound and the signal to stop.  PORT with changes: γ and KL in summed units (the released code
averages the KL over pixels, which multiplies γ by their number: P1), log_softmax for log(p + 1e-6) (P6), the
truncation's dropped KL put back (P4), labels drawn by their remaining gap (P13).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float, Int64
from torch import Tensor

from gencontrol.algorithms.base import Collected, LossOut, StepContext
from gencontrol.algorithms.ctrl.bound import Corrected, Ledger, log_mean_exp, reweighted
from gencontrol.algorithms.ctrl.ceiling import Ceiling, annealed, check_classifiers, target_weights
from gencontrol.algorithms.ctrl.chain import ControlChain, ControlledPath
from gencontrol.algorithms.ctrl.pool import PathPool
from gencontrol.algorithms.online.base import Several, Tuning, TuningConfig
from gencontrol.algorithms.online.rollout import Sampling, chunks, device_of
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.config import BelowOne, Count, Natural, NonNegative, Share, options
from gencontrol.errors import UsageError
from gencontrol.files import digest
from gencontrol.models.conditions.base import Conditioned, add_condition, conditioned, with_labels
from gencontrol.models.conditions.labels import Labels, join_prompt, split_prompt
from gencontrol.models.roles import Roles
from gencontrol.process.gaussian import GaussianProcess
from gencontrol.rewards.base import Reward, SetReward
from gencontrol.rewards.image.classifier import attributes_of, fingerprint
from gencontrol.rng import Keyed, row_keys, stream
from gencontrol.sampling.control.controlled import ControlPlan, controlled, memory, plan_of
from gencontrol.sampling.control.files import save_control
from gencontrol.sampling.steps import Ddim
from gencontrol.types import Cond, RewardContext, cond_to

#: evaluation prompts at most, when each label needs one
_EVAL_PROMPTS = 64


@options
class CtrlConfig(TuningConfig):
    """Options of `Ctrl`; values are ours (docs/methods/ctrl.md#e-ctrl-1 and docs/methods/ctrl.md#e-ctrl-2) unless
    marked CODE.

    Args:
        prompts_per_round: paths of one update, over all processes; each has a prompt and a label of its own.  With
            "pool", paths of a look at J.
        gamma: power of p(y|x) in the target, with the KL summed over all values of a sample.
        kl_reduction: "sum"; "mean" divides the KL by the number of values, as CODE does (gamma is then that many times
            larger).
        steps: sampler steps K, of training and of the final model (CODE: 50).
        eta: noise of the chain, in (0, 1]; below 1 the final sample remembers the first noise, and the target is missed
            (P2); at 0 there is no noise and no path KL.
        exact: refuse eta < 1.
        backprop: "pool"; "full"; "truncated" (states carry gradients in the last `backprop_steps` only); "adjoint".
            "auto" is "pool" for a residual control alone and without guidance, else (LoRA, inject "time") "full".
        pool: paths of the pool, made by every process.
        pool_batch, pool_updates: rows of one update on the pool, over all processes, and updates of one round.
        base_updates: updates for what the base chain's discretisation adds to the target; 0 leaves it in.
        single: share of the rows with one attribute's label alone, where there are several attributes.
        min_ess: least effective number of base paths of a label; below it the pool's γ for that label is lowered.
        probe: rounds between two looks at the signal (cosine of two gradients) and, with "pool", at J; 0 never.
        trust_classifier: train although a classifier is near chance or its temperature at an end of its search.
        backprop_steps: for "truncated", in [1, steps].
        adjoint_steps: sampler steps that one adjoint-matching update regresses on; 0 takes all.
        frozen_gradient: let gradients flow through the frozen network to the states; off is cheaper and biased (P5).
        checkpointing: recompute each sampler step in the backward pass.
        guidance: how the control meets classifier-free guidance; see `sampling.control.controlled`.
        guidance_scale: its scale.
        oversample: share of the labels drawn in proportion to their gap log Z − J, in [0, 1]; the rest is uniform.
        held_out: label combinations that are never trained on, as rows of numbers.
        bound_samples: base samples for log Z, ≥ 2.
        stop_gap: stop updating once the mean gap is below this; 0 never stops.
        inject, half: where `prepare` puts the condition, and a control at half resolution; see
            `gencontrol.models.conditions.base`.
    """

    renamed: ClassVar[dict[str, str]] = {"batch": "prompts_per_round", "kl": "kl_reduction"}

    prompts_per_round: Count = 96
    gamma: NonNegative = 1.0
    kl_reduction: Literal["sum", "mean"] = "sum"
    steps: Several = 40
    eta: Annotated[float, Gt(0), Le(1)] = 1.0
    exact: bool = True
    backprop: Literal["auto", "pool", "full", "truncated", "adjoint"] = "auto"
    backprop_steps: Count = 10
    adjoint_steps: Natural = 0
    frozen_gradient: bool = True
    pool: Annotated[int, Ge(16)] = 8192
    pool_batch: Count = 512
    pool_updates: Count = 10
    base_updates: Natural = 1000
    single: Share = 0.25
    min_ess: NonNegative = 50.0
    probe: Natural = 50
    trust_classifier: bool = False
    checkpointing: bool = True
    guidance: Literal["none", "separate", "amplified"] = "none"
    oversample: Share = 0.5
    held_out: tuple[tuple[int, ...], ...] = ()
    bound_samples: Several = 1024
    stop_gap: NonNegative = 0.0
    ema_decay: BelowOne = 0.0
    inject: Literal["residual", "time"] = "residual"
    half: bool = False

    def __post_init__(self) -> None:
        if self.backprop == "truncated" and self.backprop_steps > self.steps:
            raise ValueError(f"backprop_steps = {self.backprop_steps} exceeds steps = {self.steps}")
        if self.adjoint_steps >= self.steps:
            raise ValueError(f"adjoint_steps = {self.adjoint_steps}; expected [0, {self.steps - 1}], 0 = all")


@dataclass(frozen=True)
class Draws:
    """This rank's paths of an update: global numbers [n], label rows [n] and one prompt each."""

    items: Int64[Tensor, " n"]
    rows: Int64[Tensor, " n"]
    prompts: Sequence[str]


@dataclass(frozen=True)
class PoolDraws:
    """Rows of the pool: label rows of `Ctrl.pool_labels`, paths and steps, [n] each."""

    labels: Int64[Tensor, " n"]
    paths: Int64[Tensor, " n"]
    steps: Int64[Tensor, " n"]

    def part(self, part: slice) -> PoolDraws:
        """Some of them."""
        return PoolDraws(self.labels[part], self.paths[part], self.steps[part])


def labelled(task: PromptTask, labels: Labels, texts: Sequence[str]) -> PromptTask:
    """Return a task whose prompts carry labels ("a cube | size=3"); evaluation prompts without any get them in turn."""
    prompts = list(task.eval_prompts)
    if prompts and not any(split_prompt(prompt)[1] for prompt in prompts):
        count = min(max(len(prompts), len(texts)), max(_EVAL_PROMPTS, len(prompts)))
        prompts = [join_prompt(prompts[i % len(prompts)], texts[i % len(texts)]) for i in range(count)]
    name = labels.config.name

    def encode(given: Sequence[str]) -> Cond:
        parts = [split_prompt(text) for text in given]
        cond = task.encode([prompt for prompt, _ in parts])
        device = next(task.denoiser.parameters()).device
        return with_labels(cond, labels.encode([found or None for _, found in parts]).to(device), name=name)

    return replace(task, encode=encode, eval_prompts=prompts)


class Ctrl(Tuning):
    """Conditional control by KL-regularised backpropagation or adjoint matching; see the module docstring."""

    Config = CtrlConfig
    config: CtrlConfig
    name = "ctrl"
    title = "CTRL, a new condition by reward (Zhao et al. 2024)"
    paper = "arXiv:2406.12120"
    summary = (
        "A new condition is learnt by KL-regularised control towards a classifier's labels; the base stays as it is."
    )

    @staticmethod
    def prepare(task: PromptTask, reward: Reward | SetReward, config: Any) -> PromptTask:
        """Return the task with a condition made of the reward's classifiers, or as it is where it has a condition.

        Raises:
            UsageError: the reward has no classifier whose classes could be the labels.
        """
        if isinstance(task.denoiser.network, Conditioned):
            return task
        attributes = attributes_of(reward)
        if not attributes:
            raise UsageError(
                f"reward '{reward.name}' has no classifier; ctrl needs reward 'classifier' for its labels."
            )
        single = len(attributes) == 1
        name = next(iter(attributes)) if single else "y"
        denoiser = add_condition(
            task.denoiser,
            shape=task.latent_shape,
            name=name,
            kind="categorical" if single else "multi",
            cardinality=attributes[name] if single else attributes,
            inject=config.inject,
            half=config.half,
        )
        return replace(task, denoiser=denoiser)

    @staticmethod
    def whole_parameters(config: Any) -> tuple[str, ...]:
        """What is trained whole beside LoRA: all of the condition."""
        return ("embed", "control") if config.inject == "residual" else ("embed",)

    def __init__(
        self, task: PromptTask, reward: Reward | SetReward, config: CtrlConfig, *, roles: Roles, seed: int
    ) -> None:
        """Set up; the task's denoiser has a condition (`prepare`, or `add_condition`), and `roles` hold its network.

        Raises:
            UsageError: no condition, a backbone that is trained without LoRA, a reward without gradient, a classifier
                that knows nothing, eta < 1 with `exact`, guidance without an unconditional condition, or "pool" with a
                condition that it cannot train.
        """
        if not config.trust_classifier:
            check_classifiers(reward)
        if reward.kind != "item" or not reward.differentiable:
            raise UsageError(
                f"reward '{reward.name}' has no gradient per sample; ctrl needs log p(y|x) of a classifier. For other "
                "rewards use a method that needs none (crd, rwr)."
            )
        self.network = conditioned(task.denoiser)
        self._check_backbone(roles)
        process = task.denoiser.process
        assert isinstance(process, GaussianProcess)  # `Conditioned` takes no other
        marks = fingerprint(reward)  # of the weights of the classifiers, none where it has none
        self.plan: ControlPlan = plan_of(
            process,
            config.steps,
            eta=config.eta,
            guidance=config.guidance,
            guidance_scale=config.guidance_scale,
            gamma=config.gamma,
            classifier=digest(marks, 16) if marks else "",
        )
        self.rho2 = memory(process.schedule, self.plan.grid, config.eta)
        if config.eta < 1 and config.exact:
            raise UsageError(
                f"eta = {config.eta:g}: the sample remembers its first noise (rho² = {self.rho2:.3f} on N(0, 1) data), "
                "which no control can move, so the target is missed by that share; use eta = 1, or exact = false."
            )
        if config.guidance != "none" and task.uncond is None:
            raise UsageError(f"guidance '{config.guidance}': this model has no unconditional branch; use 'none'.")
        self.network.set_grid(self.plan.grid)
        self.model = controlled(task.denoiser, self.plan, task.uncond)
        self.labels = self.network.labels
        self.rows = self.labels.combinations(excluded=config.held_out)
        self.texts = [self.labels.text(row) for row in self.rows]
        self.ledger = Ledger(len(self.rows))
        self.base_task = task
        self.backprop = self._backend(config, roles)
        self.pool: PathPool | None = None
        #: a pool of the same base and chain to use instead of drawing one (another γ, another classifier)
        self.given_pool: PathPool | None = None
        several = len(self.labels.attributes) > 1 and config.single > 0
        singles = self._single_labels() if several else self.rows[:0]
        #: label rows of the pool: the combinations, then each attribute's values alone
        self.pool_labels = torch.cat([self.rows, singles])
        self.pool_weights = torch.empty(0)
        self.ceiling: Ceiling | None = None
        self._ceiling: dict[str, float] = {}
        # guidance is inside the controlled model, so the evaluation asks for none
        how = Sampling(config.steps, Ddim(eta=config.eta), 1.0)
        labelled_task = labelled(replace(task, denoiser=self.model), self.labels, self.texts)
        super().__init__(labelled_task, reward, config, roles=roles, seed=seed, evaluate_by=how)

    def _check_backbone(self, roles: Roles) -> None:
        """Check that without labels the model stays the base.

        Raises:
            UsageError: the roles hold another network, or backbone weights are trained themselves.
        """
        if roles.module is not self.network:
            raise UsageError("ctrl: the roles must hold the task's conditioned network (task.denoiser.network).")
        own = {id(p) for p in self.network.own_parameters().values()}
        if roles.lora is None and any(id(p) not in own for p in roles.trainable()):
            raise UsageError("ctrl: backbone weights are trained, so the base would be lost; freeze them, or use LoRA.")
        if roles.lora is not None and not own & {id(p) for p in roles.trainable()}:
            raise UsageError(
                "ctrl: LoRA alone cannot see the labels; make the roles with whole=whole_parameters(config)."
            )

    def _backend(self, config: CtrlConfig, roles: Roles) -> str:
        """Return the backend that "auto" means here.

        Raises:
            UsageError: "pool" where the control is not all that is trained, or the chain is guided.
        """
        alone = self.network.control is not None and roles.lora is None and config.guidance == "none"
        if config.backprop == "auto":
            return "pool" if alone else "full"
        if config.backprop == "pool" and not alone:
            raise UsageError(
                "backprop 'pool' trains a residual control alone, on an unguided chain: use inject = residual, no LoRA "
                "(--lora-rank 0) and guidance = none, or backprop = full."
            )
        return config.backprop

    def _single_labels(self) -> Int64[Tensor, "m a"]:
        """Rows with the label of one attribute alone, of all attributes and values in turn."""
        found = []
        for place, names in enumerate(self.labels.attributes.values()):
            for value in range(len(names)):
                found.append([value if column == place else -1 for column in range(len(self.labels.attributes))])
        return torch.tensor(found)

    # ---- the chain ------------------------------------------------------------------------------------------------

    def chain(self, ctx: StepContext | None = None) -> ControlChain:
        """Return the controlled chain with the weights that are active now."""
        c = self.config
        own: dict[str, Any] = {} if ctx is None else {"autocast": ctx.autocast, "poll": ctx.poll}
        return ControlChain(self.model, self.plan.grid, c.eta, c.frozen_gradient, c.checkpointing, **own)

    def reward_of(
        self, x: Float[Tensor, "b *d"], prompts: Sequence[str], rows: Int64[Tensor, " b"]
    ) -> tuple[Float[Tensor, " b"], Tensor]:
        """Return log p(y|x) of each sample's label (a row of `pool_labels`) with gradients, and which are valid (others
        are 0).
        """
        asked = self.pool_labels[rows]
        values = {
            key: [None if place < 0 else names[place] for place in asked[:, column].tolist()]
            for column, (key, names) in enumerate(self.labels.attributes.items())
        }
        texts = [join_prompt(prompt, self.labels.text(label)) for prompt, label in zip(prompts, asked, strict=True)]
        context = RewardContext(prompts=texts, sampling_rate=self.task.sampling_rate, metadata=values)
        out = self.reward(self.task.decode(x), context)
        valid = out.valid.to(x.device) & out.values.detach().isfinite().to(x.device)
        return torch.where(valid, out.values.to(x.device), 0.0), valid

    def condition(self, prompts: Sequence[str], rows: Int64[Tensor, " b"]) -> Cond:
        """Return the condition of prompts with label rows."""
        device = device_of(self.task)
        own = cond_to(self.base_task.encode(list(prompts)), device)
        return with_labels(own, self.rows[rows].to(device), name=self.network.config.name)

    # ---- the Trainer's contract -----------------------------------------------------------------------------------

    def collect(self, ctx: StepContext) -> Collected:
        """Draw this step's prompts and labels; the first call estimates the bound, and draws the pool."""
        c = self.config
        prompts = self.prompts(ctx)
        self.ledger.clear()
        unknown = bool(self.ledger.log_z.isnan().any())
        if self.backprop == "pool" and (self.pool is None or unknown):
            self._draw_pool(ctx)
        elif unknown:
            values = self.base_rewards(c.bound_samples, ctx)[1]
            self._estimate_bound(values, ctx)
        metrics = {**self.ledger.metrics(self.texts), **self._ceiling, "ctrl/rho2": self.rho2}
        gap = self.ledger.mean_gap()
        if c.stop_gap and gap < c.stop_gap:
            return Collected(None, 0, {**metrics, "ctrl/stopped": 1.0})
        count = c.prompts_per_round // ctx.world_size
        items = torch.arange(ctx.rank * count, (ctx.rank + 1) * count)
        rows = self._label_rows(f"ctrl/label/{ctx.step}", items)
        draws = Draws(items, rows, [prompts[i] for i in items.tolist()])
        if c.probe and ctx.step % c.probe == 0:
            metrics |= self._probe(draws, ctx)
        if self.backprop != "pool":
            return Collected(draws, 1, metrics)
        return Collected(draws, c.pool_updates, metrics)

    def _label_rows(self, name: str, items: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
        """Draw a label row for every item."""
        cumulative = self.ledger.shares(self.config.oversample).cumsum(0)
        draw = Keyed(row_keys(self.seed, name, items)).uniform((len(items), 1))[:, 0]
        return torch.searchsorted(cumulative, draw * cumulative[-1], right=True).clamp(max=len(self.rows) - 1)

    def minibatches(self, data: Draws, update: int, ctx: StepContext) -> Iterable[Draws | PoolDraws]:
        """Cut the update into micro-batches."""
        if self.backprop == "pool":
            found = self._pool_draws(f"ctrl/pool/{ctx.step}/{update}", ctx)
            for part in chunks(len(found.labels), ctx.micro_batch):
                yield found.part(part)
            return
        for part in chunks(len(data.items), ctx.micro_batch):
            yield Draws(data.items[part], data.rows[part], data.prompts[part])

    def _pool_draws(self, name: str, ctx: StepContext) -> PoolDraws:
        """This rank's rows of an update on the pool."""
        assert self.pool is not None
        count = max(1, self.config.pool_batch // ctx.world_size)
        items = torch.arange(ctx.rank * count, (ctx.rank + 1) * count)
        labels = self._label_rows(f"{name}/label", items)
        singles = len(self.pool_labels) - len(self.rows)
        if singles:
            coin = Keyed(row_keys(self.seed, f"{name}/single", items)).uniform((count, 2))
            alone = len(self.rows) + (coin[:, 1] * singles).long()
            labels = torch.where(coin[:, 0] < self.config.single, alone, labels)
        return PoolDraws(labels, *self.pool.drawn(self.pool_weights, labels, self.seed, f"{name}/path", items))

    def loss(self, micro: Draws | PoolDraws, ctx: StepContext) -> LossOut:
        """Sum over paths of Σ KL − γ·log p(y|x0), or the regression on the pool or of adjoint matching."""
        if isinstance(micro, PoolDraws):
            return self._pool_loss(micro, ctx)
        chain = self.chain(ctx)
        keys = row_keys(self.seed, f"ctrl/path/{ctx.step}", micro.items)
        with self.roles.use("policy"):
            cond = self.condition(micro.prompts, micro.rows)
            start = chain.start(self.task.latent_shape, keys, device_of(self.task))
            run = self._adjoint if self.backprop == "adjoint" else self._backprop
            total, path, value, valid = run(chain, start, keys, cond, micro, ctx)
        scaled = self.config.gamma * value.detach()
        self.ledger.add(micro.rows[valid.cpu()], scaled[valid], path.kl.detach()[valid], path.log_ratio[valid])
        metrics = {
            "reward/mean": value.detach()[valid].sum(),
            "policy/kl": path.kl.detach()[valid].sum(),
            "ctrl/j": (scaled - path.kl.detach())[valid].sum(),
        }
        return LossOut(torch.where(valid, total, 0.0).sum(), int(valid.sum()), metrics)

    def _backprop(
        self, chain: ControlChain, start: Tensor, keys: Tensor, cond: Cond, micro: Draws, ctx: StepContext
    ) -> tuple[Tensor, ControlledPath, Tensor, Tensor]:
        c = self.config
        first = c.steps - c.backprop_steps if self.backprop == "truncated" else 0
        path = chain.run(start, keys, cond, gradient_from=first)
        value, valid = self.reward_of(path.x, micro.prompts, micro.rows)
        price = path.kl / (start[0].numel() if c.kl_reduction == "mean" else 1)
        return price - c.gamma * value, path, value, valid

    def _adjoint(
        self, chain: ControlChain, start: Tensor, keys: Tensor, cond: Cond, micro: Draws, ctx: StepContext
    ) -> tuple[Tensor, ControlledPath, Tensor, Tensor]:
        """Simulate without gradients, pull the reward's gradient back through the base, regress the control on it."""
        c = self.config
        with torch.no_grad():
            path = chain.run(start, keys, cond, keep=True)
        leaf = path.x.detach().requires_grad_()
        with torch.enable_grad():
            value, valid = self.reward_of(leaf, micro.prompts, micro.rows)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        size = start[0].numel() if c.kl_reduction == "mean" else 1
        adjoints = chain.adjoints(path.states, cond, c.gamma * size * slope)
        stochastic = c.steps - 1
        chosen = list(range(stochastic))
        if c.adjoint_steps:
            order = torch.randperm(stochastic, generator=stream(self.seed, "ctrl/adjoint", ctx.step)).tolist()
            chosen = sorted(order[: c.adjoint_steps])
        total = chain.regression(path.states, adjoints, cond, chosen) * (stochastic / len(chosen))
        return total, path, value.detach(), valid

    def _pool_loss(self, micro: PoolDraws, ctx: StepContext) -> LossOut:
        """Sum over rows of K·std²/2·|u − r|²; see `gencontrol.algorithms.ctrl.pool`."""
        assert self.pool is not None
        device = device_of(self.task)
        rows = self.pool.rows(micro.paths, micro.steps, device)
        labels, times = self.pool_labels[micro.labels].to(device), self.pool.times.to(device)[rows.step]
        target = self.pool.target(rows, self._scale())
        with self.roles.use("policy"), ctx.autocast():
            push = self.network.push(rows.x, rows.hat, times, labels)
        total = self.pool.price(push.float() - target, rows.step)
        size = rows.x[0].numel() if self.config.kl_reduction == "mean" else 1
        return LossOut((total / size).sum(), len(total), {"ctrl/regression": total.detach().sum()})

    def _scale(self) -> Tensor:
        assert self.network.scale is not None
        return torch.tensor(self.network.scale)

    def after_update(self, ctx: StepContext, update: int) -> None:
        """Take this update's paths (with the pool, those of a look at J) into J, and move the averaged weights."""
        self.ledger.close(ctx.group)
        super().after_update(ctx, update)

    def state_dict(self) -> dict[str, Any]:
        """Number of updates, bound and running J of every label."""
        texts = {"scale": json.dumps(self.network.scale), "ceiling": json.dumps(self._ceiling)}
        return super().state_dict() | {"ledger": self.ledger.state_dict()} | texts

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self.ledger.load_state_dict(state["ledger"])
        self.network.set_grid(self.plan.grid, json.loads(state["scale"]))
        self._ceiling = json.loads(state["ceiling"])

    def save_final(self, folder: Path) -> None:
        """Write the untouched base, loadable by `from_pretrained`, and beside it control/: all that is new."""
        with self.roles.use("ref"):
            self.base_task.save_final(folder)
        save_control(self.network, self.roles, self.role, self.plan, folder / "control")

    # ---- the bound and the corrector ------------------------------------------------------------------------------

    @torch.no_grad()
    def base_rewards(
        self, count: int, ctx: StepContext, name: str = "ctrl/bound"
    ) -> tuple[Float[Tensor, "n *d"], Float[Tensor, "n m"]]:
        """Draw base samples of the training prompts in turn; also return log p(y|x) of every label row."""
        samples, values = [], []
        chain = self.chain(ctx)
        for part in chunks(count, ctx.micro_batch):
            items = torch.arange(part.start, part.stop)
            prompts = [self.task.prompts[i % len(self.task.prompts)] for i in items.tolist()]
            keys = row_keys(self.seed, name, items)
            cond = cond_to(self.base_task.encode(prompts), device_of(self.task))
            x = chain.run(chain.start(self.task.latent_shape, keys, device_of(self.task)), keys, cond).x
            samples.append(x)
            values.append(self.label_rewards(x, prompts, len(self.rows)))
        return torch.cat(samples), torch.cat(values)

    @torch.no_grad()
    def label_rewards(self, x: Float[Tensor, "n *d"], prompts: Sequence[str], count: int) -> Float[Tensor, "n m"]:
        """Return log p(y|x) of the first `count` label rows of `pool_labels`, float64 on the CPU."""
        columns = [self.reward_of(x, prompts, torch.full((len(x),), row))[0] for row in range(count)]
        return torch.stack(columns, 1).double().cpu()

    def _estimate_bound(self, values: Float[Tensor, "n m"], ctx: StepContext) -> None:
        """log Z of every label row; with several prompts the mean of their log Z, each from its own samples."""
        prompts = min(len(self.task.prompts), len(values))
        scaled = self.config.gamma * values
        found = [log_mean_exp(scaled[start::prompts]) for start in range(prompts)]
        self.ledger.log_z = torch.stack([log_z for log_z, _ in found]).mean(0)
        self.ledger.error = torch.stack([error for _, error in found]).square().mean(0).sqrt() / len(found) ** 0.5
        self.ceiling = Ceiling.of(self.texts, values, self.ledger.log_z, self.config.gamma, prompts)
        self._ceiling = self.ceiling.metrics()
        if ctx.rank == 0:
            print(self.ceiling.text(), file=sys.stderr, flush=True)

    def _draw_pool(self, ctx: StepContext) -> None:
        """Draw the base's paths; from them the bound, the weights, the scale of the output and the base's own part."""
        c, device, task = self.config, device_of(self.task), self.base_task
        prompts = self.task.prompts

        def given(items: Sequence[int]) -> Cond:
            return cond_to(task.encode([prompts[i % len(prompts)] for i in items]), device)

        pool = (
            self.pool
            or self.given_pool
            or PathPool.draw(
                self.chain(ctx),
                self.task.latent_shape,
                c.pool,
                given,
                prompts=min(len(prompts), c.pool),
                seed=self.seed,
                micro=ctx.micro_batch,
                device=device,
                unit=lambda t: self.network.unit(t.to(device)),
            )
        )
        columns = []
        for part in chunks(len(pool), ctx.micro_batch):
            texts = [prompts[i % len(prompts)] for i in range(part.start, part.stop)]
            columns.append(self.label_rewards(pool.x0[part].to(device), texts, len(self.pool_labels)))
        values = torch.cat(columns)
        self._estimate_bound(values[:, : len(self.rows)], ctx)
        gamma = annealed(values, c.gamma, c.min_ess, pool.prompts)
        self.pool_weights = target_weights(values, gamma, pool.prompts)
        lowered = int((gamma < c.gamma).sum())
        self._ceiling |= {"ctrl/pool/gamma_min": float(gamma.min()), "ctrl/pool/lowered": float(lowered)}
        self.network.set_grid(self.plan.grid, pool.scale())
        if c.base_updates and pool.base_part is None:
            pool.fit_base_part(self.network, self._scale(), updates=c.base_updates, batch=c.pool_batch, seed=self.seed)
        self.pool = pool

    def _probe(self, draws: Draws, ctx: StepContext) -> dict[str, float]:
        """Cosine of the gradients of two halves of an update; with the pool, also J and the share of the KL learned."""
        found: dict[str, float] = {}
        with torch.enable_grad():
            cosine = self._cosine(draws, ctx)
        if cosine == cosine:
            found["ctrl/cosine"] = cosine
        self.ledger.clear()
        if self.backprop == "pool":
            assert self.pool is not None
            with torch.no_grad():
                for part in chunks(len(draws.items), ctx.micro_batch):
                    self.loss(Draws(draws.items[part], draws.rows[part], draws.prompts[part]), ctx)
            weights, labels = self.pool_weights[:, : len(self.rows)], self.rows
            log_share = (weights * len(self.pool)).clamp(min=1e-300).log()
            with self.roles.use("policy"):
                reached = self.pool.reached(
                    weights,
                    labels,
                    self.network.push,
                    self._scale(),
                    count=4 * self.config.pool_batch,
                    seed=self.seed,
                    device=device_of(self.task),
                )
            found["ctrl/pool/kl_reached"] = reached
            found["ctrl/pool/kl_target"] = float((weights * log_share).sum(0).mean())
        return found

    def _cosine(self, draws: Draws, ctx: StepContext) -> float:
        """Cosine of this rank's gradients on the two halves of an update; NaN if there is none, or they are sharded."""
        data: Any = self._pool_draws(f"ctrl/probe/{ctx.step}", ctx) if self.backprop == "pool" else draws
        half = len(data.paths if isinstance(data, PoolDraws) else data.items) // 2
        gradients: list[Tensor] = []
        parameters = self.roles.trainable()
        if any(hasattr(parameter, "full_tensor") for parameter in parameters):
            return float("nan")
        for side in (slice(0, half), slice(half, 2 * half)):
            micro = (
                data.part(side)
                if isinstance(data, PoolDraws)
                else Draws(data.items[side], data.rows[side], data.prompts[side])
            )
            total: Tensor | float = 0.0
            for part in chunks(half, ctx.micro_batch):
                piece = (
                    micro.part(part)
                    if isinstance(micro, PoolDraws)
                    else Draws(micro.items[part], micro.rows[part], micro.prompts[part])
                )
                loss = self.loss(piece, ctx).total
                if loss.requires_grad:
                    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
                    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
                    total = total + torch.cat([g.flatten().float() for g in flat])
            if isinstance(total, Tensor):
                gradients.append(total)
        if len(gradients) < 2:
            return float("nan")
        return float(torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0))

    def correct(self, prompt: str, row: int, count: int, *, seed: int, role: str = "policy") -> Corrected:
        """Sample with a role's control and weigh the paths, so that the result is exact whatever the control learned.

        Args:
            row: number of the label row (`rows`).
        """
        keys = row_keys(seed, "ctrl/correct", torch.arange(count))
        rows = torch.full((count,), row)
        with self.roles.use(role), torch.no_grad():
            chain = self.chain()
            start = chain.start(self.task.latent_shape, keys, device_of(self.task))
            cond = self.condition([prompt] * count, rows)
            return reweighted(
                chain, start, keys, cond, self.config.gamma, lambda x: self.reward_of(x, [prompt] * count, rows)[0]
            )
