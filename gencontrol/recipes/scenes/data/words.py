"""Training images of words for the reader, and the damage that both scene networks learn to see through."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.recipes.scenes.data.font import GLYPHS, HEIGHT, LETTERS, PITCH, WIDTH
from gencontrol.recipes.scenes.data.grammar import COLOURS, MAX_LETTERS
from gencontrol.recipes.scenes.data.render import BRIGHTNESS, GROUND, SIDE

#: pixels changed in a letter that must not be read, of 35
_DAMAGE = (9, 18)


def random_word_image(rng: np.random.Generator, scramble: float) -> tuple[Float[np.ndarray, "3 32 32"], str]:
    """Draw one to four letters anywhere, and the word they spell; a scrambled letter is drawn and not spelled.

    Args:
        scramble: probability that a letter has so many wrong pixels that it is none.
    """
    length = int(rng.integers(1, MAX_LETTERS + 1))
    x = int(rng.integers(0, SIDE - (PITCH * length - (PITCH - WIDTH)) + 1))
    y = int(rng.integers(0, SIDE - HEIGHT + 1))
    mask, spelled = np.zeros((SIDE, SIDE), np.float32), ""
    for place in range(length):
        number = int(rng.integers(len(LETTERS)))
        glyph = GLYPHS[number].copy()
        if rng.random() < scramble:
            wrong = rng.permutation(glyph.size)[: int(rng.integers(*_DAMAGE))]
            glyph.reshape(-1)[wrong] = 1.0 - glyph.reshape(-1)[wrong]
        else:
            spelled += LETTERS[number]
        mask[y : y + HEIGHT, x + PITCH * place : x + PITCH * place + WIDTH] = glyph
    ground = np.float32(rng.uniform(*GROUND))
    paint = np.array(COLOURS[str(rng.choice(list(COLOURS)))], np.float32) * np.float32(rng.uniform(*BRIGHTNESS))
    return ground + mask[None] * (paint[:, None, None] - ground), spelled


def damage(
    images: Float[Tensor, "b 3 s s"], blur: Float[Tensor, " b"], noise: Float[Tensor, " b"], draw: Tensor
) -> Tensor:
    """Blur images (Gaussian, five taps) and add noise, each image by its own standard deviations; cut to [0, 1].

    Args:
        images: in [0, 1].
        blur: standard deviations, pixels, below 1; 0 leaves an image sharp.
        noise: standard deviations.
        draw: standard normal numbers, shaped as the images.
    """
    taps = torch.exp(-0.5 * (torch.arange(3.0)[None] / blur.clamp_min(1e-3)[:, None]) ** 2)
    taps = (taps / (taps[:, :1] + 2 * taps[:, 1:].sum(1, keepdim=True)))[:, :, None, None, None]
    for axis in (2, 3):
        near = images.roll(1, axis) + images.roll(-1, axis)
        far = images.roll(2, axis) + images.roll(-2, axis)
        images = taps[:, 0] * images + taps[:, 1] * near + taps[:, 2] * far
    return (images + noise[:, None, None, None] * draw).clamp(0.0, 1.0)
