"""General MIDI timbres through the `fluidsynth` command line: one standard MIDI file and one call per shard.

Clips sit in time slots of 2.5 s; at the end of the audible part every channel gets "all sound off", so no tail
reaches the next slot.  Rendering runs at 32 kHz and is halved with an anti-alias filter.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

from gencontrol.recipes.sound.data.grammar import INSTRUMENTS, SoundSpec
from gencontrol.recipes.sound.data.score import write_score
from gencontrol.recipes.sound.data.synth import CLIP_SAMPLES, SAMPLE_RATE

SOUNDFONTS = (Path("/usr/share/sounds/sf2/FluidR3_GM.sf2"), Path("/usr/share/sounds/sf2/default-GM.sf2"))
SLOT_MS, SILENCE_AT_MS, RENDER_RATE, DRUM_CHANNEL = 2500, 2100, 2 * SAMPLE_RATE, 9
ALL_SOUND_OFF_CC = 120


def find_fluidsynth() -> tuple[str, Path]:
    """Path of the program and of the soundfont; `EnvironmentMissing` where one is absent."""
    program = shutil.which("fluidsynth")
    font = next((path for path in SOUNDFONTS if path.exists()), None)
    if program is None or font is None:
        from gencontrol.errors import EnvironmentMissing

        absent = "the program fluidsynth" if program is None else "the soundfont FluidR3_GM.sf2"
        raise EnvironmentMissing(f"{absent} is missing: apt install fluidsynth fluid-soundfont-gm")
    return program, font


def render_fluid(specs: Sequence[SoundSpec]) -> np.ndarray:
    """Raw clips [b, 32768] float32 of specs with General MIDI timbres, in order; scale as the soundfont gives it."""
    program, font = find_fluidsynth()
    with tempfile.TemporaryDirectory() as folder:
        song, audio = Path(folder, "song.mid"), Path(folder, "song.raw")
        song.write_bytes(midi_file(specs))
        options = ["-ni", "-q", "-R", "0", "-C", "0", "-g", "0.35", "-r", str(RENDER_RATE)]
        options += ["-T", "raw", "-O", "s16", "-E", "little", "-F", str(audio)]
        call = [program, *options, str(font), str(song)]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not audio.exists():
            from gencontrol.errors import EnvironmentMissing

            raise EnvironmentMissing(
                f"fluidsynth failed: {done.stderr.strip()[-300:]}; try it by hand: {' '.join(call)}"
            )
        stereo = np.fromfile(audio, dtype="<i2").reshape(-1, 2)
    return _slice(stereo, len(specs))


def _slice(stereo: np.ndarray, count: int) -> np.ndarray:
    """Cut [samples, 2] int16 at 32 kHz into mono clips [count, 32768] at 16 kHz."""
    slot = SLOT_MS * RENDER_RATE // 1000
    needed = (count - 1) * slot + 2 * CLIP_SAMPLES
    if len(stereo) < needed:
        stereo = np.pad(stereo, ((0, needed - len(stereo)), (0, 0)))
    clips = np.empty((count, CLIP_SAMPLES), np.float32)
    for index in range(count):
        part = stereo[index * slot : index * slot + 2 * CLIP_SAMPLES].astype(np.float32).mean(1) / 32768
        clips[index] = resample_poly(part, 1, 2)
    return clips


def midi_file(specs: Sequence[SoundSpec]) -> bytes:
    """A standard MIDI file, format 0, one tick per millisecond, clip i starting at i * 2500 ms."""
    events: list[tuple[int, int, bytes]] = []  # (tick, order within the tick, message)
    for index, spec in enumerate(specs):
        events += _slot_events(index * SLOT_MS, spec)
    events.sort(key=lambda event: event[:2])
    track = bytearray(b"\x00\xff\x51\x03" + (1_000_000).to_bytes(3, "big"))  # 1 s per quarter
    now = 0
    for tick, _, message in events:
        track += _varlen(tick - now) + message
        now = tick
    track += _varlen(SLOT_MS * len(specs) - now) + b"\xff\x2f\x00"
    header = b"MThd" + struct.pack(">IHHH", 6, 0, 1, 1000)
    return header + b"MTrk" + struct.pack(">I", len(track)) + bytes(track)


def _slot_events(offset_ms: int, spec: SoundSpec) -> list[tuple[int, int, bytes]]:
    """Program change, notes and "all sound off" of one clip; order 0 before 1 before 2 within a tick."""
    channel = DRUM_CHANNEL if spec.instrument == "drum kit" else 0
    program = INSTRUMENTS[spec.instrument][1]
    if program is None:
        raise ValueError(f"{spec.instrument} has no General MIDI timbre: use synth.render_synth")
    events = [(offset_ms, 0, bytes((0xC0 | channel, program)))]
    for note in write_score(spec):
        start = offset_ms + round(note.start_s * 1000)
        stop = start + max(round(note.duration_s * 1000), 1)
        events.append((start, 2, bytes((0x90 | channel, note.pitch, note.velocity))))
        events.append((stop, 1, bytes((0x80 | channel, note.pitch, 0))))
    events.append((offset_ms + SILENCE_AT_MS, 0, bytes((0xB0 | channel, ALL_SOUND_OFF_CC, 0))))
    return events


def _varlen(value: int) -> bytes:
    """MIDI's variable-length number: seven bits a byte, high bit set on all but the last."""
    out = [value & 0x7F]
    while value := value >> 7:
        out.append((value & 0x7F) | 0x80)
    return bytes(reversed(out))
