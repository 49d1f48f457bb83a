"""What a clip of the bundled sound data is, and how people describe it.

A `SoundSpec` fixes seven audible attributes plus a root pitch and a seed; `caption` words it in one of many
ways and often leaves attributes out, as people do.  Train, validation and test hold disjoint combinations of
attributes: the split is a hash of the attribute tuple, so a test prompt was never heard in training.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass

import numpy as np

REGISTERS = ("low", "middle", "high")
PITCHED_PATTERNS = ("scale", "arpeggio", "chords", "repeated", "melody")
MODAL_PATTERNS = frozenset(("scale", "arpeggio", "chords", "melody"))

# instrument -> (registers it plays, General MIDI program or None where a numpy voice plays)
INSTRUMENTS: dict[str, tuple[tuple[str, ...], int | None]] = {
    "piano": (REGISTERS, 0),
    "acoustic guitar": (("low", "middle"), 25),
    "violin": (("middle", "high"), 40),
    "cello": (("low", "middle"), 42),
    "trumpet": (("middle", "high"), 56),
    "flute": (("middle", "high"), 73),
    "clarinet": (("middle", "high"), 71),
    "church organ": (REGISTERS, 19),
    "harp": (REGISTERS, 46),
    "marimba": (REGISTERS, 12),
    "electric bass": (("low",), 33),
    "choir": (REGISTERS, 52),
    "sitar": (("low", "middle"), 104),
    "drum kit": (REGISTERS, 0),
    "square lead": (REGISTERS, None),
    "saw pad": (REGISTERS, None),
    "sub-bass drone": (("low",), None),
    "FM bell": (("middle", "high"), None),
    "wind": (REGISTERS, None),
    "plucked string": (REGISTERS, None),
}

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "instrument": tuple(INSTRUMENTS),
    "mode": ("major", "minor", "pentatonic", "chromatic"),
    "tempo": ("slow", "medium", "fast"),
    "register": REGISTERS,
    "dynamics": ("soft", "loud", "crescendo"),
    "effect": ("dry", "reverb", "echo", "tremolo", "muffled", "distorted"),
    "pattern": (*PITCHED_PATTERNS, "beat", "sustained"),
}

ROOTS = {"low": (36, 46), "middle": (57, 66), "high": (74, 82)}  # MIDI pitch of the root, inclusive
HELD_OUT_TEST, HELD_OUT_VAL = 10, 4  # per cent of the attribute combinations


@dataclass(frozen=True)
class SoundSpec:
    """One clip. `mode` is "none" where no mode can be heard; `root` is a MIDI pitch; `seed` fixes the details."""

    instrument: str
    mode: str
    tempo: str
    register: str
    dynamics: str
    effect: str
    pattern: str
    root: int
    seed: int

    @property
    def attributes(self) -> tuple[str, ...]:
        """The seven attributes in the order of `ATTRIBUTES`."""
        values = asdict(self)
        return tuple(values[name] for name in ATTRIBUTES)

    def label(self, attribute: str) -> int:
        """Class index of one attribute in `ATTRIBUTES`, -1 where it does not apply."""
        value = asdict(self)[attribute]
        return -1 if value == "none" else ATTRIBUTES[attribute].index(value)


def split_of(spec: SoundSpec) -> str:
    """The split that owns the spec's combination of attributes: "train", "val" or "test"."""
    digest = hashlib.sha256("|".join(spec.attributes).encode()).digest()
    place = int.from_bytes(digest[:4], "little") % 100
    if place < HELD_OUT_TEST:
        return "test"
    return "val" if place < HELD_OUT_TEST + HELD_OUT_VAL else "train"


def sample_spec(rng: np.random.Generator) -> SoundSpec:
    """Draw a clip; combinations in which an attribute could not be heard are left out."""
    instrument = str(rng.choice(ATTRIBUTES["instrument"]))
    registers, _ = INSTRUMENTS[instrument]
    register = str(rng.choice(registers))
    pattern = str(rng.choice(_patterns(instrument)))
    mode = str(rng.choice(ATTRIBUTES["mode"])) if pattern in MODAL_PATTERNS else "none"
    effects = [e for e in ATTRIBUTES["effect"] if e not in _silent_effects(instrument)]
    low, high = ROOTS[register]
    shift = -8 if instrument in ("electric bass", "sub-bass drone") else 0
    return SoundSpec(
        instrument=instrument,
        mode=mode,
        tempo=str(rng.choice(ATTRIBUTES["tempo"])),
        register=register,
        dynamics=str(rng.choice(ATTRIBUTES["dynamics"])),
        effect=str(rng.choice(effects)),
        pattern=pattern,
        root=int(rng.integers(low, high + 1)) + shift,
        seed=int(rng.integers(0, 2**31)),
    )


def spec_of_item(split: str, index: int, seed: int) -> tuple[SoundSpec, np.random.Generator]:
    """The spec of item `index` of a split, and the stream that words its captions: a pure function of its arguments."""
    code = {"train": 0, "val": 1, "test": 2}[split]
    rng = np.random.default_rng([seed, code, index])
    spec = sample_spec(rng)
    while split_of(spec) != split:
        spec = sample_spec(rng)
    return spec, rng


def sample_captions(n: int, seed: int, split: str) -> list[str]:
    """`n` prompts of a split; prompts of "test" describe combinations of attributes that training never had."""
    pairs = (spec_of_item(split, index, seed) for index in range(n))
    return [caption(spec, rng) for spec, rng in pairs]


def caption(spec: SoundSpec, rng: np.random.Generator) -> str:
    """Word a spec: synonyms, several templates, some attributes left out."""
    from gencontrol.recipes.sound.data.wording import word

    return word(spec, rng)


def _patterns(instrument: str) -> tuple[str, ...]:
    if instrument == "drum kit":
        return ("beat", "repeated")
    if instrument in ("wind", "sub-bass drone"):
        return ("sustained",)
    return PITCHED_PATTERNS


def _silent_effects(instrument: str) -> tuple[str, ...]:
    """Effects that would change next to nothing on this instrument."""
    if instrument in ("wind", "sub-bass drone"):
        return ("tremolo", "distorted") if instrument == "wind" else ("tremolo", "muffled")
    return ("distorted",) if instrument == "square lead" else ()
