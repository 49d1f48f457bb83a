"""A network becomes a posterior of the clean sample: Denoiser = network + process + prediction type.

The call returns a Pred, which is the network's output with its coordinates; x0, eps, v, velocity and score are computed
when asked for, by one 2x2 solve (`gencontrol.process.convert`).  Schedule algebra is float32 (float64 if x_t is), the
network runs in its own dtype.  Anything with `.process` and this call is a Model.
"""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gencontrol.process.convert import combine, convert, from_x0_eps, rows, solve
from gencontrol.process.gaussian import GaussianProcess, Time
from gencontrol.process.masked import MaskedProcess
from gencontrol.process.schedule import Coeffs, Scalar
from gencontrol.types import Cond, Grouped, Prediction

#: An EPS network is never asked below this log-SNR: x0 = (x - s·eps)/a needs a > 0 (ours; exp(-7) of float32's 1e-7).
EPS_LOGSNR_FLOOR = -14.0


class Pred:
    """A Gaussian model's prediction at (x_t, t) in any coordinates; immutable, each coordinate computed once.

    Args:
        raw: output in the coordinates `prediction`, [b *d].
        xt: the noisy sample it belongs to, [b *d].
        coeffs: schedule values that broadcast against x_t.
        prediction: coordinates of `raw`.
        sigma_data: for EDM coordinates.
    """

    __slots__ = ("_cache", "coeffs", "prediction", "raw", "sigma_data", "xt")

    def __init__(
        self, raw: Tensor, xt: Tensor, coeffs: Coeffs, prediction: Prediction, sigma_data: float = 0.5
    ) -> None:
        self.raw, self.xt, self.coeffs = raw, xt, coeffs
        self.prediction, self.sigma_data = prediction, sigma_data
        self._cache: dict[Prediction, Tensor] = {}

    def to(self, target: Prediction) -> Float[Tensor, "b *d"]:
        """Return the prediction in the coordinates `target`.

        Raises:
            ValueError: the system is singular here; the message names type, t and schedule.
        """
        if target == self.prediction:
            return self.raw
        if target not in self._cache:
            self._cache[target] = convert(self.raw, self.xt, self.coeffs, self.prediction, target, self.sigma_data)
        return self._cache[target]

    def mix(self, w0: Scalar, w1: Scalar) -> Float[Tensor, "b *d"]:
        """Return w0·x0 + w1·eps without computing either: every step of a sampler is such a row."""
        p, q = solve(rows(self.prediction, self.coeffs, self.sigma_data), (w0, w1), self.coeffs)
        return combine(p, self.xt, q, self.raw)

    @property
    def x0(self) -> Float[Tensor, "b *d"]:
        """Posterior mean of the clean sample."""
        return self.to(Prediction.X0)

    @property
    def eps(self) -> Float[Tensor, "b *d"]:
        """Posterior mean of the noise."""
        return self.to(Prediction.EPS)

    @property
    def v(self) -> Float[Tensor, "b *d"]:
        """a·eps - s·x0; defined at every t."""
        return self.to(Prediction.V)

    @property
    def velocity(self) -> Float[Tensor, "b *d"]:
        """dx/dt of the probability flow, da·x0 + ds·eps."""
        return self.to(Prediction.VELOCITY)

    @property
    def score(self) -> Float[Tensor, "b *d"]:
        """Gradient of log p_t(x_t), -eps/s.

        Raises:
            ValueError: s = 0.
        """
        s = self.coeffs.s
        if not isinstance(s, Tensor) and s == 0.0:
            raise ValueError(f"the score is infinite at t = {self.coeffs.t:g} of {self.coeffs.schedule} (s = 0)")
        return -self.eps / s

    def replace(self, raw: Tensor, prediction: Prediction | None = None) -> Pred:
        """Return a prediction at the same (x_t, t) with another output, by default in the same coordinates."""
        return Pred(raw, self.xt, self.coeffs, prediction or self.prediction, self.sigma_data)


class TokenPred:
    """A masked model's prediction: logits [b n V] of the clean token at every position."""

    __slots__ = ("logits", "xt")

    def __init__(self, logits: Tensor, xt: Tensor) -> None:
        self.logits, self.xt = logits, xt

    @property
    def raw(self) -> Float[Tensor, "b n v"]:
        """The logits, under the name that Pred has."""
        return self.logits

    @property
    def log_probs(self) -> Float[Tensor, "b n v"]:
        """Normalised logits in float32 (float64 if the logits are)."""
        wide = torch.promote_types(self.logits.dtype, torch.float32)
        return torch.log_softmax(self.logits.to(wide), dim=-1)

    def replace(self, logits: Tensor) -> TokenPred:
        """Return a prediction at the same state with other logits."""
        return TokenPred(logits, self.xt)


