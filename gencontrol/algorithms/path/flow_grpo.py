"""Flow-GRPO and DDPO: policy gradients on sampler steps, which differ in the step and in the advantages.

Flow-GRPO (Liu et al. 2025, arXiv 2505.05470; code yifan123/flow_grpo): the flow's ODE becomes an SDE with the same
marginals, σ_t = a·√(t/(1−t)), and rewards are centred in the group of a prompt's samples.  Step, KL and clip range are
the official code's (tests/golden/test_golden_flow_grpo.py); other ones are options.
DDPO (Black et al. 2023, arXiv 2305.13301; code kvablack/ddpo-pytorch): DDIM with η = 1, and rewards are normalised by
a running record of each prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.algorithms.base import StepContext
from gencontrol.algorithms.online.base import Several
from gencontrol.algorithms.online.rollout import Spread, group_advantages
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.algorithms.path.base import PathConfig, PathGradient
from gencontrol.config import Count, Positive, options
from gencontrol.models.roles import Roles
from gencontrol.rewards.base import Reward, SetReward
from gencontrol.sampling.steps import Ddim, EulerMaruyama, Sde, StochasticStep


@options
class FlowGrpoConfig(PathConfig):
    """Options of `FlowGrpo`; defaults are those of the official code (PORT, docs/methods/ddpo-flow-grpo.md#flow-grpo),
    the shared ones `PathConfig`'s.

    Args:
        noise: a of σ_t = a·√(t/(1−t)), > 0; the steps have level a/√2, which means the same SDE on every schedule.
        integrator: "euler-maruyama" (PORT), or "exponential", which is exact for a frozen prediction (ours).
        path_kl_coef: 0.04 in the unit "code" (PORT), 0.004 in the unit "paper" (DERIVED: the same pull at ten equal
            steps).
        spread: standard deviation that divides advantages: of all rewards ("global") or of the group ("group").
    """

    generations: Several = 24
    noise: Positive = 0.7
    integrator: Literal["euler-maruyama", "exponential"] = "euler-maruyama"
    path_kl_unit: Literal["code", "paper"] = "code"
    spread: Spread = "global"

    def kl_weight(self) -> float:
        """Return the weight of the path KL: the unit's own where none is given."""
        own = {"code": 0.04, "paper": 0.004}[self.path_kl_unit]
        return own if self.path_kl_coef is None else self.path_kl_coef


class FlowGrpo(PathGradient):
    """Flow-GRPO; see the module docstring."""

    Config = FlowGrpoConfig
    config: FlowGrpoConfig
    name = "flow-grpo"
    title = "Flow-GRPO (Liu et al. 2025)"
    paper = "arXiv:2505.05470"
    summary = (
        "A clipped policy gradient on the steps of a stochastic sampler, with advantages inside each prompt's group."
    )

    @staticmethod
    def rollout_step(config: FlowGrpoConfig) -> StochasticStep:
        """The flow's SDE."""
        return (EulerMaruyama if config.integrator == "euler-maruyama" else Sde)(config.noise / 2**0.5)

    def advantages(
        self, values: Float[Tensor, " n"], valid: Tensor, ctx: StepContext
    ) -> tuple[Float[Tensor, " n"], dict[str, float]]:
        """Centre the rewards in each prompt's group."""
        cfg = self.config
        return group_advantages(values, valid, cfg.generations, spread=cfg.spread, clip=cfg.adv_clip), {}


@options
class DdpoConfig(PathConfig):
    """Options of `Ddpo`; defaults are those of the official code (PORT, docs/methods/ddpo-flow-grpo.md#flow-grpo) but
    for the batch (ours).

    Args:
        history: rewards remembered per prompt.
        min_history: below this many the statistics of the whole round serve.
    """

    prompts_per_round: Count = 256
    generations: Count = 1
    demo_steps: Several = 50
    eval_steps: Count = 50
    sampler: str = "sde"
    history: Count = 32
    min_history: Count = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_history > self.history:
            raise ValueError(f"min_history = {self.min_history}; expected at most history = {self.history}")


class PromptRecord:
    """The last rewards of every prompt, which normalise new ones (PORT: PerPromptStatTracker)."""

    def __init__(self, history: int, min_history: int) -> None:
        """Remember `history` rewards per prompt; prompts with fewer than `min_history` use the round's statistics."""
        self.history, self.min_history = history, min_history
        self.rewards: dict[str, list[float]] = {}

    def normalise(self, prompts: Sequence[str], values: Float[Tensor, " n"], valid: Tensor) -> Float[Tensor, " n"]:
        """Enter the valid rewards; return (r − mean)/(std + 1e-6) of each by its prompt's record, 0 where invalid."""
        numbers = values.double().tolist()
        rows: dict[str, list[int]] = {}
        for row, (prompt, good) in enumerate(zip(prompts, valid.tolist(), strict=True)):
            if good:
                rows.setdefault(prompt, []).append(row)
        result, everything = torch.zeros(len(values), dtype=torch.float64), values[valid].double()
        for prompt, own in rows.items():
            record = (self.rewards.get(prompt, []) + [numbers[row] for row in own])[-self.history :]
            self.rewards[prompt] = record
            basis = everything if len(record) < self.min_history else torch.tensor(record, dtype=torch.float64)
            mean, std = float(basis.mean()), float(basis.std(unbiased=False))
            for row in own:
                result[row] = (numbers[row] - mean) / (std + 1e-6)
        return result


class Ddpo(PathGradient):
    """DDPO; see the module docstring.  `collect` moves the record of rewards, which `state_dict` holds."""

    Config = DdpoConfig
    config: DdpoConfig
    name = "ddpo"
    title = "DDPO (Black et al. 2023)"
    paper = "arXiv:2305.13301"
    summary = "A clipped policy gradient on the steps of DDIM, with rewards normalised by a record of each prompt."

    def __init__(
        self, task: PromptTask, reward: Reward | SetReward, config: DdpoConfig, *, roles: Roles, seed: int
    ) -> None:
        """Set up; arguments and errors are those of `PathGradient`."""
        super().__init__(task, reward, config, roles=roles, seed=seed)
        self.record = PromptRecord(config.history, config.min_history)

    @staticmethod
    def rollout_step(config: DdpoConfig) -> Ddim:
        """DDIM with the noise of the ancestral chain."""
        return Ddim(eta=1.0)

    def advantages(
        self, values: Float[Tensor, " n"], valid: Tensor, ctx: StepContext
    ) -> tuple[Float[Tensor, " n"], dict[str, float]]:
        """Normalise by each prompt's record, which all ranks keep alike."""
        cfg = self.config
        prompts = [prompt for prompt in self.prompts(ctx) for _ in range(cfg.generations)]
        weights = self.record.normalise(prompts, values, valid).clamp(-cfg.adv_clip, cfg.adv_clip)
        return weights, {"reward/prompts_on_record": float(len(self.record.rewards))}

    def state_dict(self) -> dict[str, Any]:
        """Number of updates, and the record of rewards."""
        return super().state_dict() | {"rewards": {p: list(r) for p, r in self.record.rewards.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self.record.rewards = {str(p): [float(v) for v in r] for p, r in state["rewards"].items()}
