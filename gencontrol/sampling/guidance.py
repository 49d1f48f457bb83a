"""Controls: functions from Model to Model that samplers, searches and training never see.

Predictions are mixed in the coordinate v = a·eps - s·x0, the one that no end of any schedule makes singular: at equal
signal-to-noise ratio v/sqrt(a² + s²) is the same number for every process, so models of different schedules and
prediction types meet there.  CFG: Ho & Salimans 2022 eq. 6.  Convex composition: the mixture of scores of GPC.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from gencontrol.models.denoiser import Pred, TokenPred
from gencontrol.process.gaussian import GaussianProcess, Time
from gencontrol.process.masked import MaskedProcess
from gencontrol.process.schedule import Scalar, column
from gencontrol.sampling.state import repeat_cond
from gencontrol.types import Cond, Grouped, Prediction, cat_cond, cond_rows

#: (prediction at (x_t, t), t, condition) → a score [b *d] to add; x_t and x0 are attributes of the prediction.
ScoreFn = Callable[[Pred, Time, Cond], Tensor]
#: weights of a composition: one per model, or a function of the log-SNR that returns them; see `compose`
Weights = Sequence[float | Tensor] | Callable[[float | Tensor], Sequence[float | Tensor]]


class Control(nn.Module):
    """A Model made of Models; they are its submodules, so device moves and parameter lists reach them."""

    def __init__(self, process: GaussianProcess | MaskedProcess) -> None:
        super().__init__()
        self.process = process


class _Guided(Control):
    """Classifier-free guidance: uncond + scale·(cond - uncond)."""

    def __init__(self, model: Any, scale: float, uncond: Cond) -> None:
        super().__init__(model.process)
        self.model, self.scale, self.uncond = model, scale, uncond

    def forward(self, xt: Tensor, t: Time, cond: Cond = None) -> Pred | TokenPred:
        """Predict with one call of the doubled batch (two calls if one of the conditions is None)."""
        if self.scale == 1.0:
            return self.model(xt, t, cond)
        uncond = _like(cond, self.uncond, len(xt))
        if cond is None or uncond is None:
            given, free = self.model(xt, t, cond), self.model(xt, t, uncond)
        else:
            both_t = torch.cat([t, t]) if isinstance(t, Tensor) and t.ndim else t
            both = self.model(torch.cat([xt, xt]), both_t, cat_cond([cond, uncond]))
            given, free = _rows(both, slice(0, len(xt))), _rows(both, slice(len(xt), None))
        return _extrapolate(given, free, self.scale)


def cfg(model: Any, scale: float, uncond: Cond) -> Control:
    """Guide a conditional model by its own unconditional prediction; tokens are guided in their log-probabilities.

    Args:
        scale: 1 is the conditional model, 0 the unconditional one, larger pushes towards the condition.
        uncond: the empty condition, of batch 1 (expanded) or of the batch; None where the model takes None (two calls).
    """
    if not math.isfinite(scale):
        raise ValueError(f"guidance scale is {scale}; it must be finite")
    return _Guided(model, float(scale), uncond)


def _like(cond: Cond, uncond: Cond, count: int) -> Cond:
    """The empty condition for `count` rows, its one row shared where rows of the condition are."""
    if isinstance(cond, Grouped) and uncond is not None and cond_rows(uncond) == 1:
        return Grouped(uncond.unique if isinstance(uncond, Grouped) else uncond, torch.zeros(count, dtype=torch.int64))
    return repeat_cond(uncond, count)


def _rows(both: Pred | TokenPred, index: slice) -> Pred | TokenPred:
    """Some rows of a batch's prediction."""
    if isinstance(both, TokenPred):
        return TokenPred(both.logits[index], both.xt[index])
    return Pred(both.raw[index], both.xt[index], both.coeffs.rows(index), both.prediction, both.sigma_data)


def _extrapolate(given: Pred | TokenPred, free: Pred | TokenPred, scale: float) -> Pred | TokenPred:
    """free + scale·(given - free), in the model's own coordinates (all are affine in the output at one x_t)."""
    if isinstance(given, TokenPred) or isinstance(free, TokenPred):
        on, off = _log_probs(given), _log_probs(free)
        return TokenPred(torch.where(torch.isneginf(on), on, torch.lerp(off, on, scale)), given.xt)
    if given.prediction == free.prediction:
        return given.replace(torch.lerp(free.raw, given.raw, scale))
    return given.replace(torch.lerp(free.v, given.v, scale), Prediction.V)


def _log_probs(pred: Pred | TokenPred) -> Float[Tensor, "b n v"]:
    """Log-probabilities of a token prediction."""
    if not isinstance(pred, TokenPred):
        raise ValueError("a token prediction cannot be guided by a Gaussian one")
    return pred.log_probs


class _Retimed(Control):
    """A Gaussian model seen through another process."""

    process: GaussianProcess

    def __init__(self, model: Any, process: GaussianProcess) -> None:
        super().__init__(process)
        self.model = model

    def forward(self, xt: Tensor, t: Time, cond: Cond = None) -> Pred:
        """Predict at the inner model's time of equal signal-to-noise ratio."""
        inner, scale = self.process.matched(t, self.model.process.schedule)
        scale = column(scale, xt)
        pred = self.model(scale * xt, inner, cond)
        # both v share the unit sqrt(a² + s²), whose ratio is the same scale
        return Pred(pred.v / scale, xt, self.process.at(t, xt), Prediction.V)


