"""Small networks of a residual control: (x_t, estimate of x0, t, embedded labels) → a push of x_t's shape.

The last layer starts at zero, so a new control changes nothing (ControlNet's zero convolutions do the same for a copy
of an encoder).  Vectors and very small images get an MLP (docs/methods/ctrl.md#e-ctrl-1 and
docs/methods/ctrl.md#e-ctrl-2), images a convolutional one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gencontrol.errors import UsageError
from gencontrol.models.networks.layers import time_embedding

#: the largest number of values in a sample that the MLP takes; above it the control is convolutional (ours)
MLP_VALUES = 256


class MlpControl(nn.Module):
    """`depth` hidden SiLU layers over everything flattened; a layer that starts at zero writes the push."""

    frequencies: Tensor

    def __init__(self, shape: Sequence[int], embed: int, width: int, depth: int) -> None:
        super().__init__()
        values = math.prod(shape)
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(-1, 4), persistent=False)
        sizes = [2 * values + embed + 2 * len(self.frequencies), *[width] * depth]
        layers: list[nn.Module] = []
        for inside, outside in zip(sizes, sizes[1:]):
            layers += [nn.Linear(inside, outside), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.out = nn.Linear(width, values)
        _zero(self.out)

    def forward(
        self, x: Float[Tensor, "b *d"], x0: Float[Tensor, "b *d"], t: Float[Tensor, " b"], y: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b *d"]:
        """Return the push."""
        angles = t[:, None].to(x.dtype) * self.frequencies.to(x.dtype)
        parts = [x.flatten(1), x0.flatten(1), angles.sin(), angles.cos(), y.to(x.dtype)]
        return self.out(self.body(torch.cat(parts, dim=1))).view_as(x)


class _Block(nn.Module):
    """Residual convolutions, scaled and shifted by the label and time vector."""

    def __init__(self, width: int, vector: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width, affine=False)
        self.film = nn.Linear(vector, 2 * width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, h: Float[Tensor, "b w r c"], vector: Float[Tensor, "b v"]) -> Float[Tensor, "b w r c"]:
        scale, shift = self.film(vector)[..., None, None].chunk(2, dim=1)
        h2 = self.first(nn.functional.silu(self.norm(h) * (1 + scale) + shift))
        return h + self.second(nn.functional.silu(h2))


class ConvControl(nn.Module):
    """A two-level convolutional network for latents and images [c h w] with even sides."""

    def __init__(self, shape: Sequence[int], embed: int, width: int, depth: int) -> None:
        super().__init__()
        channels, self.frequency = shape[0], 64
        vector = 4 * width
        self.vector = nn.Sequential(nn.Linear(embed + self.frequency, vector), nn.SiLU(), nn.Linear(vector, vector))
        self.enter = nn.Conv2d(2 * channels, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.low = nn.ModuleList(_Block(width, vector) for _ in range(depth))
        self.high = nn.ModuleList(_Block(width, vector) for _ in range(2))
        self.out = nn.Conv2d(width, channels, 3, padding=1)
        _zero(self.out)

    def forward(
        self,
        x: Float[Tensor, "b c r s"],
        x0: Float[Tensor, "b c r s"],
        t: Float[Tensor, " b"],
        y: Float[Tensor, "b e"],
    ) -> Float[Tensor, "b c r s"]:
        """Return the push."""
        times = time_embedding(t.float(), self.frequency).to(x.dtype)
        vector = nn.functional.silu(self.vector(torch.cat([times, y.to(x.dtype)], dim=1)))
        h = self.high[0](self.enter(torch.cat([x, x0], dim=1)), vector)
        low = self.down(h)
        for block in self.low:
            low = block(low, vector)
        h = h + nn.functional.interpolate(low, size=h.shape[-2:], mode="nearest")
        return self.out(nn.functional.silu(self.high[1](h, vector)))


class HalvedControl(nn.Module):
    """A control at half the resolution: blocks of 2 × 2 pixels become channels, and the push is put back (ours).

    A control of the same width costs a quarter.
    """

    def __init__(self, shape: Sequence[int], embed: int, width: int, depth: int) -> None:
        super().__init__()
        channels, height, side = shape
        self.inner = ConvControl((4 * channels, height // 2, side // 2), embed, width, depth)

    def forward(
        self,
        x: Float[Tensor, "b c r s"],
        x0: Float[Tensor, "b c r s"],
        t: Float[Tensor, " b"],
        y: Float[Tensor, "b e"],
    ) -> Float[Tensor, "b c r s"]:
        """Return the push."""
        folded = [nn.functional.pixel_unshuffle(part, 2) for part in (x, x0)]
        return nn.functional.pixel_shuffle(self.inner(*folded, t, y), 2)


def _zero(layer: nn.Linear | nn.Conv2d) -> None:
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


def control_net(
    shape: Sequence[int], embed: int, width: int, depth: int, *, half: bool = False
) -> MlpControl | ConvControl | HalvedControl:
    """Return the control that fits samples of this shape; weights are drawn from torch's global generator.

    Raises:
        UsageError: `half`, and no image whose sides are multiples of 4.
    """
    image = len(shape) == 3 and math.prod(shape) > MLP_VALUES
    if half:
        if not image or shape[1] % 4 or shape[2] % 4:
            raise UsageError(
                f"a control at half resolution takes images of more than {MLP_VALUES} values with sides that are "
                f"multiples of 4, not {list(shape)}."
            )
        return HalvedControl(shape, embed, width, depth)
    return ConvControl(shape, embed, width, depth) if image else MlpControl(shape, embed, width, depth)
