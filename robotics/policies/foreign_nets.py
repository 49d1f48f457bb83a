"""Networks of other diffusion policies, rebuilt with their parameter names, so that weights load as they are.

`ConditionalUnet1d` is the U-Net of Diffusion Policy (Chi et al. 2023) as LeRobot 0.4 and robomimic have it (FOUND: both
sources read; LeRobot's output reproduced in tests/robotics/policies): Mish, FiLM after the first
convolution of a block, skips taken before the halving and joined before the doubling.  `RgbEncoder` is LeRobot's:
ResNet-18 or -34 with GroupNorm, spatial softmax, a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gencontrol.errors import UsageError


class _Positions(nn.Module):
    """Sinusoidal features of a time index."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        half = self.dim // 2
        rates = torch.exp(torch.arange(half, device=t.device) * -(math.log(10000) / (half - 1)))
        angles = t[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class _ConvBlock(nn.Module):
    """Convolution, GroupNorm, Mish."""

    def __init__(self, channels_in: int, channels: int, kernel: int, groups: int) -> None:
        super().__init__()
        conv = nn.Conv1d(channels_in, channels, kernel, padding=kernel // 2)
        self.block = nn.Sequential(conv, nn.GroupNorm(groups, channels), nn.Mish())

    def forward(self, x: Float[Tensor, "b i h"]) -> Float[Tensor, "b c h"]:
        found: Tensor = self.block(x)
        return found


class _FilmBlock(nn.Module):
    """Two such blocks with FiLM between them (shift, and scale where `scaled`), and a residual connection."""

    def __init__(
        self, channels_in: int, channels: int, cond_dim: int, kernel: int, groups: int, *, scaled: bool
    ) -> None:
        super().__init__()
        self.scaled = scaled
        self.conv1 = _ConvBlock(channels_in, channels, kernel, groups)
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(cond_dim, channels * (2 if scaled else 1)))
        self.conv2 = _ConvBlock(channels, channels, kernel, groups)
        self.residual_conv = nn.Conv1d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Float[Tensor, "b i h"], cond: Float[Tensor, "b c"]) -> Float[Tensor, "b c h"]:
        out, film = self.conv1(x), self.cond_encoder(cond)[..., None]
        if self.scaled:
            scale, shift = film.chunk(2, dim=1)
            out = scale * out + shift
        else:
            out = out + film
        return self.conv2(out) + self.residual_conv(x)


class ConditionalUnet1d(nn.Module):
    """The U-Net of Diffusion Policy.

    Args:
        action_dim: numbers of an action.
        cond_dim: numbers of the encoded history.
        down_dims: channels of the levels; the horizon must be a multiple of 2^levels.
        kernel, groups: of the convolutions and norms.
        step_dim: of the time embedding.
        scaled: whether FiLM has a scale.
    """

    def __init__(
        self,
        action_dim: int,
        cond_dim: int,
        down_dims: Sequence[int],
        kernel: int = 5,
        groups: int = 8,
        step_dim: int = 128,
        *,
        scaled: bool = True,
    ) -> None:
        super().__init__()
        self.diffusion_step_encoder = nn.Sequential(
            _Positions(step_dim), nn.Linear(step_dim, step_dim * 4), nn.Mish(), nn.Linear(step_dim * 4, step_dim)
        )
        total, dims = step_dim + cond_dim, [action_dim, *down_dims]

        def block(before: int, after: int) -> _FilmBlock:
            return _FilmBlock(before, after, total, kernel, groups, scaled=scaled)

        self.down_modules, self.up_modules = nn.ModuleList(), nn.ModuleList()
        for level, (before, after) in enumerate(zip(dims, dims[1:])):
            shrink = nn.Conv1d(after, after, 3, 2, 1) if level < len(down_dims) - 1 else nn.Identity()
            self.down_modules.append(nn.ModuleList([block(before, after), block(after, after), shrink]))
        self.mid_modules = nn.ModuleList([block(dims[-1], dims[-1]), block(dims[-1], dims[-1])])
        for after, before in reversed(list(zip(dims[1:], dims[2:]))):
            grow = nn.ConvTranspose1d(after, after, 4, 2, 1)
            self.up_modules.append(nn.ModuleList([block(before * 2, after), block(after, after), grow]))
        last = _ConvBlock(down_dims[0], down_dims[0], kernel, 8)
        self.final_conv = nn.Sequential(last, nn.Conv1d(down_dims[0], action_dim, 1))

    def forward(
        self, x: Float[Tensor, "b h a"], index: Float[Tensor, " b"], cond: Float[Tensor, "b c"]
    ) -> Float[Tensor, "b h a"]:
        """Return the output at the noise level `index`."""
        h, kept = x.transpose(1, 2), []
        feature = torch.cat([self.diffusion_step_encoder(index.to(x.dtype)), cond], dim=-1)
        down: Any = self.down_modules  # ModuleLists of three
        up: Any = self.up_modules
        for first, second, shrink in down:
            h = second(first(h, feature), feature)
            kept.append(h)
            h = shrink(h)
        for block in self.mid_modules:
            h = block(h, feature)
        for first, second, grow in up:
            h = grow(second(first(torch.cat([h, kept.pop()], dim=1), feature), feature))
        out: Tensor = self.final_conv(h)
        return out.transpose(1, 2)


