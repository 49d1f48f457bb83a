"""A U-Net over the time axis of action chunks, conditioned by FiLM: the network of Diffusion Policy (Chi et al. 2023).

Levels of two residual blocks (convolution, GroupNorm, SiLU), halved and doubled along the chunk.  Differences (ours):
SiLU instead of Mish, and the FiLM layers of all blocks are one matrix, so that a sampler computes all of them for all
its times in two products per chunk (`plan`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gencontrol.models.networks.chunk_networks import ChunkNetwork
from gencontrol.models.networks.layers import time_embedding
from gencontrol.models.networks.small_conv import convolve, double, pays

#: (x, layer) → layer(x)
Conv = Callable[[Tensor, Any], Tensor]


def _plain(x: Tensor, layer: nn.Module) -> Tensor:
    """The layer itself."""
    result: Tensor = layer(x)
    return result


class FilmBlock(nn.Module):
    """Two convolutions with a scale and shift between them, and a residual connection."""

    def __init__(self, channels_in: int, channels: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(channels_in, channels, kernel, padding=kernel // 2)
        self.first_norm = nn.GroupNorm(groups, channels)
        self.second = nn.Conv1d(channels, channels, kernel, padding=kernel // 2)
        self.second_norm = nn.GroupNorm(groups, channels)
        self.skip = nn.Conv1d(channels_in, channels, 1) if channels_in != channels else None

    def forward(
        self, x: Float[Tensor, "b i h"], scale: Float[Tensor, "b c 1"], shift: Float[Tensor, "b c 1"], conv: Conv
    ) -> Float[Tensor, "b c h"]:
        """Return the block's output; `scale` multiplies (1 is nothing) and `shift` is added."""
        h = torch.addcmul(shift, F.silu(self.first_norm(conv(x, self.first))), scale)
        h = F.silu(self.second_norm(conv(h, self.second)))
        return h + (x if self.skip is None else conv(x, self.skip))


class ChunkUnet(ChunkNetwork):
    """Chunk U-Net; about 4 million parameters at the defaults.

    Args:
        width: channels of the first level, a multiple of 8; doubled at each further level.
        depth: levels; the horizon must be a multiple of 2^(depth − 1).
        time_dim: channels of the time embedding.
        kernel: of the convolutions, odd.
    """

    def __init__(
        self,
        horizon: int,
        action_dim: int,
        cond_dim: int,
        width: int = 64,
        depth: int = 3,
        time_dim: int = 128,
        kernel: int = 5,
    ) -> None:
        super().__init__(horizon, action_dim, cond_dim)
        if horizon % 2 ** (depth - 1):
            raise ValueError(
                f"horizon {horizon} is no multiple of {2 ** (depth - 1)}, which a U-Net of {depth} levels needs"
            )
        if width % 8:
            raise ValueError(f"width {width} of a U-Net is no multiple of 8, its number of norm groups")
        self.time_dim = time_dim
        sizes = [width * 2**level for level in range(depth)]
        self.time = nn.Sequential(nn.Linear(time_dim, 4 * time_dim), nn.SiLU(), nn.Linear(4 * time_dim, time_dim))
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        channels = action_dim
        for level, size in enumerate(sizes):
            self.down.extend([FilmBlock(channels, size, kernel, 8), FilmBlock(size, size, kernel, 8)])
            if level < depth - 1:
                self.shrink.append(nn.Conv1d(size, size, 3, stride=2, padding=1))
            channels = size
        self.middle = nn.ModuleList(FilmBlock(channels, channels, kernel, 8) for _ in range(2))
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for size in sizes[-2::-1]:
            self.grow.append(nn.ConvTranspose1d(channels, channels, 4, stride=2, padding=1))
            self.up.extend([FilmBlock(channels + size, size, kernel, 8), FilmBlock(size, size, kernel, 8)])
            channels = size
        blocks = [*self.down, *self.middle, *self.up]
        self.outputs = [block.second.out_channels for block in blocks]
        self.film = nn.Linear(time_dim + cond_dim, 2 * sum(self.outputs))
        self.last = nn.Conv1d(channels, channels, kernel, padding=kernel // 2)
        self.last_norm = nn.GroupNorm(8, channels)
        self.leave = nn.Conv1d(channels, action_dim, 1)

    def forward(
        self, x: Float[Tensor, "b h a"], t: Float[Tensor, " b"], cond: Float[Tensor, "b c"]
    ) -> Float[Tensor, "b h a"]:
        """Return the output."""
        embedded = self.time(time_embedding(t, self.time_dim).to(x.dtype))
        film = self._split(self.film(F.silu(torch.cat([embedded, cond], dim=1))))
        return self._body(x, film, (_plain, _plain))

    def plan(self, times: Float[Tensor, " k"], cond: Float[Tensor, "b c"]) -> Sequence[Any]:
        """Return the scales and shifts of all blocks at each time."""
        embedded = self.time(time_embedding(times, self.time_dim).to(cond.dtype))
        weight = self.film.weight
        at = F.linear(F.silu(embedded), weight[:, : self.time_dim])
        given = F.linear(F.silu(cond), weight[:, self.time_dim :], self.film.bias)
        return [self._split(at[k] + given) for k in range(len(times))]

    def _split(self, film: Float[Tensor, "b f"]) -> list[tuple[Tensor, Tensor]]:
        """Cut the FiLM output into (scale, shift) [b c 1] of each block; a scale is 1 + its output."""
        scales, shifts = film[..., None].chunk(2, dim=1)
        return list(zip((scales + 1.0).split(self.outputs, 1), shifts.split(self.outputs, 1), strict=True))

    def planned(self, x: Float[Tensor, "b h a"], entry: Any) -> Float[Tensor, "b h a"]:
        """Return the output at an entry of `plan`; for one observation on the CPU by matrix products."""
        return self._body(x, entry, (convolve, double) if pays(x) else (_plain, _plain))

    def _body(self, x: Float[Tensor, "b h a"], entry: Any, kernels: tuple[Conv, Conv]) -> Float[Tensor, "b h a"]:
        """Run all blocks with these kernels for convolutions and doublings."""
        conv, grow = kernels
        h, films, kept = x.transpose(1, 2), iter(entry), []
        for index, block in enumerate(self.down):
            h = block(h, *next(films), conv)
            if index % 2 and index // 2 < len(self.shrink):
                kept.append(h)
                h = conv(h, self.shrink[index // 2])
        for block in self.middle:
            h = block(h, *next(films), conv)
        for index, block in enumerate(self.up):
            if index % 2 == 0:
                h = torch.cat([grow(h, self.grow[index // 2]), kept.pop()], dim=1)
            h = block(h, *next(films), conv)
        return conv(F.silu(self.last_norm(conv(h, self.last))), self.leave).transpose(1, 2)