def retime(model: Any, process: GaussianProcess) -> Control:
    """Return the same model under another process (schedule): exact, by matching the signal-to-noise ratio.

    Where the model's own schedule does not reach the ratio, it is asked at its end.
    """
    if not isinstance(model.process, GaussianProcess) or not isinstance(process, GaussianProcess):
        raise ValueError("retime needs Gaussian processes; masked tokens have no signal-to-noise ratio")
    return _Retimed(model, process)


class Composed(Control):
    """Convex mix of the predictions of several models."""

    def __init__(self, models: Sequence[Any], weights: Weights, *, own_conditions: bool) -> None:
        super().__init__(models[0].process)
        self.models = list(models)
        self.weights = weights if callable(weights) else _convex(weights, len(models))
        self.own_conditions = own_conditions
        for index, model in enumerate(models):
            if isinstance(model, nn.Module):
                self.add_module(f"model{index}", model)

    def weights_at(self, xt: Tensor, t: Time) -> list[Scalar]:
        """Return one weight per model at t, each a float or broadcastable against x_t."""
        if not callable(self.weights):
            return [value if isinstance(value, float) else value.to(xt.device) for value in self.weights]
        if isinstance(self.process, MaskedProcess):
            raise ValueError("weights by log-SNR need Gaussian models; masked tokens have none")
        return _convex(self.weights(2 * self.process.at(t, xt).half_logsnr), len(self.models))

    def predictions(
        self, xt: Tensor, t: Time, cond: Cond, weights: Sequence[Scalar]
    ) -> list[tuple[Pred | TokenPred, Scalar]]:
        """Return (prediction, weight) of every model whose weight is not the number 0."""
        found = []
        for index, (model, weight) in enumerate(zip(self.models, weights)):
            if isinstance(weight, float) and weight == 0.0:
                continue
            own = cond[f"model{index}"] if self.own_conditions else cond
            found.append((model(xt, t, own), weight))
        return found

    def forward(self, xt: Tensor, t: Time, cond: Cond = None) -> Pred | TokenPred:
        """Predict with one call of every model whose weight is not 0."""
        return self.mixed(self.predictions(xt, t, cond, self.weights_at(xt, t)), xt, t)

    def mixed(self, found: Sequence[tuple[Pred | TokenPred, Scalar]], xt: Tensor, t: Time) -> Pred | TokenPred:
        """Return the weighted mix of predictions at (x_t, t); one alone is returned as it is."""
        if len(found) == 1:
            return found[0][0]
        if isinstance(self.process, MaskedProcess):
            return TokenPred(_mix([(pred.log_probs, w) for pred, w in found if isinstance(pred, TokenPred)]), xt)
        preds = [(pred, weight) for pred, weight in found if isinstance(pred, Pred)]
        mixed = _mix([(pred.v, weight) for pred, weight in preds])
        return Pred(mixed, preds[0][0].xt, self.process.at(t, xt), Prediction.V)


def compose(models: Sequence[Any], weights: Weights, *, own_conditions: bool = False) -> Composed:
    """Mix several models with convex weights into one that has the FIRST model's process.

    Gaussian models are compared at equal signal-to-noise ratio: the mix of their scores.  Token models must share their
    vocabulary and masking; their log-probabilities are mixed (a geometric mean, normalised by the softmax).

    Args:
        weights: one per model: numbers, tensors that broadcast against x_t (a weight per dimension or position), or a
            function of the log-SNR that returns them (Gaussian models alone).  The function gets a float, or with a
            time per item a tensor [b 1 … 1].  A model whose weight is the number 0 is not called.
        own_conditions: the condition holds one per model, as `own_conditions(conds)` returns it.

    Raises:
        ValueError: weights are negative, do not sum to 1 (1e-6), or the processes cannot be compared.
    """
    if not models or (not callable(weights) and len(models) != len(weights)):
        given = "a function" if callable(weights) else str(len(weights))
        raise ValueError(f"compose got {len(models)} models and {given} weights; give one weight per model")
    first = models[0].process
    if isinstance(first, MaskedProcess):
        if any(model.process != first for model in models):
            raise ValueError("compose needs token models with the same MaskedProcess")
        return Composed(models, weights, own_conditions=own_conditions)
    if not all(isinstance(model.process, GaussianProcess) for model in models):
        raise ValueError("compose cannot mix Gaussian and masked models")
    same = [model if model.process.schedule is first.schedule else retime(model, first) for model in models]
    return Composed(same, weights, own_conditions=own_conditions)


def own_conditions(conds: Sequence[Cond]) -> Cond:
    """Return the condition of a composition whose models have one each, in their order."""
    return {f"model{index}": cond for index, cond in enumerate(conds)}