class TakesGroups(nn.Module):
    """Base of networks that take a `Grouped` condition as it is; others get it expanded."""

    def prepare(self, cond: Grouped) -> Grouped:
        """Return the condition with all that depends on it alone, under the present weights; valid for these alone."""
        raise NotImplementedError(f"{type(self).__name__}.prepare")  # abstract: only its networks know


class Model(Protocol):
    """What samplers, controls and algorithms need: a process and a call."""

    process: GaussianProcess | MaskedProcess

    def __call__(self, xt: Tensor, t: Time, cond: Cond = None) -> Pred | TokenPred:
        """Predict the clean sample from x_t [b *d] at t (float or [b]) under a condition of batch b."""
        ...


class Denoiser(nn.Module):
    """A network with the process it was trained for and the meaning of its output.

    The network is called as `network(xt, t, cond)` with t [b] in [0, 1] (float32, or float64 with x_t) and x_t in the
    network's own floating dtype; its output has x_t's shape, or is [b n V] logits for a MaskedProcess.  An EDM
    network gets x_t/sqrt(s² + a²·sigma_data²) (Karras' c_in).  An EPS network on a schedule that reaches a = 0 is read
    at the last time with log-SNR >= -14 instead (x_t unchanged), since eps says nothing about x0 at a = 0.

    Args:
        network: any module with that call.
        process: the noise law.
        prediction: coordinates of the output; None for a MaskedProcess.
        sigma_data: standard deviation of the data, used by EDM alone.
        eps_floor: the log-SNR below which an EPS network is not asked.  A table of discrete steps that were all trained
            (a robot policy's DDPM, whose x0 is clipped) may lower it to reproduce its first step exactly.
    """

    def __init__(
        self,
        network: nn.Module,
        process: GaussianProcess | MaskedProcess,
        prediction: Prediction | str | None = None,
        sigma_data: float = 0.5,
        eps_floor: float = EPS_LOGSNR_FLOOR,
    ) -> None:
        super().__init__()
        if (prediction is None) != isinstance(process, MaskedProcess):
            raise ValueError("a Gaussian process needs a prediction type and a MaskedProcess takes none (logits)")
        self.network = network
        self.process = process
        self.prediction = None if prediction is None else Prediction(prediction)
        self.sigma_data = sigma_data
        self._t_max = 1.0
        if self.prediction == Prediction.EPS and isinstance(process, GaussianProcess):
            if 2 * process.schedule.at(1.0).half_logsnr < eps_floor:
                self._t_max = process.schedule.time_at(eps_floor)

    @property
    def t_max(self) -> float:
        """The last time that the network is asked at; 1 unless `eps_floor` holds it back."""
        return self._t_max

    def forward(self, xt: Tensor, t: Time, cond: Cond = None) -> Pred | TokenPred:
        """Run the network at x_t [b *d] and t (float or [b])."""
        if isinstance(cond, Grouped) and not isinstance(self.network, TakesGroups):
            cond = cond.expand()
        if self.prediction is None or isinstance(self.process, MaskedProcess):
            return TokenPred(self.network(xt, self._times(xt, t, torch.float32), cond), xt)
        wide = torch.promote_types(xt.dtype, torch.float32)
        xt = xt if xt.dtype == wide else xt.to(wide)
        if self._t_max < 1.0:
            t = t.clamp(max=self._t_max) if isinstance(t, Tensor) else min(t, self._t_max)
        coeffs = self.process.at(t, xt)
        inputs = xt
        if self.prediction == Prediction.EDM:
            inputs = xt / (coeffs.s * coeffs.s + coeffs.a * coeffs.a * self.sigma_data**2) ** 0.5
        dtype = self._network_dtype(wide)
        raw = self.network(
            inputs if dtype == wide else inputs.to(dtype),
            self._times(xt, t, torch.promote_types(dtype, torch.float32)),
            cond,
        )
        return Pred(raw if raw.dtype == wide else raw.to(wide), xt, coeffs, self.prediction, self.sigma_data)

    def target(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """Return the regression target of the network's raw output for a clean sample and its noise, [b *d].

        Raises:
            ValueError: a MaskedProcess (the target is x0 itself).
        """
        if self.prediction is None or isinstance(self.process, MaskedProcess):
            raise ValueError("a masked model has no regression target; its target is the clean token")
        return from_x0_eps(x0, noise, self.process.at(t, x0), self.prediction, self.sigma_data)

    @staticmethod
    def _times(xt: Int[Tensor, "b *d"] | Float[Tensor, "b *d"], t: Time, dtype: torch.dtype) -> Float[Tensor, " b"]:
        """Return t as a [b] tensor on x_t's device; one time for all is expanded, which a network may make use of."""
        if isinstance(t, Tensor):
            return t.to(xt.device, dtype).expand(xt.shape[0])
        return torch.full((1,), t, device=xt.device, dtype=dtype).expand(xt.shape[0])

    def _network_dtype(self, default: torch.dtype) -> torch.dtype:
        """The dtype of the network's first floating parameter; `default` if it has none."""
        for parameter in self.network.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
        return default
