"""Size of a picture as a JPEG: `compressibility` −kB and `incompressibility` +kB (DDPO, arXiv 2305.13301)."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.rewards.base import checked
from gencontrol.rewards.inputs import image_batch
from gencontrol.types import RewardContext, RewardOut


def jpeg_kilobytes(images: Float[Tensor, "b 3 h w"], quality: int = 95) -> Float[Tensor, " b"]:
    """Thousands of bytes of each image in [0, 1] as a JPEG by Pillow; float32 on the CPU."""
    from PIL import Image

    pixels = (images.detach().cpu() * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1)
    sizes = []
    for array in np.asarray(pixels):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, format="JPEG", quality=quality)
        sizes.append(buffer.tell() / 1000.0)
    return torch.tensor(sizes, dtype=torch.float32)


class _JpegSize:
    """Item reward sign · kB; JPEG has no gradient."""

    kind: Literal["item", "set"] = "item"
    differentiable = False
    name: str
    sign: float

    def __call__(self, samples: Float[Tensor, "b 3 h w"], context: RewardContext) -> RewardOut:
        """Signed size per image.

        Raises:
            UsageError: no images in [0, 1].
        """
        images, finite = image_batch(samples, self.name)
        values = self.sign * jpeg_kilobytes(images)
        return checked(self.name, values.to(images.device), len(images), finite)


class Compressibility(_JpegSize):
    """`compressibility`: −kB; smooth pictures score high."""

    title = "minus the size of the image as JPEG"
    paper = "arXiv:2305.13301"
    medium = "image"
    name = "compressibility"
    sign = -1.0


class Incompressibility(_JpegSize):
    """`incompressibility`: +kB; busy pictures score high."""

    title = "size of the image as JPEG"
    paper = "arXiv:2305.13301"
    medium = "image"
    name = "incompressibility"
    sign = 1.0
