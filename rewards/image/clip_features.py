"""Image input of CLIP in batched torch: resize with antialias, crop, squash or pad, the model's own mean and deviation.

The processors of transformers and open_clip work on PIL images, one by one, rounded to eight bits and without a
gradient.  Here the same numbers (within the rounding, about 1/255 before normalisation) come from one differentiable
`interpolate`; its antialiased filters are Pillow's.  Values are clipped to [0, 1] after the resize, as eight bits do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from gencontrol.errors import UsageError

Resize = Literal["crop", "squash", "pad"]
RESIZES = ("crop", "squash", "pad")
_PIL_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers; torch has these two with antialias


@dataclass(frozen=True)
class ImagePrep:
    """How an image becomes the input of a vision tower; the defaults are OpenAI's CLIP.

    Args:
        height, width: of the input in pixels.
        shortest: the shorter edge after a resize for "crop"; None takes min(height, width).
        resize: "crop" keeps the aspect and cuts the centre, "squash" does not keep it, "pad" fits the longer edge and
            adds black.
        mean, std: per channel, of values in [0, 1].
        filter: "bicubic" or "bilinear".
    """

    height: int = 224
    width: int = 224
    shortest: int | None = None
    resize: Resize = "crop"
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    filter: str = "bicubic"

    def __post_init__(self) -> None:
        if self.resize not in RESIZES:
            raise UsageError(f"resize is {', '.join(RESIZES)}, not '{self.resize}'.")
        if self.filter not in _PIL_FILTERS.values():
            raise UsageError(f"images are resized by bicubic or bilinear filters, not '{self.filter}'.")
        if self.shortest is not None and self.shortest < max(self.height, self.width):
            raise UsageError(
                f"a processor that resizes to {self.shortest} and crops {self.height}×{self.width} needs padding, "
                "which is not supported; take another processor."
            )

    @staticmethod
    def from_mapping(table: Mapping[str, Any]) -> ImagePrep:
        """Read a `preprocessor_config.json` of transformers.

        Raises:
            UsageError: a filter other than bilinear and bicubic, or a processor without resize.
        """
        size, crop = _edges(table.get("size", 224)), _edges(table.get("crop_size", 224))
        if not table.get("do_resize", True) or table.get("resample", 3) not in _PIL_FILTERS:
            raise UsageError(
                f"the image processor has do_resize={table.get('do_resize')} and resample={table.get('resample')}; "
                "expected a resize by the bilinear (2) or bicubic (3) filter."
            )
        cut = table.get("do_center_crop", True)
        squash = len(size) == 2
        if squash and cut and crop * (2 // len(crop)) != size:
            raise UsageError(f"the image processor resizes to {size} and crops {crop}; expected one of the two.")
        box = (crop if cut else size) * (1 if len(crop if cut else size) == 2 else 2)
        return ImagePrep(
            height=box[0],
            width=box[1],
            shortest=None if squash else size[0],
            resize="squash" if squash else "crop",
            mean=tuple(table.get("image_mean", ImagePrep.mean)) if table.get("do_normalize", True) else (0.0,) * 3,
            std=tuple(table.get("image_std", ImagePrep.std)) if table.get("do_normalize", True) else (1.0,) * 3,
            filter=_PIL_FILTERS[table.get("resample", 3)],
        )

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 height width"]:
        """Normalised input of images in [0, 1], float32; differentiable."""
        with torch.autocast(images.device.type, enabled=False):
            fitted = self._fit(images.float())
            mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (self.mean, self.std))
            return (fitted - mean) / std

    def _fit(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 height width"]:
        """Bring images to the input's size."""
        old_h, old_w = images.shape[-2:]
        if self.resize == "squash":
            return self._scaled(images, self.height, self.width)
        if self.resize == "crop":
            short = self.shortest or max(self.height, self.width)
            long = int(short * max(old_h, old_w) / min(old_h, old_w))
            images = self._scaled(images, *((long, short) if old_h > old_w else (short, long)))
            top, left = (images.shape[-2] - self.height) // 2, (images.shape[-1] - self.width) // 2
            return images[..., top : top + self.height, left : left + self.width]
        factor = min(self.height / old_h, self.width / old_w)
        images = self._scaled(images, max(1, round(old_h * factor)), max(1, round(old_w * factor)))
        rows, columns = self.height - images.shape[-2], self.width - images.shape[-1]
        return F.pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))

    def _scaled(self, images: Float[Tensor, "b 3 h w"], height: int, width: int) -> Float[Tensor, "b 3 n m"]:
        """Resize and clip; an image of the right size is returned as it is."""
        if images.shape[-2:] == (height, width):
            return images
        resized = F.interpolate(images, (height, width), mode=self.filter, antialias=True, align_corners=False)
        return resized.clamp(0.0, 1.0)


def _edges(size: Any) -> list[int]:
    """[edge] of a shortest edge, [height, width] of a box."""
    if isinstance(size, int):
        return [size]
    if "shortest_edge" in size:
        return [int(size["shortest_edge"])]
    try:
        return [int(size["height"]), int(size["width"])]
    except KeyError as error:
        raise UsageError(
            f"the image processor has size {dict(size)}; expected shortest_edge, or height and width."
        ) from error
