"""Small encoder of camera images for policies: a residual network with GroupNorm and spatial softmax.

As in Diffusion Policy (Chi et al. 2023, §3.2) norms are GroupNorm, so that moving averages of the weights are sound,
and the average pool is a spatial softmax (Levine et al. 2016, eq. 4): where each feature is, not how much of it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

_GROUPS = 8
_CHANNELS = (32, 64, 128)


class _Residual(nn.Module):
    """Two 3×3 convolutions that halve the picture, and a residual connection."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels, 3, stride=2, padding=1)
        self.first_norm = nn.GroupNorm(_GROUPS, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.second_norm = nn.GroupNorm(_GROUPS, channels)
        self.skip = nn.Conv2d(channels_in, channels, 1, stride=2)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Return the block's output."""
        h = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(h)) + self.skip(x))


def spatial_softmax(maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2"]:
    """Return the expected place (x, y) in [−1, 1] of each map's softmax, 2·c numbers."""
    h, w = maps.shape[-2:]
    weights = maps.flatten(2).softmax(-1).unflatten(-1, (h, w))
    across = torch.linspace(-1.0, 1.0, w, device=maps.device, dtype=maps.dtype)
    down = torch.linspace(-1.0, 1.0, h, device=maps.device, dtype=maps.dtype)
    return torch.cat([(weights.sum(2) * across).sum(-1), (weights.sum(3) * down).sum(-1)], dim=1)


def crop(
    images: UInt8[Tensor, "b n h w 3"], size: tuple[int, int], places: Float[Tensor, "b 2"] | None
) -> UInt8[Tensor, "b n s t 3"]:
    """Cut a window out of each item's images, the same one of its n images.

    Args:
        size: height and width of the window, at most those of the images.
        places: where its corner lies, in [0, 1) of the room that is left; None is the middle.
    """
    free = (images.shape[2] - size[0], images.shape[3] - size[1])
    if places is None:
        top, left = free[0] // 2, free[1] // 2
        return images[:, :, top : top + size[0], left : left + size[1]]
    room = torch.tensor(free, device=images.device) + 1
    corners = torch.minimum((places.to(images.device) * room).long(), room - 1)
    rows = corners[:, :1] + torch.arange(size[0], device=images.device)
    columns = corners[:, 1:] + torch.arange(size[1], device=images.device)
    item = torch.arange(len(images), device=images.device)[:, None, None]
    return images[item, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2, 4)


class ImageEncoder(nn.Module):
    """Images to features.

    Args:
        size: height and width that arrive, before the crop; at least 16.
        crop_share: side of the crop over the side of the image, in (0, 1].
        features: numbers that one image becomes.
    """

    def __init__(self, size: tuple[int, int], crop_share: float, features: int) -> None:
        super().__init__()
        if min(size) < 16:
            raise ValueError(f"images of {size[0]} × {size[1]} pixels are too small for the encoder; 16 is the least")
        self.window = (max(16, round(size[0] * crop_share)), max(16, round(size[1] * crop_share)))
        self.enter = nn.Conv2d(3, _CHANNELS[0], 5, stride=2, padding=2)
        self.enter_norm = nn.GroupNorm(_GROUPS, _CHANNELS[0])
        self.blocks = nn.ModuleList(_Residual(i, o) for i, o in zip(_CHANNELS, _CHANNELS[1:]))
        self.maps = nn.Conv2d(_CHANNELS[-1], 32, 1)
        self.leave = nn.Linear(64, features)

    def forward(
        self, images: UInt8[Tensor, "b n h w 3"], places: Float[Tensor, "b 2"] | None = None
    ) -> Float[Tensor, "b n f"]:
        """Return features of each image; `places` crops at random places (training), None in the middle."""
        b, n = images.shape[:2]
        dtype = self.leave.weight.dtype
        pixels = crop(images, self.window, places).flatten(0, 1).permute(0, 3, 1, 2).to(dtype) / 127.5 - 1.0
        h = F.relu(self.enter_norm(self.enter(pixels)))
        for block in self.blocks:
            h = block(h)
        return self.leave(spatial_softmax(self.maps(h))).unflatten(0, (b, n))
