"""The pull to the pre-trained model: mean squared distance to the base's prediction, by choice under guidance.

Adding λ·mean ‖v_θ − v_ref‖² to a loss is a KL penalty on the path law (up to the weight of each t).  With a guidance
scale s ≠ 1 the base is u + s(c − u): the model learns to imitate guidance without paying for it (CRD, arXiv
2603.14128).  The scale is then part of the objective: evaluate at guidance 1 (methods/crd.md §5.8).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.algorithms.online.rollout import guided
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.models.denoiser import Pred
from gencontrol.models.roles import Roles
from gencontrol.types import Cond


@torch.no_grad()
def reference_prediction(
    task: PromptTask, roles: Roles, xt: Float[Tensor, "b *d"], t: Float[Tensor, " b"], cond: Cond, scale: float
) -> Pred:
    """Return the base model's prediction at (x_t, t), guided by `scale` (1: one conditional pass), without gradient.

    Call it before the policy's own pass, and under the run's autocast.

    Raises:
        UsageError: scale ≠ 1 and the model has no unconditional condition.
    """
    with roles.use("ref"):
        pred = guided(task, scale)(xt, t, cond)
    assert isinstance(pred, Pred)
    return pred


def reference_velocity(
    task: PromptTask, roles: Roles, xt: Float[Tensor, "b *d"], t: Float[Tensor, " b"], cond: Cond, scale: float
) -> Float[Tensor, "b *d"]:
    """Return the velocity dx/dt of `reference_prediction`."""
    return reference_prediction(task, roles, xt, t, cond, scale).velocity


def anchor_penalty(velocity: Float[Tensor, "b *d"], reference: Float[Tensor, "b *d"]) -> Float[Tensor, " b"]:
    """Return ‖velocity − reference‖² averaged over the data axes, per item, in float32 or wider."""
    wide = torch.promote_types(velocity.dtype, torch.float32)
    return (velocity.to(wide) - reference.to(wide)).square().flatten(1).mean(1)
