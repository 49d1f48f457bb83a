"""Finishing of a raw clip: swell, effect, loudness.  The same code serves numpy voices and General MIDI ones.

Input and output are mono float arrays [32768] at 16 kHz; the output's peak is set by the dynamics, so a soft clip
stays softer than a loud one in the data set.
"""

from __future__ import annotations

import numpy as np
from scipy.signal import butter, fftconvolve, lfilter, sosfilt

from gencontrol.recipes.sound.data.grammar import SoundSpec
from gencontrol.recipes.sound.data.score import write_score
from gencontrol.recipes.sound.data.synth import SAMPLE_RATE

PEAK = {"soft": 0.16, "loud": 0.92, "crescendo": 0.75}
MUFFLED_CUT_HZ = {"low": 220.0, "middle": 520.0, "high": 1100.0}
ECHO_S, TREMOLO_HZ, REVERB_S = 0.23, 11.0, 1.1


def finish(raw: np.ndarray, spec: SoundSpec) -> np.ndarray:
    """Swell, effect and loudness of a raw clip; float32 [n] in [-1, 1]."""
    rng = np.random.default_rng([spec.seed, 3])
    sound = raw / max(float(np.abs(raw).max()), 1e-6)
    sound = _articulate(sound, spec)
    if spec.dynamics == "crescendo":
        sound = sound * 10 ** (np.linspace(-24.0, 0.0, len(sound)) / 20)
    sound = EFFECTS[spec.effect](sound, spec, rng)
    fade = np.minimum(np.arange(len(sound))[::-1] / 320, 1.0)
    sound = sound * fade
    peak = PEAK[spec.dynamics] * float(rng.uniform(0.88, 1.07))
    return (sound * (peak / max(float(np.abs(sound).max()), 1e-6))).astype(np.float32)


def _articulate(sound: np.ndarray, spec: SoundSpec) -> np.ndarray:
    """Dip the level for 50 ms before each onset, so that slow attacks and releases do not blur the tempo."""
    if spec.instrument == "wind":
        return sound
    clock = np.arange(len(sound)) / SAMPLE_RATE
    gain = np.ones(len(sound))
    for start in {note.start_s for note in write_score(spec)}:
        distance = np.clip(np.abs(clock - (start - 0.025)) / 0.028, 0.0, 1.0)
        gain = np.minimum(gain, 0.06 + 0.94 * np.sin(0.5 * np.pi * distance) ** 2)
    return sound * gain


def _dry(sound: np.ndarray, spec: SoundSpec, rng: np.random.Generator) -> np.ndarray:
    return sound


def _reverb(sound: np.ndarray, spec: SoundSpec, rng: np.random.Generator) -> np.ndarray:
    """Convolution with decaying noise (60 dB in about 1.9 s) beside the direct sound, so that onsets stay clear."""
    clock = np.arange(int(REVERB_S * SAMPLE_RATE)) / SAMPLE_RATE
    room = rng.standard_normal(len(clock)) * np.exp(-clock / 0.28)
    room = lfilter([0.6], [1.0, -0.4], room)
    wet = fftconvolve(sound, room)[: len(sound)]
    return sound / _rms(sound) + 0.6 * wet / _rms(wet)


def _echo(sound: np.ndarray, spec: SoundSpec, rng: np.random.Generator) -> np.ndarray:
    """Distinct repeats; the source is gated so that the repeats fall into silence."""
    delay = int(ECHO_S * float(rng.uniform(0.95, 1.05)) * SAMPLE_RATE)
    out = sound.copy()
    for repeat in range(1, 5):
        out[repeat * delay :] += 0.7**repeat * sound[: len(sound) - repeat * delay]
    return out


def _tremolo(sound: np.ndarray, spec: SoundSpec, rng: np.random.Generator) -> np.ndarray:
    clock = np.arange(len(sound)) / SAMPLE_RATE
    rate = TREMOLO_HZ * float(rng.uniform(0.92, 1.08))
    return sound * (0.53 - 0.47 * np.cos(2 * np.pi * rate * clock + rng.uniform(0, 2 * np.pi)))


def _muffled(sound: np.ndarray, spec: SoundSpec, rng: np.random.Generator) -> np.ndarray:
    cut = MUFFLED_CUT_HZ[spec.register] * float(rng.uniform(0.9, 1.1))
    return sosfilt(butter(4, cut, fs=SAMPLE_RATE, output="sos"), sound)


def _distorted(sound: np.ndarray, spec: SoundSpec, rng: np.random.Generator) -> np.ndarray:
    """Asymmetric soft clipping of a level-following drive, so that quiet notes distort too."""
    level = np.sqrt(lfilter([0.002], [1.0, -0.998], sound**2) + 1e-5)
    driven = np.tanh(6.0 * sound / level + 0.6) - np.tanh(0.6)
    return lfilter([1.0, -1.0], [1.0, -0.995], driven * level**0.8)


def _rms(sound: np.ndarray) -> float:
    return float(np.sqrt(np.mean(sound**2)) + 1e-9)


EFFECTS = {
    "dry": _dry,
    "reverb": _reverb,
    "echo": _echo,
    "tremolo": _tremolo,
    "muffled": _muffled,
    "distorted": _distorted,
}