def _convex(weights: Sequence[Scalar], count: int) -> list[Scalar]:
    """Check weights; numbers become floats.  Tensors on an accelerator are not looked at (it would stall it)."""
    values: list[Scalar] = [w if isinstance(w, Tensor) and w.ndim else float(w) for w in weights]
    total = sum(values)
    bad = len(values) != count
    for value, low, high in [*((value, -1e-6, math.inf) for value in values), (total, 1 - 1e-6, 1 + 1e-6)]:
        if isinstance(value, Tensor):
            bad = bad or (value.device.type == "cpu" and not bool(((value >= low) & (value <= high)).all()))
        else:
            bad = bad or not low <= value <= high or (low < 0 and value < 0)
    if bad:
        raise ValueError(f"compose weights {values} are not convex; give {count} that are >= 0 and sum to 1")
    return values


class _Clipped(Control):
    """A Gaussian model whose clean prediction is bounded."""

    def __init__(self, model: Any, bound: float) -> None:
        super().__init__(model.process)
        self.model, self.bound = model, bound

    def forward(self, xt: Tensor, t: Time, cond: Cond = None) -> Pred:
        """Predict with x0 clamped; eps follows from the clamped x0."""
        pred = self.model(xt, t, cond)
        return pred.replace(pred.x0.clamp(-self.bound, self.bound), Prediction.X0)


def clip_x0(model: Any, bound: float) -> Control:
    """Clamp the clean prediction to [-bound, bound] and let eps follow from it (`clip_sample` of diffusers).

    Around a composition this clips the mix, not its parts, so that a weight of 1 remains the model alone.
    """
    if not isinstance(model.process, GaussianProcess) or not bound > 0:
        raise ValueError(f"clip_x0 needs a Gaussian model and a bound > 0, not {bound}")
    return _Clipped(model, float(bound))


class _Shifted(Control):
    """A Gaussian model with a score added."""

    def __init__(self, model: Any, fn: ScoreFn, scale: float) -> None:
        super().__init__(model.process)
        self.model, self.fn, self.scale = model, fn, scale

    def forward(self, xt: Tensor, t: Time, cond: Cond = None) -> Pred:
        """Predict with score + scale·fn."""
        pred = self.model(xt, t, cond)
        a, s = pred.coeffs.a, pred.coeffs.s
        if not isinstance(a, Tensor) and (a == 0.0 or s == 0.0):
            return pred
        rate = s * pred.coeffs.scale2 / a
        if isinstance(a, Tensor):
            rate = torch.where((a > 0) & (s > 0), rate, torch.zeros_like(rate))
        return pred.replace(pred.v - self.scale * rate * self.fn(pred, t, cond), Prediction.V)


def score_shift(model: Any, fn: ScoreFn, scale: float = 1.0) -> Control:
    """Add scale·fn(pred, t, cond) to a Gaussian model's score: eps - s·g and x0 + (s²/a)·g.

    `fn` sees the unshifted prediction (`pred.xt`, `pred.x0`), so a gradient may be taken at the noisy or clean point;
    it opens torch.enable_grad itself.  At a = 0 the score of any tilted law is that of the noise and the shift of x0
    cannot be read from it: nothing is added there, so one step from pure noise is unguided.
    """
    if not isinstance(model.process, GaussianProcess):
        raise ValueError("score_shift needs a Gaussian model; tokens have no score")
    return _Shifted(model, fn, float(scale))


class _Inpainted(Control):
    """A model whose clean prediction is known on a mask."""

    x_known: Tensor
    mask: Tensor

    def __init__(self, model: Any, x_known: Tensor, mask: Tensor) -> None:
        super().__init__(model.process)
        self.model = model
        self.register_buffer("x_known", x_known, persistent=False)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, xt: Tensor, t: Time, cond: Cond = None) -> Pred | TokenPred:
        """Predict with x0 replaced where the mask is True."""
        pred = self.model(xt, t, cond)
        if isinstance(pred, TokenPred):
            known = torch.arange(pred.logits.shape[-1], device=xt.device) == self.x_known[..., None]
            sure = torch.where(known, 0.0, -math.inf).to(pred.logits.dtype)
            return pred.replace(torch.where(self.mask[..., None], sure, pred.logits))
        return pred.replace(torch.where(self.mask, self.x_known.to(xt), pred.x0), Prediction.X0)


def inpaint(model: Any, x_known: Shaped[Tensor, "#b *d"], mask: Shaped[Tensor, "#b *d"]) -> Control:
    """Fix the clean sample to `x_known` where `mask` is True: x0 replaced in every prediction (tokens: a sure logit).

    The other positions see the known ones through x_t alone (replacement method, Song et al. 2021 app. I.2).
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"the inpainting mask has dtype {mask.dtype}; give bool, True where x_known holds")
    return _Inpainted(model, x_known, mask)


def _mix(parts: Sequence[tuple[Tensor, Scalar]]) -> Float[Tensor, "*d"]:
    """Weighted sum."""
    value, weight = parts[0]
    total = weight * value
    for value, weight in parts[1:]:
        total = total + weight * value if isinstance(weight, Tensor) else torch.add(total, value, alpha=weight)
    return total
