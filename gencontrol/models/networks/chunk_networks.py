"""Networks of action chunks: what they share, a perceptron and the transformer under that interface.

A chunk network is called as `network(x [b h A], t [b], cond [b c])`, like any Denoiser's network.  A sampler asks the
same network at known times under one condition, so all that depends on (t, cond) alone is computed once per chunk by
`plan` and the loop calls `planned`; both give the numbers of the plain call to rounding (tested).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gencontrol.models.networks.transformer import Transformer, TransformerConfig
from gencontrol.process.schedule import Schedule

#: log-SNR features are taken within ± this (ours: the 100 levels of squaredcos_cap_v2 lie in −15.2 … 7.4)
LOGSNR_LIMIT = 12.0


class ChunkNetwork(nn.Module):
    """Base of chunk networks; the default plan holds times and condition, which is right for every network.

    Args:
        horizon, action_dim: shape of a chunk.
        cond_dim: channels of the condition.
    """

    def __init__(self, horizon: int, action_dim: int, cond_dim: int) -> None:
        super().__init__()
        self.horizon, self.action_dim, self.cond_dim = horizon, action_dim, cond_dim

    def plan(self, times: Float[Tensor, " k"], cond: Float[Tensor, "b c"]) -> Sequence[Any]:
        """Return one entry per time with everything that depends on time and condition alone."""
        return [(t.expand(len(cond)), cond) for t in times]

    def planned(self, x: Float[Tensor, "b h a"], entry: Any) -> Float[Tensor, "b h a"]:
        """Return the output at the time and condition of an entry of `plan`."""
        output: Tensor = self(x, *entry)
        return output


def logsnr_features(logsnr: Float[Tensor, " b"]) -> Float[Tensor, "b 9"]:
    """Return smooth features of a log-SNR: λ = logsnr/12 kept in [−1, 1], and sin, cos of π·2^k·λ/2 for k = 0 … 3."""
    unit = (logsnr / LOGSNR_LIMIT).clamp(-1.0, 1.0)[:, None]
    angles = unit * (torch.pi / 2) * torch.tensor([1.0, 2.0, 4.0, 8.0], device=unit.device, dtype=unit.dtype)
    return torch.cat([unit, angles.sin(), angles.cos()], dim=1)


class ChunkMlp(ChunkNetwork):
    """Perceptron on (noised chunk, log-SNR features, condition): the network of docs/methods/gpc.md#part-b (3 × 256,
    SiLU).

    Args:
        schedule: of the process, which turns times into log-SNR.
        width, depth: of the hidden layers.
    """

    def __init__(
        self, horizon: int, action_dim: int, cond_dim: int, schedule: Schedule, width: int = 256, depth: int = 3
    ) -> None:
        super().__init__(horizon, action_dim, cond_dim)
        self.schedule = schedule
        size = horizon * action_dim
        self.enter = nn.Linear(size + 9 + cond_dim, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.leave = nn.Linear(width, size)

    def forward(
        self, x: Float[Tensor, "b h a"], t: Float[Tensor, " b"], cond: Float[Tensor, "b c"]
    ) -> Float[Tensor, "b h a"]:
        """Return the output."""
        features = logsnr_features(self.schedule.logsnr(t)).to(x.dtype)
        return self._rest(self.enter(torch.cat([x.flatten(1), features, cond], dim=1)))

    def plan(self, times: Float[Tensor, " k"], cond: Float[Tensor, "b c"]) -> Sequence[Any]:
        """Return the first layer's share of times and condition, one [b width] each."""
        size = self.horizon * self.action_dim
        weight = self.enter.weight
        at = F.linear(logsnr_features(self.schedule.logsnr(times)).to(cond.dtype), weight[:, size : size + 9])
        given = F.linear(cond, weight[:, size + 9 :], self.enter.bias)
        return list((at[:, None] + given).unbind(0))

    def planned(self, x: Float[Tensor, "b h a"], entry: Any) -> Float[Tensor, "b h a"]:
        """Return the output at an entry of `plan`."""
        size = self.horizon * self.action_dim
        return self._rest(torch.addmm(entry, x.reshape(-1, size), self.enter.weight[:, :size].t()))

    def _rest(self, h: Float[Tensor, "b w"]) -> Float[Tensor, "b h a"]:
        for layer in self.hidden:
            h = layer(F.silu(h))
        return self.leave(F.silu(h)).view(-1, self.horizon, self.action_dim)


class ChunkTransformer(ChunkNetwork):
    """The backbone of `models.networks.transformer`, one token per action, the condition as its pooled vector.

    Args:
        width: a multiple of 32, which is the size of a head.
        depth: blocks.
    """

    def __init__(self, horizon: int, action_dim: int, cond_dim: int, width: int = 128, depth: int = 4) -> None:
        super().__init__(horizon, action_dim, cond_dim)
        if width % 32:
            raise ValueError(f"width {width} of a transformer is no multiple of 32, the size of its heads")
        self.backbone = Transformer(
            TransformerConfig(
                in_dim=action_dim,
                out_dim=action_dim,
                dim=width,
                depth=depth,
                heads=width // 32,
                pooled_dim=cond_dim,
                max_tokens=horizon,
            )
        )

    def forward(
        self, x: Float[Tensor, "b h a"], t: Float[Tensor, " b"], cond: Float[Tensor, "b c"]
    ) -> Float[Tensor, "b h a"]:
        """Return the output."""
        return self.backbone(x, t, {"pooled": cond})
