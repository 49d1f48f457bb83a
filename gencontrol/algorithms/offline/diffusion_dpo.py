"""Diffusion-DPO: preference pairs from files, without a reward (Wallace et al. 2023, arXiv 2311.12908).

The loss is DRAGON's `preference.dpo` on denoising errors of policy and base, with the same t and ε for both members.
Data: JSON lines {"prompt", "chosen", "rejected"}.  The reward that a run names serves evaluation only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.algorithms.base import LossOut, StepContext
from gencontrol.algorithms.matching.preference import Errors, dpo
from gencontrol.algorithms.offline.base import Encoded, Offline, OfflineConfig
from gencontrol.algorithms.online.rollout import denoising_error
from gencontrol.config import Positive, options
from gencontrol.types import Cond, cat_cond, index_cond


@options
class DpoConfig(OfflineConfig):
    """Options of `DiffusionDpo`; the shared ones are `OfflineConfig`'s.

    Args:
        beta: of the contrast, > 0; 5000 with errors averaged over the data axes (PEER-CODE,
            docs/methods/dragon.md#losses).
    """

    beta: Positive = 5000.0


@dataclass(frozen=True)
class DpoMicro:
    """Pairs of one micro-batch with shared times and noise."""

    chosen: Float[Tensor, "p *d"]
    rejected: Float[Tensor, "p *d"]
    cond: Cond
    t: Float[Tensor, " p"]
    noise: Float[Tensor, "p *d"]


class DiffusionDpo(Offline):
    """Diffusion-DPO on pairs of files; see the module docstring."""

    Config = DpoConfig
    config: DpoConfig
    name = "diffusion-dpo"
    title = "Diffusion-DPO (Wallace et al. 2023)"
    paper = "arXiv:2311.12908"
    summary = "Pairs of a preferred and a rejected file are told apart by a contrast of denoising errors."
    fields = (("prompt",), ("chosen", "rejected"), ())

    def minibatches(self, data: Encoded, update: int, ctx: StepContext) -> Iterable[DpoMicro]:
        """Yield an update's pairs, `ctx.micro_batch` samples at a time."""
        rows = data.rows(update, self.config.updates_per_round)
        plus, minus = data.latents["chosen"], data.latents["rejected"]
        size = max(1, ctx.micro_batch // 2)
        places = data.place[rows]
        for part, t, noise in self.noised(places, self.config.batch, plus, size, ctx, update):
            own = rows[part].to(plus.device)
            yield DpoMicro(plus[own], minus[own], index_cond(data.cond, own), t, noise)

    def _errors(self, micro: DpoMicro, ctx: StepContext) -> Float[Tensor, "2 p"]:
        """Return ℓ of the active role, chosen in row 0."""
        x0, t = torch.cat([micro.chosen, micro.rejected]), torch.cat([micro.t, micro.t])
        noise, cond = torch.cat([micro.noise, micro.noise]), cat_cond([micro.cond, micro.cond])
        with ctx.autocast():
            return denoising_error(self.task.denoiser, x0, t, noise, cond).view(2, -1)

    def loss(self, micro: DpoMicro, ctx: StepContext) -> LossOut:
        """−log σ(−β/2·[Δ(chosen) − Δ(rejected)]) of each pair; log 2 at the base."""
        ctx.poll()
        with self.roles.use("ref"), torch.no_grad():
            base = self._errors(micro, ctx)
        with self.roles.use("policy"):
            own = self._errors(micro, ctx)
        losses = dpo(Errors(own[0], own[1], base[0], base[1]), self.config.beta, 0.0)
        margin = ((base - own)[0] - (base - own)[1]).detach()
        metrics: dict[str, float | Tensor] = {
            "loss/dpo": losses.detach().sum(),
            "policy/accuracy": (margin > 0).float().sum(),
            "policy/margin": margin.sum(),
            "loss/positive": own[0].detach().sum(),
            "loss/negative": own[1].detach().sum(),
            "loss/ref_positive": base[0].sum(),
        }
        return LossOut(losses.sum(), len(losses), metrics)