class _BasicBlock(nn.Module):
    """ResNet's block of two 3×3 convolutions."""

    def __init__(self, channels_in: int, channels: int, stride: int, *, group_norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = _norm(channels, group_norm=group_norm)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = _norm(channels, group_norm=group_norm)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            skip = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(skip, _norm(channels, group_norm=group_norm))

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b c h2 w2"]:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


def _norm(channels: int, *, group_norm: bool) -> nn.Module:
    return nn.GroupNorm(channels // 16, channels) if group_norm else nn.BatchNorm2d(channels)


RESNETS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}


class _Keypoints(nn.Module):
    """Expected places of feature maps (spatial softmax)."""

    pos_grid: Tensor

    def __init__(self, channels: int, size: tuple[int, int], count: int) -> None:
        super().__init__()
        self.nets = nn.Conv2d(channels, count, 1)
        self.register_buffer("pos_grid", torch.zeros(size[0] * size[1], 2))

    def forward(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k2"]:
        weights = self.nets(maps).flatten(2).softmax(-1)
        return (weights @ self.pos_grid).flatten(1)


class RgbEncoder(nn.Module):
    """LeRobot's image encoder of diffusion policies, at evaluation (resize, crop of the middle).

    Args:
        backbone: "resnet18" or "resnet34".
        image: (channels, height, width).
        resize, crop: (height, width) or None.
        keypoints: of the spatial softmax.
        group_norm: instead of BatchNorm.

    Raises:
        UsageError: another backbone.
    """

    def __init__(
        self,
        backbone: str,
        image: tuple[int, int, int],
        resize: tuple[int, int] | None,
        crop: tuple[int, int] | None,
        keypoints: int,
        *,
        group_norm: bool,
    ) -> None:
        super().__init__()
        if backbone not in RESNETS:
            raise UsageError(f"vision backbone '{backbone}' has no adapter; known: {', '.join(RESNETS)}.")
        self.resize, self.crop = resize, crop
        # ResNet without its pool and classifier, numbered as torchvision's children
        stem = nn.Conv2d(image[0], 64, 7, 2, 3, bias=False)
        layers: list[nn.Module] = [stem, _norm(64, group_norm=group_norm), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        for level, count in enumerate(RESNETS[backbone]):
            before, after = 64 * 2 ** max(level - 1, 0), 64 * 2**level
            parts = [_BasicBlock(before, after, 1 if level == 0 else 2, group_norm=group_norm)]
            parts += [_BasicBlock(after, after, 1, group_norm=group_norm) for _ in range(count - 1)]
            layers.append(nn.Sequential(*parts))
        self.backbone = nn.Sequential(*layers)
        height, width = crop or resize or image[1:]
        for _ in range(5):  # five halvings, rounded up
            height, width = (height + 1) // 2, (width + 1) // 2
        self.pool = _Keypoints(512, (height, width), keypoints)
        self.out = nn.Linear(keypoints * 2, keypoints * 2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Return features of normalised images."""
        if self.resize is not None:
            x = F.interpolate(x, size=self.resize, mode="bilinear", align_corners=False, antialias=True)
        if self.crop is not None:
            top, left = (round((have - want) / 2.0) for have, want in zip(x.shape[-2:], self.crop, strict=True))
            x = x[..., top : top + self.crop[0], left : left + self.crop[1]]
        return F.relu(self.out(self.pool(self.backbone(x))))
