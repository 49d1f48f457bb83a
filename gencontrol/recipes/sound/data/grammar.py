"""What a clip of the bundled sound data is, and how people describe it.

A `SoundSpec` fixes seven audible attributes plus a root pitch and a seed; `caption` words it in one of many
ways and often leaves attributes out, as people do.  Train, validation and test hold disjoint combinations of
attributes: the split is a hash of the attribute tuple, so a test prompt was never heard in training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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


NAMES: dict[str, tuple[str, ...]] = {
    "piano": ("piano", "piano", "grand piano"),
    "acoustic guitar": ("acoustic guitar", "guitar", "steel-string guitar"),
    "violin": ("violin", "violin", "fiddle"),
    "cello": ("cello", "cello", "violoncello"),
    "trumpet": ("trumpet", "trumpet", "brass trumpet"),
    "flute": ("flute", "flute", "concert flute"),
    "clarinet": ("clarinet",),
    "church organ": ("church organ", "organ", "pipe organ"),
    "harp": ("harp", "harp", "concert harp"),
    "marimba": ("marimba", "marimba", "wooden mallets"),
    "electric bass": ("electric bass", "bass guitar", "bass"),
    "choir": ("choir", "choir", "choir of voices", "singing choir"),
    "sitar": ("sitar", "sitar", "Indian sitar"),
    "drum kit": ("drum kit", "drums", "drum set"),
    "square lead": ("square lead", "square wave synth", "chiptune synth"),
    "saw pad": ("saw pad", "synth pad", "sawtooth pad"),
    "sub-bass drone": ("sub-bass drone", "deep sub-bass", "sub-bass"),
    "FM bell": ("FM bell", "synth bell", "metallic bell"),
    "wind": ("wind", "wind noise", "whooshing wind"),
    "plucked string": ("plucked string", "plucked synth string", "pluck synth"),
}

PATTERNS: dict[str, tuple[str, ...]] = {
    "scale": ("scale", "scale", "run of scale notes", "stepwise scale"),
    "arpeggio": ("arpeggio", "arpeggio", "broken chord", "arpeggiated figure"),
    "chords": ("chord progression", "series of chords", "chord sequence"),
    "repeated": ("repeated note", "single repeated note", "pulse on one note"),
    "melody": ("melody", "melody", "tune", "melodic line"),
    "beat": ("beat", "groove", "rhythm"),
    "sustained": ("sustained sound", "continuous sound", "long texture"),
}

ADJECTIVES: dict[str, dict[str, tuple[str, ...]]] = {
    "mode": {
        "major": ("cheerful", "happy", "major", "joyful"),
        "minor": ("sad", "minor", "melancholic", "mournful"),
        "pentatonic": ("calm", "pentatonic", "peaceful", "serene"),
        "chromatic": ("tense", "chromatic", "uneasy", "dissonant"),
    },
    "tempo": {
        "slow": ("slow", "slow", "unhurried", "lazy"),
        "medium": ("moderate", "medium-paced", "mid-tempo", "steady"),
        "fast": ("fast", "fast", "quick", "rapid"),
    },
    "register": {
        "low": ("low", "deep", "low-pitched"),
        "middle": ("mid-range", "middle-register", "mid-pitched"),
        "high": ("high", "bright", "high-pitched"),
    },
    "dynamics": {
        "soft": ("soft", "quiet", "gentle"),
        "loud": ("loud", "powerful", "strong"),
        "crescendo": ("swelling", "growing", "rising"),
    },
    "effect": {
        "dry": ("dry", "clean", "unprocessed"),
        "reverb": ("reverberant", "spacious", "reverb-drenched"),
        "echo": ("echoing", "echoed", "delayed"),
        "tremolo": ("trembling", "wavering", "pulsating"),
        "muffled": ("muffled", "dull", "dampened"),
        "distorted": ("distorted", "fuzzy", "overdriven"),
    },
}

CLAUSES: dict[str, dict[str, tuple[str, ...]]] = {
    "mode": {
        "major": ("in a major key", "with a cheerful mood", "in major"),
        "minor": ("in a minor key", "with a sad mood", "in minor"),
        "pentatonic": ("in a pentatonic mode", "with a calm mood", "on a pentatonic scale"),
        "chromatic": ("with a tense mood", "moving chromatically", "with chromatic notes"),
    },
    "tempo": {
        "slow": ("at a slow tempo", "played slowly", "taking its time"),
        "medium": ("at a moderate tempo", "at medium speed", "at a walking pace"),
        "fast": ("at a fast tempo", "played quickly", "at high speed"),
    },
    "register": {
        "low": ("in the low register", "with low notes", "down low"),
        "middle": ("in the middle register", "with notes in the mid range", "at middle pitch"),
        "high": ("in the high register", "with high notes", "high up"),
    },
    "dynamics": {
        "soft": ("played softly", "at low volume", "very quietly"),
        "loud": ("played loudly", "at full volume", "very loud"),
        "crescendo": ("getting louder", "with a crescendo", "building up in volume"),
    },
    "effect": {
        "dry": ("without effects", "recorded dry", "in a dead room"),
        "reverb": ("with long reverb", "in a large hall", "with lots of reverb"),
        "echo": ("with echo", "with repeating echoes", "through a delay"),
        "tremolo": ("with tremolo", "with a fast tremolo", "with a wobbling volume"),
        "muffled": ("behind a wall", "through a low-pass filter", "as if underwater"),
        "distorted": ("with heavy distortion", "through a fuzz pedal", "with overdrive"),
    },
}

MENTION = {"mode": 0.7, "tempo": 0.75, "register": 0.6, "dynamics": 0.65, "effect": 0.9, "pattern": 0.8}
MENTION_DRY = 0.35
UNCOUNTED = ("wind", "drums", "deep sub-bass", "sub-bass", "wooden mallets", "wind noise", "whooshing wind")


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
    """Word a spec: synonyms, several templates, some attributes left out; lower case but for names, no full stop.

    An attribute is said either as an adjective before the pattern or as a clause after it, or it is left out.
    """
    name = _pick(rng, NAMES[spec.instrument])
    adjectives, clauses = _adjectives_and_clauses(spec, rng)
    said = rng.random() < MENTION["pattern"] and not (spec.pattern == "sustained" and rng.random() < 0.5)
    pattern = _pick(rng, PATTERNS[spec.pattern]) if said else ""
    lead = ", ".join(adjectives) if rng.random() < 0.5 else " ".join(adjectives)
    tail = _join_clauses(clauses, rng)
    if not pattern:
        return _without_pattern(name, lead, tail, rng)
    the = "" if name in UNCOUNTED else "the "
    thing, plain = _article(f"{lead} {pattern}"), f"{lead} {pattern}".strip()
    one = name if name in UNCOUNTED else _article(name)
    verb = "play" if name in ("drums", "wooden mallets") else "plays"
    templates: tuple[str, ...] = (
        f"{thing} on {the}{name}{tail}",
        f"{lead} {name} {pattern}{tail}".strip(),
        f"{name} playing {thing}{tail}",
        f"{one} {verb} {thing}{tail}",
        f"{plain}, {name}{tail}",
        f"{plain} played by {one}{tail}",
        f"{name}: {plain}{tail}",
    )
    if spec.pattern == "sustained":
        templates = (f"{lead} {name}, {pattern}{tail}".strip(), f"{thing} of {name}{tail}", f"{name}: {plain}{tail}")
    return _pick(rng, templates)


def _without_pattern(name: str, lead: str, tail: str, rng: np.random.Generator) -> str:
    plain = f"{lead} {name}".strip()
    one = plain if name in UNCOUNTED else _article(plain)
    templates = (f"{plain}{tail}", f"{one}{tail}", f"the sound of {one}{tail}", f"{plain} playing{tail}")
    return _pick(rng, templates)


def _adjectives_and_clauses(spec: SoundSpec, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Say each attribute before the pattern (three at most) or after it, or leave it out; order is random."""
    adjectives: list[str] = []
    clauses: list[str] = []
    names = list(ADJECTIVES)
    for index in rng.permutation(len(names)):
        attribute = names[index]
        value = getattr(spec, attribute)
        chance = MENTION_DRY if value == "dry" else MENTION[attribute]
        if value == "none" or rng.random() >= chance:
            continue
        if len(adjectives) < 3 and rng.random() < 0.55:
            adjectives.append(_pick(rng, ADJECTIVES[attribute][value]))
        else:
            clauses.append(_pick(rng, CLAUSES[attribute][value]))
    return adjectives, clauses


def _join_clauses(clauses: list[str], rng: np.random.Generator) -> str:
    """ "", " with echo", ", with echo", " with echo and played softly", ..."""
    if not clauses:
        return ""
    start = " " if rng.random() < 0.5 else ", "
    if len(clauses) > 1 and rng.random() < 0.5:
        return start + ", ".join(clauses[:-1]) + " and " + clauses[-1]
    return start + ", ".join(clauses)


def _article(phrase: str) -> str:
    phrase = phrase.strip()
    return ("an " if phrase[0].lower() in "aeiou" or phrase.startswith("FM") else "a ") + phrase


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


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
