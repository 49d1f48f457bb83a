"""Convolutions over a few positions of one or two items, as matrix products: what a robot's control loop needs.

With so few positions a convolution does little arithmetic and mostly reads its weights; torch's CPU convolution of one
item takes three to four times as long as the matrix product below (measured: 256 → 256 channels, kernel 5, 4 positions,
one thread of an EPYC: 345 µs against 90 µs).  Same numbers to rounding.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

#: items up to which the products are faster (measured as above)
FEW = 2


def pays(x: Tensor) -> bool:
    """Whether the functions of this module are the faster ones for x [b c h]: few items, on the CPU, no gradients."""
    return len(x) <= FEW and x.device.type == "cpu" and not torch.is_grad_enabled()


def convolve(x: Float[Tensor, "b i h"], layer: nn.Conv1d) -> Float[Tensor, "b o g"]:
    """Return layer(x) of a convolution without dilation and groups."""
    b, i, h = x.shape
    (kernel,), (stride,), padding = layer.kernel_size, layer.stride, layer.padding[0]
    assert isinstance(padding, int)
    padded = F.pad(x, (padding, padding)) if padding else x.contiguous()
    length = h + 2 * padding
    count = (length - kernel) // stride + 1
    windows = padded.as_strided((b, count, i, kernel), (i * length, stride, length, 1)).reshape(b, count, -1)
    return F.linear(windows, layer.weight.view(layer.out_channels, -1), layer.bias).transpose(1, 2)


def double(x: Float[Tensor, "b i h"], layer: nn.ConvTranspose1d) -> Float[Tensor, "b o h2"]:
    """Return layer(x) of a transposed convolution with kernel 4, stride 2 and padding 1.

    Output 2n takes inputs n (weight 1) and n − 1 (weight 3), output 2n + 1 inputs n (weight 2) and n + 1 (weight 0).
    """
    b, i, h = x.shape
    parts = F.linear(x.transpose(1, 2), layer.weight.view(i, -1).t()).view(b, h, -1, 4)
    out = parts[..., 1:3].clone()
    out[:, 1:, :, 0] += parts[:, :-1, :, 3]
    out[:, :-1, :, 1] += parts[:, 1:, :, 0]
    assert layer.bias is not None
    return out.permute(0, 2, 1, 3).reshape(b, -1, 2 * h).add_(layer.bias[:, None])
