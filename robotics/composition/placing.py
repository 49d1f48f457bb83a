"""A parent inside a composition: its window of the composed chunk, and its action space against the reference's.

x0_i = r·x0 + c per dimension, with r = g_ref/g_i and c = (b_ref − b_i)/g_i for normalisers x = (a − b)/g.  A shift
alone (r = 1) is exact: x_t moves by a·c and eps stays.  A scale changes the signal-to-noise ratio of a dimension by r,
which no time can undo; what `Placed` does then is an approximation (docs/methods/gpc.md#action-spaces, derived).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from gencontrol.data.normalize import Normalizer
from gencontrol.errors import UsageError
from gencontrol.models.denoiser import Pred
from gencontrol.process.gaussian import GaussianProcess, Time
from gencontrol.process.schedule import Scalar
from gencontrol.robotics.policies.denoising import ParentModel
from gencontrol.sampling.guidance import Control
from gencontrol.types import Cond, Prediction

#: Largest |log(g1/g2)| that counts as the same scale (docs/methods/gpc.md#action-spaces).
SCALE_TOLERANCE = 1e-3


class Placed(Control):
    """A parent's denoiser as a model of the composed chunk; outside its window it predicts v = 0, for a weight of 0.

    Args:
        model: of chunks [b stop−start A] in the parent's action space.
        window: (start, stop) in the composed chunk.
        ratio, offset: r and c [A].
    """

    process: GaussianProcess
    ratio: Tensor
    offset: Tensor

    def __init__(self, model: Any, window: tuple[int, int], ratio: Tensor, offset: Tensor) -> None:
        super().__init__(model.process)
        self.model, self.window = model, window
        self.register_buffer("ratio", ratio, persistent=False)
        self.register_buffer("offset", offset, persistent=False)

    def forward(self, xt: Tensor, t: Time, cond: Cond = None) -> Pred:
        """Predict for the whole chunk, in the reference's action space."""
        part = xt[:, self.window[0] : self.window[1]]
        offset, ratio = self.offset.to(part), self.ratio.to(part)
        pred = self.model(torch.addcmul(self.process.at(t, part).a * offset, ratio, part), t, cond)
        x0, c = (pred.x0 - offset) / ratio, pred.coeffs
        v = c.a * pred.eps - c.s * x0 if not self._same_scale else pred.v + c.s * offset
        if v.shape != xt.shape:
            whole = xt.new_zeros(xt.shape)
            whole[:, self.window[0] : self.window[1]] = v
            v = whole
        return Pred(v, xt, c, Prediction.V)

    @property
    def _same_scale(self) -> bool:
        return bool((self.ratio == 1).all())


def place(
    parents: Sequence[ParentModel],
    names: Sequence[str],
    reference: int,
    windows: Sequence[tuple[int, int]],
    length: int,
    *,
    allow_scale_mismatch: bool,
) -> list[Any]:
    """Return every parent's denoiser as a model of the composed chunk; untouched where nothing differs.

    Raises:
        UsageError: normaliser scales differ by more than 1e-3 in the logarithm, without leave.
    """
    target: Normalizer = parents[reference].action_normalizer
    models = []
    for parent, name, window in zip(parents, names, windows, strict=True):
        own: Normalizer = parent.action_normalizer
        logs = torch.log(target.scale.double() / own.scale.double())
        worst = int(logs.abs().argmax())
        if float(logs.abs()[worst]) > SCALE_TOLERANCE and not allow_scale_mismatch:
            raise UsageError(
                f"the action normalisers of '{names[reference]}' and '{name}' differ in scale: "
                f"|log(g1/g2)| = {float(logs.abs()[worst]):.3g} in dimension {worst} (limit {SCALE_TOLERANCE}); train "
                f"both with one normaliser, or pass allow_scale_mismatch=True for the approximate map in x0."
            )
        near = float(logs.abs()[worst]) <= SCALE_TOLERANCE
        ratio = torch.ones_like(logs) if near else logs.exp()
        offset = (target.shift.double() - own.shift.double()) / own.scale.double()
        if window == (0, length) and near and bool((offset == 0).all()):
            models.append(parent.denoiser)
        else:
            models.append(Placed(parent.denoiser, window, ratio.float(), offset.float()))
    return models


def covered(windows: Sequence[tuple[int, int]], length: int) -> Bool[Tensor, "m h"]:
    """Return which actions of the composed chunk every parent predicts."""
    index = torch.arange(length)
    return torch.stack([(index >= start) & (index < stop) for start, stop in windows])


def share_where_covered(weights: Sequence[Scalar], cover: Bool[Tensor, "m h"]) -> list[Scalar]:
    """Return weights per action of the chunk, shared among the parents that predict it.

    Where only parents of weight 0 do, they share it equally.
    """
    cells = cover[..., None].float()
    masked = [weight * cell for weight, cell in zip(weights, cells, strict=True)]
    total = torch.stack(torch.broadcast_tensors(*masked)).sum(0)
    even = cells / cells.sum(0)
    return [torch.where(total > 0, part / total.clamp_min(1e-30), own) for part, own in zip(masked, even, strict=True)]
