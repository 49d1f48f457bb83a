"""Endless captions with images: which captions train, which are kept for tests, and both as pretraining data.

A caption is held out by a hash of what it means, so that "a circle left of a square" and "a square right of a circle"
are held out together; words are held out by a list.  Item i of a corpus is a pure function of (seed, i).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError, nearest
from gencontrol.recipes.scenes.data.font import LETTERS
from gencontrol.recipes.scenes.data.grammar import (
    CATEGORIES,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    SceneSpec,
    Thing,
    caption,
    category,
)
from gencontrol.recipes.scenes.data.render import Scene, arrange, render
from gencontrol.rng import stream_seed

Split = Literal["train", "test"]

#: share of each category in the training data; few words unless asked for, so that a reward for reading has room
SHARES = {
    "single": 0.05,
    "two": 0.14,
    "counting": 0.17,
    "colours": 0.10,
    "position": 0.23,
    "binding": 0.25,
    "word": 0.06,
}
#: one description of this many is kept for tests
HELD_OUT_EVERY = 6
#: of the hash: chosen so that every category has held-out captions of several shapes and relations
_SALT = 101

TRAIN_WORDS = tuple(
    (
        "ACE ACT ADD AGE AIR ANT ARM ART ASH BAD BAG BAT BED BEE BIG BOX BOY BUS BUY CAR COW CRY CUP CUT DAY DOG DRY "
        "EAR EAT EGG EYE FAN FAR FLY FOX FUN GAS GUM HAT HEN ICE INK JAM JAR JET KEY KID LAW LEG LID LIP MAP MIX MUD "
        "NET NUT OAK OIL OWL PAN PEN PIG POT RAT ROW RUG SEA SKY SUN TAX TEA TIE TOY VAN WAX WEB WIN ZOO BABY BALL "
        "BANK BIRD BLUE BOAT BOOK CAKE CITY COAT DESK DOOR DUCK EAST FARM FIRE FROG GAME GOLD HAND HILL IRON JUMP KITE "
        "LAMP LEAF LION MILK MOON NEST NORD OPEN PARK PLUM QUIZ RAIN ROAD SALT SHIP TREE UNIT VASE WIND YARD ZINC"
    ).split()
)
HELD_OUT_WORDS = tuple(
    (
        "CAT BUG FIG HOP JOB LOG MAN NOW PET RUN SIX TOP VET WET YES ZIP AXE DEN GYM HUB KIN OWN QUA RED "
        "FISH WOLF STAR BEAR CORN DUST FLAG GIFT HOPE JAZZ KING LOVE MAZE NINE OXEN PINK ROSE SNOW TIME WAVE"
    ).split()
)


def meaning(spec: SceneSpec) -> str:
    """Return a text that is equal for captions of the same meaning: lists in any order, relations either way."""
    things, relation = spec.things, spec.relation
    if relation in ("right of", "below"):
        things, relation = things[::-1], {"right of": "left of", "below": "above"}[relation]
    return caption(SceneSpec(things if relation else tuple(sorted(things, key=repr)), relation, spec.word))


def is_held_out(spec: SceneSpec) -> bool:
    """Whether a description is kept for tests."""
    if spec.word is not None:
        return spec.word in HELD_OUT_WORDS
    return stream_seed(_SALT, "scenes/split", meaning(spec)) % HELD_OUT_EVERY == 0


def _thing(rng: np.random.Generator, *, colour: float, size: float) -> Thing:
    """A thing whose colour and size are named with these probabilities."""
    return Thing(
        str(rng.choice(SHAPES)),
        str(rng.choice(list(COLOURS))) if rng.random() < colour else None,
        str(rng.choice(SIZES)) if rng.random() < size else None,
    )


def _several(rng: np.random.Generator, number: int, colour: float, size: float) -> tuple[Thing, ...]:
    """Things of which no two could be mistaken for each other: they differ in shape, or in a colour that both name."""
    while True:
        things = tuple(_thing(rng, colour=colour, size=size) for _ in range(number))
        pairs = [(a, b) for i, a in enumerate(things) for b in things[:i]]
        if all(a.shape != b.shape or (a.colour and b.colour and a.colour != b.colour) for a, b in pairs):
            return things


def _draw(kind: str, split: Split, rng: np.random.Generator) -> SceneSpec:
    if kind == "word":
        pool = HELD_OUT_WORDS if split == "test" else TRAIN_WORDS
        word = str(rng.choice(pool))
        if split == "train" and rng.random() < 0.6:  # any letters at all, so that spelling is learned and not words
            word = "".join(rng.choice(list(LETTERS), int(rng.integers(3, 5))))
        return SceneSpec(word=word, word_colour=str(rng.choice(list(COLOURS))) if rng.random() < 0.5 else None)
    if kind == "position":
        coloured = 1.0 if rng.random() < 0.5 else 0.0
        return SceneSpec(_several(rng, 2, coloured, 0.0), str(rng.choice(RELATIONS)))
    if kind in ("two", "binding"):
        bound = 1.0 if kind == "binding" else 0.0
        return SceneSpec(_several(rng, 3 if rng.random() < 0.25 else 2, bound, 0.15 * bound))
    thing = _thing(rng, colour=float(kind == "colours"), size=0.4)
    if kind == "counting":
        return SceneSpec((Thing(thing.shape, _colour(rng, 0.4), None, int(rng.integers(2, 5))),))
    return SceneSpec((thing,))


def _colour(rng: np.random.Generator, probability: float) -> str | None:
    return str(rng.choice(list(COLOURS))) if rng.random() < probability else None


def _shares(words: float) -> list[float]:
    """SHARES with another share of words; the other categories keep their proportions."""
    others = (1.0 - words) / (1.0 - SHARES["word"])
    return [words if kind == "word" else share * others for kind, share in SHARES.items()]


def sample_spec(
    rng: np.random.Generator, split: Split = "train", kind: str | None = None, *, words: float = SHARES["word"]
) -> SceneSpec:
    """Draw a description of a split, of one category or of any (by SHARES, with `words` as the share of words).

    Raises:
        UsageError: an unknown split or category, or a share outside [0, 1].
    """
    if not 0.0 <= words <= 1.0:
        raise UsageError(f"words = {words}; the share of words is a number in [0, 1].")
    if split not in ("train", "test"):
        raise UsageError(f"scenes have no split '{split}'; give train or test.")
    if kind is not None and kind not in CATEGORIES:
        raise UsageError(
            f"scenes have no category '{kind}'.{nearest(kind, CATEGORIES)} Known: {', '.join(CATEGORIES)}."
        )
    kind = kind or str(rng.choice(list(SHARES), p=_shares(words)))
    while True:
        spec = _draw(kind, split, rng)
        if is_held_out(spec) == (split == "test") and category(spec) == kind:
            return spec


def sample_captions(count: int, *, split: Split = "train", kind: str | None = None, seed: int = 0) -> list[str]:
    """Draw captions; the i-th depends on (seed, split, kind, i) alone.  Duplicates occur where a category is small."""
    rngs = (np.random.default_rng(stream_seed(seed, f"scenes/captions/{split}/{kind}", i)) for i in range(count))
    return [caption(sample_spec(rng, split, kind)) for rng in rngs]


@dataclass(frozen=True)
class SceneCorpus:
    """Scenes as pretraining data: images in [-1, 1], token ids as condition.

    Args:
        tokenizer: transformers' tokenizer of the captions; None gives no condition.
        split: which captions.
        size: items; item i never changes.
        seed: of every item.
        words: share of word captions.
    """

    tokenizer: Any
    split: Split = "train"
    size: int = 1_000_000
    seed: int = 0
    words: float = SHARES["word"]

    variants = 1

    def __len__(self) -> int:
        return self.size

    def spec(self, item: int) -> SceneSpec:
        """Description of an item."""
        return sample_spec(self._rng(item), self.split, words=self.words)

    def _rng(self, item: int) -> np.random.Generator:
        return np.random.default_rng(stream_seed(self.seed, f"scenes/{self.split}", item))

    def _make(self, item: int) -> tuple[SceneSpec, Scene]:
        rng = self._rng(item)
        spec = sample_spec(rng, self.split, words=self.words)
        return spec, arrange(spec, rng)

    def images(self, items: Sequence[int]) -> Float[Tensor, "b 3 32 32"]:
        """Images in [0, 1] of items."""
        return torch.from_numpy(render([self._make(item)[1] for item in items]))

    def read(
        self, items: Sequence[int], variants: Sequence[int]
    ) -> tuple[Float[Tensor, "b 3 32 32"], Mapping[str, Tensor] | None]:
        """Images in [-1, 1], and {"ids" [b m], "mask" [b m] bool} of their captions."""
        made = [self._make(item) for item in items]
        images = torch.from_numpy(render([scene for _, scene in made])) * 2.0 - 1.0
        if self.tokenizer is None:
            return images, None
        tokens = self.tokenizer([caption(spec) for spec, _ in made], padding=True, return_tensors="pt")
        return images, {"ids": tokens["input_ids"], "mask": tokens["attention_mask"].bool()}

    def text(self, item: int, variant: int = 0) -> str:
        """Caption of an item."""
        return caption(self.spec(item))
