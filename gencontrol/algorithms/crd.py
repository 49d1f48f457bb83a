"""Pure functions of CRD: the implicit reward of a flow model and the centred regression on it (arXiv 2603.14128).

For any weights w with Σw = 1 the weighted mean removes log Z(c) from r = β·log(π*/π_old) + β·log Z(c), so that
β(ρ_i − ρ̄_w) = r_i − r̄_w inside each prompt's group (docs/methods/crd.md#idea).  With uniform weights the loss is
all-pairs regression of reward differences at linear cost.  ρ is estimated per draw of (t, ε); `elbo_weight` and
averaging draws before squaring make it an estimate of the log-ratio itself (see `gencontrol.algorithms.forward.crd`,
exact mode).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from gencontrol.models.denoiser import Denoiser
from gencontrol.process.convert import weight_ratio
from gencontrol.process.gaussian import GaussianProcess
from gencontrol.types import Prediction

Kind = Literal["mse", "bce"]

#: Least self-normalising weight (PORT).
WEIGHT_FLOOR = 1e-5


def _error(velocity: Tensor, target: Tensor, *, adaptive: bool) -> Float[Tensor, " b"]:
    """Mean over the data axes of (velocity − target)², divided by its own mean absolute error where adaptive."""
    gap = (velocity.double() - target.double()).flatten(1)
    error = gap.square().mean(1)
    return error / gap.detach().abs().mean(1).clamp_min(WEIGHT_FLOOR) if adaptive else error


def implicit_reward(
    v_theta: Float[Tensor, "b *d"],
    v_old: Float[Tensor, "b *d"],
    v_target: Float[Tensor, "b *d"],
    *,
    adaptive: bool = True,
) -> Float[Tensor, " b"]:
    """Return ρ̂ = −mean_d[(v_θ − v)²/w_θ − (v_old − v)²/w_old] per item; 0 exactly at v_θ = v_old.

    The difference of two nearly equal errors is taken in float64 and returned in v_θ's dtype (at least float32).

    Args:
        v_theta: the trained model's prediction; only it gets a gradient.
        v_old: the snapshot's prediction at the same (x_t, t, ε): another draw would make ρ̂ noise.
        v_target: the regression target, ε − x0 of a rectified flow.
        adaptive: w = max(1e-5, mean_d |v_· − v|), constant for the gradient (PORT); otherwise w = 1.
    """
    with torch.no_grad():
        old = _error(v_old, v_target, adaptive=adaptive)
    gain = old - _error(v_theta, v_target.detach(), adaptive=adaptive)
    return gain.to(torch.promote_types(v_theta.dtype, torch.float32))


def _group_sum(values: Tensor, groups: Int[Tensor, " n"], count: int) -> Tensor:
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, groups, values)


def _group_softmax(logits: Tensor, groups: Tensor, count: int, member: Tensor) -> Tensor:
    """Softmax over the members of each group; uniform over the whole group where it has no member."""
    size = _group_sum(torch.ones_like(logits), groups, count)
    limit = torch.full((count,), -torch.inf, dtype=logits.dtype, device=logits.device)
    limit = limit.scatter_reduce(0, groups, torch.where(member, logits, -torch.inf), "amax")
    shifted = torch.where(member, (logits - limit[groups]).exp(), torch.zeros_like(logits))
    total = _group_sum(shifted, groups, count)
    return torch.where(total[groups] > 0, shifted / total[groups].clamp_min(1e-300), 1.0 / size[groups])


def centring_weights(
    reward: Float[Tensor, " n"], group_ids: Int[Tensor, " n"], tau: float = math.inf
) -> list[Float[Tensor, " n"]]:
    """Return the weights of each direction of the loss, summing to 1 in every group, float64.

    Args:
        tau: < 0 or inf: uniform, one direction; > 0: softmax(R/τ) and softmax(−R/τ); 0: "hard", softmax over the
            positive and over the negative rewards, uniform where a side is empty (PORT; with targets in [0, 1] the
            negative side always is: unreliable).
    """
    groups, count = group_ids, int(group_ids.max()) + 1 if len(group_ids) else 0
    reward = reward.detach().double()
    everyone = torch.ones_like(reward, dtype=torch.bool)
    if tau < 0 or math.isinf(tau):
        return [_group_softmax(torch.zeros_like(reward), groups, count, everyone)]
    if tau == 0:
        return [
            _group_softmax(reward, groups, count, reward > 0),
            _group_softmax(-reward, groups, count, reward < 0),
        ]
    return [_group_softmax(sign * reward / tau, groups, count, everyone) for sign in (1.0, -1.0)]


def _centred(values: Tensor, weights: Tensor, groups: Tensor, *, detach: bool) -> Tensor:
    """values − Σ_j w_j values_j of the own group, along axis 0 of [n] values."""
    mean = _group_sum(weights * values, groups, int(groups.max()) + 1 if len(groups) else 0)
    return values - (mean.detach() if detach else mean)[groups]


def centered_losses(
    log_ratio: Float[Tensor, "n m"],
    reward: Float[Tensor, " n"],
    group_ids: Int[Tensor, " n"],
    *,
    beta: float = 1.0,
    tau: float = math.inf,
    kind: Kind = "mse",
    detach: bool = True,
) -> Float[Tensor, " n"]:
    """Return the centred loss of each sample in float64; `log_ratio` [n 1], or [n 2] with two independent estimates.

    One column c: (β·c − R)² of the centred values.  Two columns: the product (β·c1 − R)(β·c2 − R), whose expectation
    is the square of the mean residual, while E(βρ̂ − R)² = (βρ − R)² + β²·Var ρ̂ punishes noise (DERIVED,
    docs/methods/crd.md#what-beta-means).

    Raises:
        ValueError: "bce" with two columns, or an unknown kind.
    """
    if kind not in ("mse", "bce") or (kind == "bce" and log_ratio.shape[1] != 1):
        raise ValueError(f"kind = {kind!r} with {log_ratio.shape[1]} estimates; expected 'mse', or 'bce' with one")
    target, total = reward.detach().double(), torch.zeros(len(reward), dtype=torch.float64, device=reward.device)
    directions = centring_weights(reward, group_ids, tau)
    for weights in directions:
        goal = _centred(target, weights, group_ids, detach=True)
        ratios = [_centred(c.double(), weights, group_ids, detach=detach) for c in log_ratio.unbind(1)]
        if kind == "bce":
            total = total + functional.binary_cross_entropy_with_logits(
                beta * ratios[0], torch.sigmoid(goal), reduction="none"
            )
        else:
            total = total + (beta * ratios[0] - goal) * (beta * ratios[-1] - goal)
    return total / len(directions)


def centered_reward_loss(
    log_ratio: Float[Tensor, " n"],
    reward: Float[Tensor, " n"],
    group_ids: Int[Tensor, " n"],
    *,
    beta: float = 1.0,
    tau: float = math.inf,
    kind: Kind = "mse",
    detach: bool = True,
) -> Float[Tensor, ""]:
    """Return the mean over the samples of [β(ρ_i − ρ̄) − (R_i − R̄)]², means taken inside each group
    (docs/methods/crd.md#idea).

    Computed in float64, returned in the dtype of `log_ratio`.

    Args:
        log_ratio: ρ, e.g. of `implicit_reward`; the only argument with a gradient.
        reward: R in any unit; a constant per group changes nothing (the log-partition of its prompt).
        group_ids: which prompt each sample belongs to, any integers; a group of one gives no gradient.
        beta: > 0, scale of the ratio.
        tau: temperature of the means' weights, see `centring_weights`; inf or negative is uniform (PORT default).
        kind: "mse", or "bce": cross-entropy of σ(R_c) under logits β·ρ_c (PORT).
        detach: let no gradient through ρ̄ (PORT).  Uniform weights: same gradient either way; others: not the same.
    """
    groups = torch.unique(group_ids, return_inverse=True)[1]
    losses = centered_losses(log_ratio[:, None], reward, groups, beta=beta, tau=tau, kind=kind, detach=detach)
    return losses.mean().to(log_ratio.dtype)


def elbo_weight(denoiser: Denoiser, t: Float[Tensor, " b"], like: Float[Tensor, "b *d"]) -> Float[Tensor, " b"]:
    """Return the weight that makes ∫ weight·‖prediction − target‖² dt a negative log-likelihood bound (nats), float64.

    It is −½·d(SNR)/dt on x0, carried to the model's own prediction; (1 − t)/t for the velocity of a rectified flow.
    For the exact denoiser of a law the bound is tight at every x0 (I-MMSE, Kong et al. 2023, arXiv 2302.03792).
    """
    assert isinstance(denoiser.process, GaussianProcess) and denoiser.prediction is not None
    coeffs = denoiser.process.schedule.coeffs(t.double())
    on_x0 = coeffs.a * (coeffs.a * coeffs.ds - coeffs.s * coeffs.da) / coeffs.s**3
    ratio = weight_ratio(denoiser.prediction, Prediction.X0, coeffs)
    return on_x0 * torch.as_tensor(ratio, dtype=torch.float64, device=t.device) * math.prod(like.shape[1:])
