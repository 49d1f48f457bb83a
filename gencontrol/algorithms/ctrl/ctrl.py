"""CTRL: a new condition y on a pretrained model by KL-regularised control (arXiv 2406.12120; docs/methods/ctrl.md).

The target is p(y|x)^γ·p_pre(x|c)/Z.  A classifier gives log p(y|x) on clean samples; the conditioned model is tuned to
maximise J = E[γ·log p(y|x0)] − E[Σ KL] along its own sampling chain, by backpropagation through the chain ("full", or
"truncated" to its last steps with the KL of all of them) or by adjoint matching ("adjoint": no backward pass through
the chain).  J ≤ log Z is a computable bound and the signal to stop.  PORT with changes: γ and KL in summed units (the
released code averages the KL over pixels, which multiplies γ by their number: P1), log_softmax for log(p + 1e-6) (P6),
the truncation's dropped KL put back (P4), labels drawn by their remaining gap (P13).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Gt, Le
from jaxtyping import Float, Int64
from torch import Tensor

from gencontrol.algorithms.base import Collected, LossOut, StepContext
from gencontrol.algorithms.ctrl.bound import Corrected, Ledger, log_mean_exp, reweighted
from gencontrol.algorithms.ctrl.chain import ControlChain, ControlledPath
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
        prompts_per_round: paths of one update, over all processes; each has a prompt and a label of its own.
        gamma: power of p(y|x) in the target, with the KL summed over all values of a sample.
        kl_reduction: "sum"; "mean" divides the KL by the number of values, as CODE does (gamma is then that many times
            larger).
        steps: sampler steps K, of training and of the final model (CODE: 50).
        eta: noise of the chain, in (0, 1]; below 1 the final sample remembers the first noise, and the target is missed
            (P2); at 0 there is no noise and no path KL.
        exact: refuse eta < 1.
        backprop: "full", "truncated" (states carry gradients in the last `backprop_steps` only) or "adjoint".
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
        inject: where `prepare` puts the condition; see `gencontrol.models.conditions.base`.
    """

    renamed: ClassVar[dict[str, str]] = {"batch": "prompts_per_round", "kl": "kl_reduction"}

    prompts_per_round: Count = 96
    gamma: NonNegative = 1.0
    kl_reduction: Literal["sum", "mean"] = "sum"
    steps: Several = 40
    eta: Annotated[float, Gt(0), Le(1)] = 1.0
    exact: bool = True
    backprop: Literal["full", "truncated", "adjoint"] = "full"
    backprop_steps: Count = 10
    adjoint_steps: Natural = 0
    frozen_gradient: bool = True
    checkpointing: bool = True
    guidance: Literal["none", "separate", "amplified"] = "none"
    oversample: Share = 0.5
    held_out: tuple[tuple[int, ...], ...] = ()
    bound_samples: Several = 1024
    stop_gap: NonNegative = 0.0
    ema_decay: BelowOne = 0.0
    inject: Literal["residual", "time"] = "residual"

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
            UsageError: no condition, a backbone that is trained without LoRA, a reward without gradient, eta < 1 with
                `exact`, or guidance without an unconditional condition.
        """
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

    # ---- the chain ------------------------------------------------------------------------------------------------

    def chain(self, ctx: StepContext | None = None) -> ControlChain:
        """Return the controlled chain with the weights that are active now."""
        c = self.config
        own: dict[str, Any] = {} if ctx is None else {"autocast": ctx.autocast, "poll": ctx.poll}
        return ControlChain(self.model, self.plan.grid, c.eta, c.frozen_gradient, c.checkpointing, **own)

    def reward_of(
        self, x: Float[Tensor, "b *d"], prompts: Sequence[str], rows: Int64[Tensor, " b"]
    ) -> tuple[Float[Tensor, " b"], Tensor]:
        """Return log p(y|x) of each sample's label with gradients, and which are valid (others are 0)."""
        names = self.labels.attributes
        values = {
            key: [names[key][self.rows[row, column]] for row in rows.tolist()] for column, key in enumerate(names)
        }
        texts = [join_prompt(prompt, self.texts[row]) for prompt, row in zip(prompts, rows.tolist(), strict=True)]
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
        """Draw this step's prompts and labels; the first call estimates the bound."""
        c = self.config
        prompts = self.prompts(ctx)
        self.ledger.clear()
        if bool(self.ledger.log_z.isnan().any()):
            self._estimate_bound(ctx)
        metrics = {**self.ledger.metrics(self.texts), "ctrl/rho2": self.rho2}
        gap = self.ledger.mean_gap()
        if c.stop_gap and gap < c.stop_gap:
            return Collected(None, 0, {**metrics, "ctrl/stopped": 1.0})
        count = c.prompts_per_round // ctx.world_size
        items = torch.arange(ctx.rank * count, (ctx.rank + 1) * count)
        cumulative = self.ledger.shares(c.oversample).cumsum(0)
        draw = Keyed(row_keys(self.seed, f"ctrl/label/{ctx.step}", items)).uniform((count, 1))[:, 0]
        rows = torch.searchsorted(cumulative, draw * cumulative[-1], right=True).clamp(max=len(self.rows) - 1)
        return Collected(Draws(items, rows, [prompts[i] for i in items.tolist()]), 1, metrics)

    def minibatches(self, data: Draws, update: int, ctx: StepContext) -> Iterable[Draws]:
        """Cut the update into micro-batches."""
        for part in chunks(len(data.items), ctx.micro_batch):
            yield Draws(data.items[part], data.rows[part], data.prompts[part])

    def loss(self, micro: Draws, ctx: StepContext) -> LossOut:
        """Sum over paths of Σ KL − γ·log p(y|x0), or the regression of adjoint matching."""
        chain = self.chain(ctx)
        keys = row_keys(self.seed, f"ctrl/path/{ctx.step}", micro.items)
        with self.roles.use("policy"):
            cond = self.condition(micro.prompts, micro.rows)
            start = chain.start(self.task.latent_shape, keys, device_of(self.task))
            run = self._adjoint if self.config.backprop == "adjoint" else self._backprop
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
        first = c.steps - c.backprop_steps if c.backprop == "truncated" else 0
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

    def after_update(self, ctx: StepContext, update: int) -> None:
        """Take this update's paths into the running J, and move the averaged weights."""
        self.ledger.close(ctx.group)
        super().after_update(ctx, update)

    def state_dict(self) -> dict[str, Any]:
        """Number of updates, bound and running J of every label."""
        return super().state_dict() | {"ledger": self.ledger.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self.ledger.load_state_dict(state["ledger"])

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
            columns = [self.reward_of(x, prompts, torch.full((len(x),), row))[0] for row in range(len(self.rows))]
            values.append(torch.stack(columns, 1).double().cpu())
        return torch.cat(samples), torch.cat(values)

    def _estimate_bound(self, ctx: StepContext) -> None:
        """log Z of every label row; with several prompts the mean of their log Z, each from its own samples."""
        values = self.config.gamma * self.base_rewards(self.config.bound_samples, ctx)[1]
        prompts = min(len(self.task.prompts), self.config.bound_samples)
        found = [log_mean_exp(values[start::prompts]) for start in range(prompts)]
        self.ledger.log_z = torch.stack([log_z for log_z, _ in found]).mean(0)
        self.ledger.error = torch.stack([error for _, error in found]).square().mean(0).sqrt() / len(found) ** 0.5

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
