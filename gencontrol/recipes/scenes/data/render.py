"""From a description to pixels: where the objects lie, and anti-aliased shapes and letters on a dark ground.

Lengths are pixels of a 32x32 image, origin at the centre of the top left pixel, y downwards.  An object of radius r
fills the square of half-width r around its centre.  Coverage of a pixel is its signed distance to the edge, cut to
±1/2 (exact for straight edges along the axes).  All objects of a batch are drawn in one array operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from gencontrol.errors import UsageError
from gencontrol.recipes.scenes.data.font import GLYPHS, HEIGHT, LETTERS, PITCH, WIDTH
from gencontrol.recipes.scenes.data.grammar import COLOURS, MAX_LETTERS, SHAPES, SIZES, SceneSpec

SIDE = 32
#: half-width of an object of each size, pixels: uniform in this range; SPLIT tells the two apart
RADII = {"small": (2.8, 3.0), "large": (5.0, 5.4)}
SPLIT = 4.0
#: centres lie on the corners of cells of so many pixels, letters in their middles: layouts a small model can learn
CELL = 4
#: free pixels between two objects, and between an object and the image's border
GAP, MARGIN = 2.0, 1.0
#: the dark ground's grey level, and the factor on an object's colour: uniform in these ranges
GROUND, BRIGHTNESS = (0.05, 0.18), (0.85, 1.0)
_TRIES = 96


@dataclass(frozen=True)
class Scene:
    """One scene with everything decided; arrays have one row per object, a word has none.

    Args:
        shapes: places in SHAPES.
        colours: RGB in [0, 1].
        centres: (x, y), pixels.
        radii: half-widths, pixels.
        ground: grey level of the ground.
        word: letters, drawn in `word_colour` from the corner (x, y) `word_at`.
    """

    shapes: Int[np.ndarray, " n"]
    colours: Float[np.ndarray, "n 3"]
    centres: Float[np.ndarray, "n 2"]
    radii: Float[np.ndarray, " n"]
    ground: float
    word: str = ""
    word_colour: tuple[float, float, float] = (1.0, 1.0, 1.0)
    word_at: tuple[int, int] = (0, 0)


def _radii(spec: SceneSpec, rng: np.random.Generator) -> np.ndarray:
    """Half-widths of all objects; objects counted together have one size, four of free size are small to fit."""
    sizes: list[str] = []
    for thing in spec.things:
        free = "small" if spec.total > 2 and rng.random() < 0.7 else str(rng.choice(SIZES))
        free = "small" if spec.total > 3 else free
        sizes += [thing.size or free] * thing.count
    return np.array([rng.uniform(*RADII[size]) for size in sizes])


def _centres(radii: np.ndarray, relation: str | None, rng: np.random.Generator) -> np.ndarray:
    """Centres [n 2] without overlap: the first of many random layouts that keeps the gaps and the relation."""
    n, reach = len(radii), radii[:, None] + radii[None, :] + GAP
    low, high = np.ceil((MARGIN + radii) / CELL).astype(int), np.floor((SIDE - MARGIN - radii) / CELL).astype(int)
    above = np.triu(np.ones((n, n), bool), 1)
    for _ in range(400):
        places = CELL * rng.integers(low[:, None], high[:, None] + 1, (_TRIES, n, 2)) - 0.5
        apart = np.abs(places[:, :, None] - places[:, None]).max(-1) >= reach
        good = (apart | ~above).all((1, 2))
        if relation is not None:
            axis, sign = (
                (0 if relation in ("left of", "right of") else 1),
                (1 if relation in ("left of", "above") else -1),
            )
            good &= sign * (places[:, 1, axis] - places[:, 0, axis]) >= reach[0, 1]
        if good.any():
            return places[int(good.argmax())]
    raise UsageError(f"{n} objects of half-widths {radii.round(1).tolist()} px do not fit into {SIDE}x{SIDE} pixels.")


def arrange(spec: SceneSpec, rng: np.random.Generator) -> Scene:
    """Decide everything that the description leaves free.

    Raises:
        UsageError: the objects do not fit.
    """
    ground = float(rng.uniform(*GROUND))

    def paint(name: str | None) -> np.ndarray:
        return np.array(COLOURS[name or str(rng.choice(list(COLOURS)))]) * rng.uniform(*BRIGHTNESS)

    if spec.word is not None:
        width = PITCH * len(spec.word) - (PITCH - WIDTH)
        x = CELL * (MAX_LETTERS - len(spec.word)) + 1
        y = CELL * int(rng.integers(2, 5))
        assert x + width <= SIDE  # of the grammar's longest word
        red, green, blue = paint(spec.word_colour)
        none = np.zeros(0)
        return Scene(
            none.astype(int),
            none.reshape(0, 3),
            none.reshape(0, 2),
            none,
            ground,
            spec.word,
            (red, green, blue),
            (x, y),
        )
    radii = _radii(spec, rng)
    centres = _centres(radii, spec.relation, rng)
    shapes, colours = [], []
    for thing in spec.things:
        shapes += [SHAPES.index(thing.shape)] * thing.count
        shared = paint(thing.colour)
        colours += [shared if thing.count > 1 else paint(thing.colour) if k else shared for k in range(thing.count)]
    return Scene(np.array(shapes), np.array(colours), centres, radii, ground)


def coverage(
    shapes: Int[np.ndarray, " n"], centres: Float[np.ndarray, "n 2"], radii: Float[np.ndarray, " n"], side: int = SIDE
) -> Float[np.ndarray, "n s s"]:
    """Return how much of each pixel each object covers, in [0, 1]."""
    grid = np.arange(side, dtype=np.float32)
    x = grid[None, None, :] - centres[:, 0, None, None].astype(np.float32)
    y = grid[None, :, None] - centres[:, 1, None, None].astype(np.float32)
    r = radii.astype(np.float32)[:, None, None]
    ax, ay = np.abs(x), np.abs(y)
    box = np.maximum(ax, ay)
    arm = 0.34 * r
    slope = np.float32(1 / np.sqrt(5.0))
    distances = (
        np.hypot(x, y) - r,
        box - 0.9 * r,
        np.maximum((2 * ax - y - r) * slope, y - r),  # apex at the top, base of width 2r at the bottom
        np.minimum(np.maximum(ax - r, ay - arm), np.maximum(ax - arm, ay - r)),
    )
    chosen = np.choose(shapes[:, None, None], distances)
    return np.clip(0.5 - chosen, 0.0, 1.0)


def letters(word: str, at: tuple[int, int], side: int = SIDE) -> Float[np.ndarray, "s s"]:
    """Return the coverage of a word whose first letter's top left pixel is (x, y) = `at`."""
    mask = np.zeros((side, side), np.float32)
    for place, letter in enumerate(word):
        x, y = at[0] + PITCH * place, at[1]
        mask[y : y + HEIGHT, x : x + WIDTH] = GLYPHS[LETTERS.index(letter)]
    return mask


def render(scenes: Sequence[Scene]) -> Float[np.ndarray, "b 3 32 32"]:
    """Return the images of scenes, float32 in [0, 1]."""
    images = np.empty((len(scenes), 3, SIDE, SIDE), np.float32)
    images[:] = np.array([scene.ground for scene in scenes], np.float32)[:, None, None, None]
    owner = np.repeat(np.arange(len(scenes)), [len(scene.shapes) for scene in scenes])
    if len(owner):
        masks = coverage(
            np.concatenate([scene.shapes for scene in scenes]),
            np.concatenate([scene.centres for scene in scenes]),
            np.concatenate([scene.radii for scene in scenes]),
        )
        colours = np.concatenate([scene.colours for scene in scenes]).astype(np.float32)
        for row, place in enumerate(owner):  # objects never overlap, so their order does not matter
            images[place] += masks[row] * (colours[row, :, None, None] - images[place])
    for index, scene in enumerate(scenes):
        if scene.word:
            mask = letters(scene.word, scene.word_at)
            paint = np.array(scene.word_colour, np.float32)[:, None, None]
            images[index] += mask * (paint - images[index])
    return images
