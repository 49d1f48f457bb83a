"""From a spec to notes: rhythm from the tempo, pitches from mode and pattern, velocities from the dynamics.

Each mode is made audible within the first three notes (its third or its tritone comes early), since a slow clip
has only three of them.  Times are in seconds from the start of the clip, pitches are MIDI numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gencontrol.recipes.sound.data.grammar import SoundSpec

LEAD_IN_S, PLAYED_S = 0.02, 1.80
ONSET_INTERVAL_S = {"slow": 0.60, "medium": 0.30, "fast": 0.128}

SCALES = {
    "major": (0, 2, 4, 5, 7, 9, 11),
    "minor": (0, 2, 3, 5, 7, 8, 10),
    "pentatonic": (0, 2, 5, 7, 9),
    "chromatic": tuple(range(12)),
}
ARPEGGIOS = {"major": (0, 4, 7), "minor": (0, 3, 7), "pentatonic": (0, 2, 7), "chromatic": (0, 3, 6, 9)}
CHORDS = {
    "major": ((0, 4, 7), (5, 9, 12), (7, 11, 14), (0, 4, 7, 12)),
    "minor": ((0, 3, 7), (5, 8, 12), (7, 10, 14), (0, 3, 7, 12)),
    "pentatonic": ((0, 2, 7), (5, 7, 12), (7, 9, 14), (0, 5, 7)),
    "chromatic": ((0, 1, 6), (1, 2, 7), (-1, 0, 5), (0, 3, 6)),
}
OPENINGS = {"major": (0, 2, 4), "minor": (0, 2, 4), "pentatonic": (0, 2, 3), "chromatic": (0, 1, 6)}  # scale degrees
KIT = {"low": (36, 41, 45), "middle": (38, 37, 39), "high": (42, 46, 51)}  # General MIDI percussion


@dataclass(frozen=True)
class Note:
    """One note: `start_s` and `duration_s` in seconds, `pitch` a MIDI number, `velocity` in 1..127."""

    start_s: float
    duration_s: float
    pitch: int
    velocity: int


def write_score(spec: SoundSpec) -> list[Note]:
    """The notes of a clip, sorted by start; a pure function of the spec."""
    rng = np.random.default_rng([spec.seed, 1])
    starts = _onsets(spec, rng)
    groups = _pitches(spec, len(starts), rng)
    ends = np.append(starts[1:], LEAD_IN_S + PLAYED_S)
    notes: list[Note] = []
    for start, end, pitches in zip(starts, ends, groups, strict=True):
        length = max(float(end - start) * 0.92, 0.05)
        velocity = _velocity(spec, float(start), rng)
        notes += [Note(float(start), length, int(pitch), velocity) for pitch in pitches]
    return notes


def _onsets(spec: SoundSpec, rng: np.random.Generator) -> np.ndarray:
    """Onset times [k] in seconds; a melody is slightly uneven, everything else is regular."""
    interval = ONSET_INTERVAL_S[spec.tempo] * float(rng.uniform(0.94, 1.0))
    count = int(PLAYED_S / interval + 1e-6)
    starts = LEAD_IN_S + interval * np.arange(count)
    if spec.pattern == "melody" and count > 3:
        late = rng.random(count) < 0.3
        late[0] = False
        starts = starts + late * interval * 0.35
    return starts


def _velocity(spec: SoundSpec, start_s: float, rng: np.random.Generator) -> int:
    base = {"soft": 48.0, "loud": 116.0, "crescendo": 35.0 + 85.0 * start_s / PLAYED_S}[spec.dynamics]
    return int(np.clip(base + rng.normal(0, 3), 1, 127))


def _pitches(spec: SoundSpec, count: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Pitches of each onset."""
    if spec.instrument == "drum kit":
        kit = KIT[spec.register]
        if spec.pattern == "repeated":
            return [(kit[int(rng.integers(len(kit)))],)] * count
        bar = (kit[0], *rng.permutation(kit[1:]).tolist(), kit[0], kit[1])
        return [(int(bar[i % len(bar)]),) for i in range(count)]
    if spec.pattern in ("repeated", "sustained"):
        return [(spec.root,)] * count
    if spec.pattern == "chords":
        chords = CHORDS[spec.mode]
        order = [0, *rng.permutation(np.arange(1, len(chords))).tolist()]
        return [tuple(spec.root + p for p in chords[order[i % len(order)]]) for i in range(count)]
    offsets = {"scale": _scale, "arpeggio": _arpeggio, "melody": _melody}[spec.pattern](spec.mode, count, rng)
    return [(spec.root + offset,) for offset in offsets]


def _degree(scale: tuple[int, ...], degree: int) -> int:
    """Semitones above the root of a scale degree of any sign."""
    octave, step = divmod(degree, len(scale))
    return 12 * octave + scale[step]


def _scale(mode: str, count: int, rng: np.random.Generator) -> list[int]:
    """Up and down within about an octave, starting up or down."""
    scale = SCALES[mode]
    top = min(len(scale), 8)
    walk = [*range(top + 1), *range(top - 1, 0, -1)]
    degrees = [walk[i % len(walk)] for i in range(count)]
    if rng.random() < 0.5:
        degrees = [max(degrees) - d for d in degrees]
    return [_degree(scale, d) for d in degrees]


def _arpeggio(mode: str, count: int, rng: np.random.Generator) -> list[int]:
    """Chord tones cycled up, down, or up and down over an octave."""
    tones = [*ARPEGGIOS[mode], 12]
    shape = int(rng.integers(3))
    cycle = (tones, tones[::-1], tones + tones[-2:0:-1])[shape]
    return [cycle[i % len(cycle)] for i in range(count)]


def _melody(mode: str, count: int, rng: np.random.Generator) -> list[int]:
    """A walk on the scale that opens with the tones that tell the mode."""
    scale = SCALES[mode]
    degrees = list(rng.permutation(OPENINGS[mode]))
    while len(degrees) < count:
        step = int(rng.choice([-3, -2, -1, 1, 2, 3]))
        degree = int(degrees[-1]) + step
        degrees.append(degree if -2 <= degree <= len(scale) else int(degrees[-1]) - step)
    return [_degree(scale, int(d)) for d in degrees[:count]]
