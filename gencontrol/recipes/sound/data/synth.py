"""Numpy voices for the instruments that General MIDI does not give: additive, FM, Karplus-Strong, shaped noise.

Every voice is band-limited by construction (harmonics stop below the Nyquist frequency) and returns mono float
samples at 16 kHz.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.signal import lfilter

from gencontrol.recipes.sound.data.grammar import SoundSpec
from gencontrol.recipes.sound.data.score import ONSET_INTERVAL_S, write_score

SAMPLE_RATE = 16000
CLIP_SAMPLES = 32768
WIND_CENTRE_HZ = {"low": 300.0, "middle": 1000.0, "high": 3200.0}
Voice = Callable[[float, float, float, np.random.Generator], np.ndarray]


def render_synth(spec: SoundSpec) -> np.ndarray:
    """The raw clip [32768] of a spec with a numpy voice; its scale is arbitrary, effects come later."""
    rng = np.random.default_rng([spec.seed, 2])
    if spec.instrument == "wind":
        return _wind(spec, rng)
    clip = np.zeros(CLIP_SAMPLES)
    for note in write_score(spec):
        frequency = 440.0 * 2.0 ** ((note.pitch - 69) / 12)
        sound = VOICES[spec.instrument](frequency, note.duration_s, note.velocity / 127, rng)
        start = int(note.start_s * SAMPLE_RATE)
        stop = min(start + len(sound), CLIP_SAMPLES)
        clip[start:stop] += sound[: stop - start] * (note.velocity / 127)
    return clip


def _clock(duration_s: float) -> np.ndarray:
    return np.arange(int(duration_s * SAMPLE_RATE)) / SAMPLE_RATE


def _envelope(clock: np.ndarray, held_s: float, attack_s: float, release_s: float) -> np.ndarray:
    """Linear attack, full sustain, exponential release after `held_s`."""
    rise = np.minimum(clock / attack_s, 1.0)
    fall = np.exp(-np.maximum(clock - held_s, 0.0) / release_s)
    return rise * fall


def _harmonics(frequency: float, clock: np.ndarray, weights: np.ndarray, phase: float) -> np.ndarray:
    """Sum of harmonics k = 1.. with `weights[k-1]`, cut below 7.6 kHz."""
    count = min(len(weights), max(int(7600 / frequency), 1))
    k = np.arange(1, count + 1)
    return weights[:count] @ np.sin(2 * np.pi * frequency * np.outer(k, clock) + phase * k[:, None])


def _square_lead(frequency: float, held_s: float, force: float, rng: np.random.Generator) -> np.ndarray:
    clock = _clock(held_s + 0.06)
    k = np.arange(1, 100)
    weights = np.where(k % 2 == 1, 1.0 / k ** (1.0 + 0.4 * (1 - force)), 0.0)
    return _harmonics(frequency, clock, weights, 0.0) * _envelope(clock, held_s, 0.004, 0.012)


def _saw_pad(frequency: float, held_s: float, force: float, rng: np.random.Generator) -> np.ndarray:
    clock = _clock(held_s + 0.25)
    weights = 1.0 / np.arange(1, 80) ** (1.1 + 0.6 * (1 - force))
    detuned = (0.992, 1.0, 1.009)
    sound = sum(_harmonics(frequency * d, clock, weights, rng.uniform(0, 2 * np.pi)) for d in detuned)
    return sound * _envelope(clock, held_s, min(0.08, 0.4 * held_s), 0.07)


def _sub_bass(frequency: float, held_s: float, force: float, rng: np.random.Generator) -> np.ndarray:
    clock = _clock(held_s + 0.1)
    sound = _harmonics(frequency, clock, np.array([1.0, 0.5, 0.25, 0.1]), rng.uniform(0, 2 * np.pi))
    swell = 0.12 + 0.88 * np.sin(np.pi * np.minimum(clock / (1.09 * held_s), 1.0)) ** 2
    return np.tanh(1.5 * sound) * swell * _envelope(clock, held_s, 0.01, 0.03)


def _fm_bell(frequency: float, held_s: float, force: float, rng: np.random.Generator) -> np.ndarray:
    clock = _clock(1.6)
    index = (1.5 + 3.0 * force) * np.exp(-clock / 0.35)
    sound = np.sin(2 * np.pi * frequency * clock + index * np.sin(2 * np.pi * 3.51 * frequency * clock))
    partial = 0.4 * np.sin(2 * np.pi * 2.76 * frequency * clock) * np.exp(-clock / 0.2)
    return (sound + partial) * np.exp(-clock / 0.45) * np.minimum(clock / 0.002, 1.0)


def _plucked_string(frequency: float, held_s: float, force: float, rng: np.random.Generator) -> np.ndarray:
    """Karplus-Strong: a noise burst in a delay loop with an averaging (damping) filter, interpolated to the pitch."""
    length = int((held_s + 0.5) * SAMPLE_RATE)
    delay = SAMPLE_RATE / frequency
    whole = int(delay - 0.5)
    fraction = delay - 0.5 - whole
    burst = np.zeros(length)
    burst[: whole + 1] = rng.uniform(-1, 1, whole + 1)
    burst = lfilter([0.4 + 0.6 * force, 0.6 - 0.6 * force], [1.0], burst)
    loop = np.zeros(whole + 3)
    loop[0] = 1.0
    loop[whole:] = -0.497 * np.array([1 - fraction, 1.0, fraction])
    clock = np.arange(length) / SAMPLE_RATE
    return lfilter([1.0], loop, burst) * _envelope(clock, held_s + 0.1, 0.001, 0.08)


def _wind(spec: SoundSpec, rng: np.random.Generator) -> np.ndarray:
    """Noise through a band-pass whose centre and gain follow gusts; the gust rate is the tempo."""
    clock = np.arange(CLIP_SAMPLES) / SAMPLE_RATE
    rate = 1.0 / ONSET_INTERVAL_S[spec.tempo]
    gust = 0.5 - 0.5 * np.cos(2 * np.pi * rate * clock + rng.uniform(-0.5, 0.5))
    centre = WIND_CENTRE_HZ[spec.register] * 2.0 ** rng.uniform(-0.25, 0.25)
    hop, size = 128, 512
    window = np.hanning(size + 1)[:size]
    noise = rng.standard_normal(CLIP_SAMPLES + size)
    out = np.zeros(CLIP_SAMPLES + size)
    octaves = np.log2(np.maximum(np.fft.rfftfreq(size, 1 / SAMPLE_RATE), 20.0))
    for start in range(0, CLIP_SAMPLES, hop):
        power = gust[start]
        shape = np.exp(-0.5 * ((octaves - np.log2(centre) - 0.7 * (power - 0.5)) / 0.45) ** 2)
        frame = np.fft.irfft(np.fft.rfft(noise[start : start + size] * window) * shape, size)
        out[start : start + size] += frame * window * (0.06 + 0.94 * power**1.5)
    return out[:CLIP_SAMPLES] * (spec_force(spec))


def spec_force(spec: SoundSpec) -> float:
    """Playing strength in (0, 1] of a spec without notes."""
    return {"soft": 0.4, "loud": 0.9, "crescendo": 0.7}[spec.dynamics]


VOICES: dict[str, Voice] = {
    "square lead": _square_lead,
    "saw pad": _saw_pad,
    "sub-bass drone": _sub_bass,
    "FM bell": _fm_bell,
    "plucked string": _plucked_string,
}
