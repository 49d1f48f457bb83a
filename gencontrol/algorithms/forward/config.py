"""Options that CRD, DiffusionNFT and AWM share, their ranges, and how the times of an update are spaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.algorithms.online.snapshots import LinearDecay
from gencontrol.algorithms.online.tuning import check_counts, check_tuning
from gencontrol.config import options

KlAdapt = Literal["raw_reward", "advantage", "off"]


def check_choice(config: object, name: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless option `name` is one of `allowed`."""
    value = vars(config)[name]
    if value not in allowed:
        raise ValueError(f"{name} = {value!r}; expected one of {', '.join(allowed)}")


@options
class ForwardConfig:
    """Shared options; labels as in methods/crd.md (PORT = Flow-Factory's trainer and its SD3.5 preset).

    Args:
        prompts_per_round: groups per round, over all processes (48, PORT).
        generations: samples per group, ≥ 2 (24, PORT).
        updates_per_round: optimizer steps per round, each on its own share of the groups (2, PORT).
        train_times: times per sample at an update (9, PORT).
        time_sampling: "stratified" uniform in (0, 1) (ours), "grid" of the sampler's own equal steps (PORT),
            "uniform", or "logit-normal" with shift 3 (PORT).
        time_range: share of the times that is used, counted from t = 1: 0.99 leaves out the last 1 % (PORT).
        demo_steps, eval_steps, sampler, guidance_scale: as in `DragonConfig` (10, 40, euler, 1: PORT).
        spread: advantages are divided by the spread of the round ("global", PORT) or of each "group".
        adv_clip: A_max, advantages are clipped to ±A_max (5, PORT).
        combine: several rewards: normalise each, then sum ("gdpo", PORT), or advantages of the weighted "sum".
        skip_equal: leave out groups whose rewards are all equal (False, PORT: they still pull ratios together).
        kl_coef: κ_max, the anchor's largest weight, ≥ 0; 0 switches it off.
        kl_guidance: guidance scale of the anchor's base; 1 = its plain conditional prediction.
        kl_adapt: κ = κ_min + q·(κ_max − κ_min) with q the reward in [0, 1] ("raw_reward", DERIVED; an unbounded reward
            counts with its rank among all seen so far), q = A/(2·A_max) + ½ ("advantage", PORT), or q = 1 ("off").
        kl_min: κ_min (1e-4, PORT).
        ema_decay: of the averaged weights that evaluation and the final model use; 0 = use the policy (0.99, ours).
        min_valid: least share of groups with valid rewards; below it the round is drawn once more (0.8, ours).
        eval_samples: samples per evaluation prompt (1, ours).
    """

    prompts_per_round: int = 48
    generations: int = 24
    updates_per_round: int = 2
    train_times: int = 9
    time_sampling: Literal["stratified", "grid", "uniform", "logit-normal"] = "stratified"
    time_range: float = 0.99
    demo_steps: int = 10
    eval_steps: int = 40
    sampler: str = "euler"
    guidance_scale: float = 1.0
    spread: Literal["global", "group"] = "global"
    adv_clip: float = 5.0
    combine: Literal["gdpo", "sum"] = "gdpo"
    skip_equal: bool = False
    kl_coef: float = 0.1
    kl_guidance: float = 4.5
    kl_adapt: KlAdapt = "raw_reward"
    kl_min: float = 1e-4
    ema_decay: float = 0.99
    min_valid: float = 0.8
    eval_samples: int = 1

    def __post_init__(self) -> None:
        check_tuning(self)
        check_counts(self, "prompts_per_round", "updates_per_round", "train_times")
        check_choice(self, "time_sampling", ("stratified", "grid", "uniform", "logit-normal"))
        check_choice(self, "spread", ("global", "group"))
        check_choice(self, "combine", ("gdpo", "sum"))
        check_choice(self, "kl_adapt", ("raw_reward", "advantage", "off"))
        if self.generations < 2:
            raise ValueError(f"generations = {self.generations}; expected at least 2, an advantage needs a group")
        if self.updates_per_round > self.prompts_per_round:
            raise ValueError(
                f"updates_per_round = {self.updates_per_round} is more than prompts_per_round = "
                f"{self.prompts_per_round}; every update needs a group of its own"
            )
        if not 0 < self.time_range <= 1:
            raise ValueError(f"time_range = {self.time_range}; expected a share in (0, 1]")
        if not self.adv_clip > 0:
            raise ValueError(f"adv_clip = {self.adv_clip}; expected a number above 0")
        for name in ("kl_coef", "kl_guidance", "kl_min"):
            if not vars(self)[name] >= 0:
                raise ValueError(f"{name} = {vars(self)[name]}; expected at least 0")
        for text in self.snapshots().values():
            LinearDecay.parse(text)

    def snapshots(self) -> Mapping[str, str]:
        """Return role → decay schedule of the method's snapshots; none by default."""
        return {}

    def draws(self) -> int:
        """Return the number of (t, ε) draws that a method averages for one sample at one time index."""
        return 1

    def strata(self) -> int:
        """Return the number of strata over which the draws of one sample are spread."""
        return self.draws()

    def spaced_times(self, offsets: Float[Tensor, "g k m"]) -> Float[Tensor, "g k m"]:
        """Return times in [1e-4, 1 − 1e-4] from uniform offsets: one stratum per index k (m = 1) or per draw m."""
        _, k, m = offsets.shape
        if self.time_sampling in ("uniform", "logit-normal"):
            share = offsets
        else:
            count = k if m == 1 else self.strata()
            number = torch.arange(k).view(1, k, 1) if m == 1 else (torch.arange(m) * count // m).view(1, 1, m)
            share = (number + offsets) / count
        if self.time_sampling == "logit-normal":
            raw = torch.sigmoid(torch.special.ndtri(share.clamp(1e-9, 1 - 1e-9)))
            share = 3.0 * raw / (1.0 + 2.0 * raw)
        if self.time_sampling == "grid":  # the first floor(range·n) of the sampler's times 1, 1 − 1/n, …
            kept = max(1, int(self.time_range * self.demo_steps + 1e-9))
            t = 1.0 - torch.floor(share * kept) / self.demo_steps
        else:
            t = (1.0 - self.time_range) + self.time_range * share
        return t.clamp(1e-4, 1.0 - 1e-4)
