"""What a scene is, how it is described, and how a caption is read back exactly.

    scene    = thing | list | relation | word
    thing    = ("a" | "two" | "three" | "four") [size] [colour] shape     two or more: "two small red crosses"
    list     = thing "and" thing | thing "," thing "and" thing             each with one object
    relation = thing ("left of" | "right of" | "above" | "below") thing
    word     = "the word" LETTERS ["in" colour]                            one to four capital letters

What a caption does not say is free.  The categories follow GenEval (Ghosh et al. 2023, arXiv 2310.11513): single,
two, counting, colours, position, binding (its "color_attr"), and ours: word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from gencontrol.errors import UsageError, nearest

SHAPES = ("circle", "square", "triangle", "cross")
#: name → RGB in [0, 1]
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.92, 0.15, 0.15),
    "green": (0.15, 0.75, 0.20),
    "blue": (0.20, 0.30, 0.98),
    "yellow": (0.95, 0.88, 0.15),
    "purple": (0.70, 0.20, 0.85),
    "cyan": (0.15, 0.82, 0.88),
}
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {"a": 1, "two": 2, "three": 3, "four": 4}
CATEGORIES = ("single", "two", "counting", "colours", "position", "binding", "word")
MAX_LETTERS = 4
#: every token of the grammar except the capital letters, for tokenizers
VOCABULARY = (
    *("a", "two", "three", "four", ",", "and", "left", "right", "of", "above", "below", "the", "word", "in"),
    *SIZES,
    *COLOURS,
    *SHAPES,
    *("circles", "squares", "triangles", "crosses"),
)

Category = Literal["single", "two", "counting", "colours", "position", "binding", "word"]


class CaptionError(UsageError):
    """A text that is no caption of the grammar; the message says where it leaves it."""


@dataclass(frozen=True)
class Thing:
    """One kind of object: `count` objects of a shape; colour and size None are free."""

    shape: str
    colour: str | None = None
    size: str | None = None
    count: int = 1


@dataclass(frozen=True)
class SceneSpec:
    """A scene: one to three things, or a word; `relation` says where the first of two things lies."""

    things: tuple[Thing, ...] = ()
    relation: str | None = None
    word: str | None = None
    word_colour: str | None = None

    @property
    def total(self) -> int:
        """Objects in the scene; 0 for a word."""
        return sum(thing.count for thing in self.things)


_ARTICLE = "|".join(COUNTS)
_THING = re.compile(
    rf"(?P<count>{_ARTICLE}) (?:(?P<size>{'|'.join(SIZES)}) )?(?:(?P<colour>{'|'.join(COLOURS)}) )?(?P<shape>[a-z]+)"
)
_WORD = re.compile(rf"the word (?P<word>\S+)(?: in (?P<colour>{'|'.join(COLOURS)}))?")
_RELATION = re.compile(rf" ({'|'.join(RELATIONS)}) ")
_KNOWN = frozenset(" ".join(VOCABULARY).split())


def plural(shape: str) -> str:
    """Return "circles", "crosses"."""
    return shape + ("es" if shape.endswith("s") else "s")


def describe(thing: Thing) -> str:
    """Return "a large red circle" or "three crosses"."""
    count = next(word for word, number in COUNTS.items() if number == thing.count)
    noun = thing.shape if thing.count == 1 else plural(thing.shape)
    return " ".join(part for part in (count, thing.size, thing.colour, noun) if part)


def caption(spec: SceneSpec) -> str:
    """Return the one caption of a description; `parse` reads it back."""
    if spec.word is not None:
        return f"the word {spec.word}" + (f" in {spec.word_colour}" if spec.word_colour else "")
    parts = [describe(thing) for thing in spec.things]
    if spec.relation is not None:
        return f"{parts[0]} {spec.relation} {parts[1]}"
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" and {parts[-1]}"


def category(spec: SceneSpec) -> Category:
    """Return which of CATEGORIES a description belongs to."""
    if spec.word is not None:
        return "word"
    if spec.relation is not None:
        return "position"
    if len(spec.things) > 1:
        return "binding" if any(thing.colour or thing.size for thing in spec.things) else "two"
    if spec.things[0].count > 1:
        return "counting"
    return "colours" if spec.things[0].colour else "single"


def parse(text: str) -> SceneSpec:
    """Return the description that a caption means; white space and a last full stop do not matter.

    Raises:
        CaptionError: the text is not of the grammar, or asks for what cannot be told apart ("a circle and a circle").
    """
    line = " ".join(text.split()).removesuffix(".").rstrip()
    if line.startswith("the word "):
        match = _WORD.fullmatch(line)
        if match is None:
            raise CaptionError(f"'{line}' is no word caption; write 'the word CAT' or 'the word CAT in red'.")
        word = match["word"]
        if not re.fullmatch(rf"[A-Z]{{1,{MAX_LETTERS}}}", word):
            raise CaptionError(f"'{line}': a word has one to {MAX_LETTERS} capital letters A-Z, not '{word}'.")
        return SceneSpec(word=word, word_colour=match["colour"])
    halves = _RELATION.split(line)
    if len(halves) == 3:
        spec = SceneSpec((_parse_thing(halves[0], line), _parse_thing(halves[2], line)), halves[1])
    else:
        first, *rest = line.split(" and ")
        if len(rest) > 1 or len(halves) > 3:
            raise CaptionError(f"'{text}' joins too much; write 'A, B and C' or 'A left of B'.")
        names = [*first.split(", "), *rest]
        if len(names) > 3 or (len(names) > 1 and not rest):
            raise CaptionError(f"'{text}' is no list of two or three things; write 'A and B' or 'A, B and C'.")
        spec = SceneSpec(tuple(_parse_thing(name, line) for name in names))
    _check(spec, text)
    return spec


def _parse_thing(part: str, line: str) -> Thing:
    match = _THING.fullmatch(part)
    unknown = next((word for word in part.split() if word not in _KNOWN), None)
    if match is None or unknown is not None:
        hint = nearest(unknown, sorted(_KNOWN)) if unknown else ""
        what = f"unknown word '{unknown}'.{hint}" if unknown else "words out of order."
        raise CaptionError(f"'{line}': {what} A thing is: a|two|three|four [small|large] [colour] shape.")
    count, noun = COUNTS[match["count"]], match["shape"]
    shape = next((s for s in SHAPES if noun == (s if count == 1 else plural(s))), None)
    if shape is None:
        raise CaptionError(f"'{line}': '{noun}' does not follow '{match['count']}'; one circle, two circles.")
    return Thing(shape, match["colour"], match["size"], count)


def _check(spec: SceneSpec, text: str) -> None:
    things = spec.things
    if len(things) > 1 and any(thing.count > 1 for thing in things):
        raise CaptionError(f"'{text}': counted things stand alone ('three red circles').")
    if len(set(things)) != len(things):
        raise CaptionError(f"'{text}' names the same thing twice; write 'two circles', or give them colours or sizes.")
