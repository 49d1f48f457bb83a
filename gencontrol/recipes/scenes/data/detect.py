"""Exact analysis of scene images: objects with shape, colour, place and half-width, by colour geometry and templates.

A pixel of an object is ground + α·(paint − ground), so that its difference from the ground points towards the paint
whatever its coverage α.  Pixels with α above a threshold are grouped into connected parts (split where two colours
meet); each part's coverage is compared with rendered shapes over half-widths and sub-pixel places, and the best overlap
decides.  A part that fits no shape is an object of shape None: it is seen, and matches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from gencontrol.recipes.scenes.data.grammar import COLOURS, SHAPES
from gencontrol.recipes.scenes.data.render import SPLIT, coverage

#: coverage above which a pixel belongs to an object; parts of less area (pixels) are specks and ignored
THRESHOLD, SPECK = 0.4, 5.0
#: least overlap (soft intersection over union) with the best template of a part that has a shape
FIT = 0.70
#: half-widths of what can be an object, pixels
REACH = (2.0, 7.5)
_WINDOW = 17
_KERNEL = np.exp(-0.5 * (np.arange(3) / 0.8) ** 2)
_KERNEL = (_KERNEL / (_KERNEL[0] + 2 * _KERNEL[1:].sum())).astype(np.float32)
#: area of a shape over its squared half-width, and how far its centroid lies below its centre, in half-widths
_AREAS = np.array([np.pi, 3.24, 2.0, 2.26])
_DROP = np.array([0.0, 0.0, 1 / 3, 0.0])
_PAINTS = np.array(list(COLOURS.values()), np.float32) * 0.925  # the mean of BRIGHTNESS


@dataclass(frozen=True)
class Found:
    """One object of an image: centre (x, y) and half-width in pixels, overlap with its template in [0, 1]."""

    shape: str | None
    colour: str
    x: float
    y: float
    radius: float
    overlap: float

    @property
    def size(self) -> str:
        """ "small" or "large"."""
        return "small" if self.radius < SPLIT else "large"

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape or 'blot'}"


def paint_of(image: Float[np.ndarray, "3 s s"]) -> tuple[Float[np.ndarray, "s s"], Int[np.ndarray, "s s"]]:
    """Return the coverage of each pixel (about [0, 1]) and the number of the colour (in COLOURS) it leans to."""
    ground = np.median(image.reshape(3, -1), axis=1)
    towards = _PAINTS - ground
    lengths = np.linalg.norm(towards, axis=1)
    difference = image.reshape(3, -1).T - ground
    along = difference @ (towards / lengths[:, None]).T  # length of the projection on each colour's direction
    colour = along.argmax(1)
    alpha = along[np.arange(len(colour)), colour] / lengths[colour]
    side = image.shape[1:]
    return alpha.clip(0.0, 1.15).reshape(side), colour.reshape(side)


def _parts(alpha: np.ndarray, colour: np.ndarray) -> list[tuple[int, Bool[np.ndarray, "s s"]]]:
    """Connected parts as (colour, mask); a part of which a second colour holds a quarter is split by colour."""
    from scipy import ndimage

    labels, count = ndimage.label(alpha > THRESHOLD)
    parts = []
    for index in range(1, count + 1):
        mask = labels == index
        if alpha[mask].sum() < SPECK:
            continue
        votes = np.bincount(colour[mask], weights=alpha[mask], minlength=len(COLOURS))
        strong = np.flatnonzero(votes > 0.25 * votes.sum())
        if len(strong) < 2:
            parts.append((int(votes.argmax()), mask))
            continue
        for paint in strong:
            pieces, number = ndimage.label(mask & (colour == paint))
            parts += [(int(paint), pieces == k) for k in range(1, number + 1) if alpha[pieces == k].sum() >= SPECK]
    return parts


def _grid() -> tuple[np.ndarray, np.ndarray]:
    """Relative half-widths [k] and shifts (pixels) [k 2] of the templates."""
    shifts = np.array([(0.0, 0.0), (-0.4, 0.0), (0.4, 0.0), (0.0, -0.4), (0.0, 0.4)])
    scales = np.array([0.9, 1.0, 1.1])
    return np.repeat(scales, len(shifts)), np.tile(shifts, (len(scales), 1))


_SCALES, _SHIFTS = _grid()


def _fit(crop: Float[np.ndarray, "w w"]) -> tuple[int, float, float, float, float]:
    """Best (shape, x, y, half-width, overlap) of one part's coverage in its window."""
    area = float(crop.sum())
    grid = np.arange(len(crop))
    x, y = float(crop.sum(0) @ grid) / area, float(crop.sum(1) @ grid) / area
    k = len(_SCALES)
    shapes = np.repeat(np.arange(len(SHAPES)), k)
    radii = np.sqrt(area / _AREAS)[shapes] * np.tile(_SCALES, len(SHAPES))
    centres = np.array([x, y]) + np.tile(_SHIFTS, (len(SHAPES), 1))
    centres[:, 1] -= _DROP[shapes] * radii
    sharp = coverage(shapes, centres, radii, len(crop))
    # Blur by a Gaussian of 0.8 pixels, for images that are not sharp.
    masks = sharp
    for axis in (1, 2):
        near = np.roll(masks, 1, axis) + np.roll(masks, -1, axis)
        far = np.roll(masks, 2, axis) + np.roll(masks, -2, axis)
        masks = _KERNEL[0] * masks + _KERNEL[1] * near + _KERNEL[2] * far
    templates = np.concatenate([sharp, masks])
    overlap = np.minimum(templates, crop).sum((1, 2)) / np.maximum(templates, crop).sum((1, 2))
    weight = float(overlap.max())
    best = int(overlap.argmax()) % len(shapes)
    return int(shapes[best]), float(centres[best, 0]), float(centres[best, 1]), float(radii[best]), weight


def detect(image: Float[np.ndarray, "3 s s"]) -> list[Found]:
    """Return the objects of one image in [0, 1], in reading order of their upper edges."""
    from scipy import ndimage

    alpha, colour = paint_of(image)
    names, found = list(COLOURS), []
    for paint, mask in _parts(alpha, colour):
        soft = np.where(ndimage.binary_dilation(mask, iterations=1), alpha, 0.0).clip(0.0, 1.0)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        middle = ((rows[0] + rows[-1]) // 2, (columns[0] + columns[-1]) // 2)
        if max(rows[-1] - rows[0], columns[-1] - columns[0]) >= _WINDOW - 2:
            shape, x, y, radius, overlap = -1, float(middle[1]), float(middle[0]), _WINDOW / 2, 0.0
        else:
            half = _WINDOW // 2
            crop = np.pad(soft, half)[middle[0] : middle[0] + _WINDOW, middle[1] : middle[1] + _WINDOW]
            shape, x, y, radius, overlap = _fit(crop)
            x, y = x + float(middle[1]) - half, y + float(middle[0]) - half
        good = overlap >= FIT and REACH[0] <= radius <= REACH[1]
        found.append(Found(SHAPES[shape] if good else None, names[paint], x, y, radius, overlap))
    return found


def main_colour(image: Float[np.ndarray, "3 s s"]) -> str | None:
    """Return the colour that covers most of the image beside the ground; None when nothing is drawn."""
    alpha, colour = paint_of(image)
    votes = np.bincount(colour.ravel(), weights=np.where(alpha > THRESHOLD, alpha, 0.0).ravel(), minlength=len(COLOURS))
    return list(COLOURS)[int(votes.argmax())] if votes.sum() >= SPECK else None
