"""Small pictures for people: PNG files of one image or of a grid of images; and images made smaller."""

from __future__ import annotations

import io
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError


def to_pil(image: Float[Tensor, "c h w"]) -> Any:
    """Return a PIL image (grey for one channel, RGB for three) of values in [0, 1]; values outside are clipped.

    Raises:
        UsageError: another number of channels.
    """
    from PIL import Image

    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise UsageError(f"an image has shape [1 h w] or [3 h w], not {list(image.shape)}.")
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).numpy())


def shrunk(images: Float[Tensor, "b c h w"], side: int) -> Float[Tensor, "b c s s"]:
    """Return images made smaller, smoothed against aliasing and differentiable; those of that side as they are.

    Raises:
        UsageError: they are not square, or smaller.
    """
    height, width = images.shape[-2:]
    if height != width or height < side:
        raise UsageError(f"images of {height}×{width} pixels cannot be brought to {side}×{side}; give larger squares.")
    if height == side:
        return images
    return torch.nn.functional.interpolate(
        images, (side, side), mode="bilinear", antialias=True, align_corners=False
    ).clamp(0, 1)


def png_grid(images: Float[Tensor, "n c h w"], columns: int, zoom: int = 4) -> bytes:
    """Return a PNG with the images row by row, each pixel `zoom` wide, one grey pixel between images.

    Args:
        images: values in [0, 1]; a last row that is not full is filled with grey.
        columns: images in a row, ≥ 1.
        zoom: ≥ 1.
    """
    n, c, h, w = images.shape
    rows = -(-n // columns)
    cells = torch.full((rows * columns, c, h * zoom + 1, w * zoom + 1), 0.5)
    cells[:n, :, :-1, :-1] = images.detach().float().cpu().repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    sheet = cells.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    buffer = io.BytesIO()
    to_pil(sheet).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
