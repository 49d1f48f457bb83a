"""Sound grammar, scores, MIDI writer, effects and the data set on disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gencontrol.errors import EnvironmentMissing
from gencontrol.recipes.sound.data import ATTRIBUTES, SoundDataset, build_sound_dataset, fluid, sample_captions
from gencontrol.recipes.sound.data.dataset import render
from gencontrol.recipes.sound.data.effects import PEAK, finish
from gencontrol.recipes.sound.data.grammar import INSTRUMENTS, SoundSpec, spec_of_item, split_of
from gencontrol.recipes.sound.data.score import SCALES, write_score
from gencontrol.recipes.sound.data.synth import CLIP_SAMPLES, render_synth

needs_fluidsynth = pytest.mark.skipif(
    shutil.which("fluidsynth") is None or not any(path.exists() for path in fluid.SOUNDFONTS),
    reason="fluidsynth and its soundfont are not installed (apt install fluidsynth fluid-soundfont-gm)",
)


def spec(**changes: object) -> SoundSpec:
    """A square-lead scale, with changes."""
    base = SoundSpec("square lead", "major", "medium", "middle", "loud", "dry", "scale", 60, 5)
    return replace(base, **changes)  # type: ignore[arg-type]


def specs_of(split: str, count: int) -> list[SoundSpec]:
    return [spec_of_item(split, index, 3)[0] for index in range(count)]


def test_splits_share_no_combination_of_attributes() -> None:
    by_split = {split: {s.attributes for s in specs_of(split, 300)} for split in ("train", "val", "test")}
    assert not by_split["train"] & by_split["test"]
    assert not by_split["train"] & by_split["val"]
    assert all(split_of(s) == "test" for s in specs_of("test", 50))


def test_every_class_of_every_attribute_occurs_and_has_a_label() -> None:
    specs = specs_of("train", 600)
    for name, classes in ATTRIBUTES.items():
        assert {s.label(name) for s in specs} - {-1} == set(range(len(classes))), name
    assert all((s.mode == "none") == (s.label("mode") == -1) for s in specs)


def test_captions_are_reproducible_and_varied() -> None:
    captions = sample_captions(300, 0, "train")
    assert captions == sample_captions(300, 0, "train")
    assert captions[:100] == sample_captions(100, 0, "train")
    assert len(set(captions)) > 280
    assert all(c == c.strip() and "  " not in c and " ," not in c for c in captions)


@pytest.mark.parametrize("tempo, notes", [("slow", 3), ("medium", 6), ("fast", 14)])
def test_tempo_sets_the_number_of_notes(tempo: str, notes: int) -> None:
    assert abs(len({n.start_s for n in write_score(spec(tempo=tempo))}) - notes) <= 1


@pytest.mark.parametrize("mode", ATTRIBUTES["mode"])
def test_scale_stays_in_its_mode(mode: str) -> None:
    allowed = {step % 12 for step in SCALES[mode]}
    notes = write_score(spec(mode=mode, tempo="fast"))
    assert {(n.pitch - 60) % 12 for n in notes} <= allowed
    assert notes == sorted(notes, key=lambda n: n.start_s)


def test_synth_pitch_is_that_of_the_score() -> None:
    for name in ("square lead", "plucked string", "FM bell"):
        sound = render_synth(spec(instrument=name, pattern="repeated", mode="none", tempo="slow", root=69))
        spectrum = np.abs(np.fft.rfft(sound[2000:10000] * np.hanning(8000), 65536))
        band = slice(int(380 * 4.096), int(500 * 4.096))
        peak = (np.argmax(spectrum[band]) + band.start) / 4.096
        assert abs(peak - 440) < 6, (name, peak)


def test_dynamics_and_effects_can_be_heard() -> None:
    raw = render_synth(spec())
    peaks = {d: float(np.abs(finish(raw, spec(dynamics=d))).max()) for d in PEAK}
    assert peaks["soft"] < 0.2 < 0.5 < peaks["loud"] <= 1.0
    rising = finish(raw, spec(dynamics="crescendo"))
    assert np.abs(rising[16000:28000]).mean() > 2 * np.abs(rising[:12000]).mean()
    dry = finish(raw, spec())
    assert np.abs(dry[31000:32000]).mean() < 0.1 * np.abs(finish(raw, spec(effect="reverb"))[31000:32000]).mean()
    for effect in ATTRIBUTES["effect"][1:]:
        other = finish(raw, spec(effect=effect))
        assert other.shape == (CLIP_SAMPLES,) and other.dtype == np.float32 and np.abs(other).max() <= 1
        assert np.abs(other - dry).mean() > 0.01, effect


def read_midi(content: bytes) -> list[tuple[int, bytes]]:
    """(tick, message) of a format-0 file that writes every status byte."""
    assert content[:4] == b"MThd" and content[14:18] == b"MTrk"
    assert int.from_bytes(content[18:22], "big") == len(content) - 22
    at, now, events = 22, 0, []
    while at < len(content):
        delta = 0
        while True:
            byte, at = content[at], at + 1
            delta = delta << 7 | byte & 0x7F
            if byte < 0x80:
                break
        now += delta
        size = 3 + content[at + 2] if content[at] == 0xFF else 2 if content[at] >> 4 == 0xC else 3
        events.append((now, content[at : at + size]))
        at += size
    return events


def test_midi_file_holds_the_scores_in_their_slots() -> None:
    specs = [s for s in specs_of("train", 60) if INSTRUMENTS[s.instrument][1] is not None][:8]
    events = read_midi(fluid.midi_file(specs))
    assert events[-1][1] == b"\xff\x2f\x00" and [t for t, _ in events] == sorted(t for t, _ in events)
    for index, item in enumerate(specs):
        start = index * fluid.SLOT_MS
        inside = [(t - start, m) for t, m in events if start <= t < start + fluid.SLOT_MS]
        ons = sorted((t, m[1], m[2]) for t, m in inside if m[0] >> 4 == 9)
        assert ons == sorted((round(n.start_s * 1000), n.pitch, n.velocity) for n in write_score(item))
        assert sum(m[0] >> 4 == 8 for _, m in inside) == len(ons)
        drum = item.instrument == "drum kit"
        assert all((m[0] & 15 == 9) == drum for _, m in inside if m[0] >> 4 == 9)


def test_missing_program_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(EnvironmentMissing, match="apt install fluidsynth fluid-soundfont-gm"):
        fluid.find_fluidsynth()


@needs_fluidsynth
def test_fluid_clips_start_on_time_and_end_in_silence() -> None:
    item = spec(instrument="piano", pattern="repeated", mode="none", tempo="slow")
    clips = fluid.render_fluid([item, replace(item, instrument="church organ"), item])
    assert clips.shape == (3, CLIP_SAMPLES)
    assert np.abs(clips[0] - clips[2]).max() < 0.05 * np.abs(clips[0]).max()  # nothing of slot 1 is left in slot 2
    assert np.abs(clips[0, :200]).max() < 0.02 * np.abs(clips[0]).max() < np.abs(clips[0, 320:1200]).max()


def test_dataset_builds_resumes_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(specs: list[SoundSpec]) -> np.ndarray:
        return np.stack([render_synth(spec(root=s.root, instrument="square lead", tempo="slow")) for s in specs])

    monkeypatch.setattr(fluid, "render_fluid", fake)
    sizes = {"train": 6, "val": 2, "test": 3}
    build_sound_dataset(tmp_path, **sizes, seed=1, workers=1)
    first = (tmp_path / "train.npy").read_bytes()
    (tmp_path / "train.npy").unlink()
    build_sound_dataset(tmp_path, **sizes, seed=1, workers=1)
    assert (tmp_path / "train.npy").read_bytes() == first
    assert json.loads((tmp_path / "recipe.json").read_text())["sizes"] == sizes
    data = SoundDataset.load(tmp_path, "train")
    wave = data.waveforms([4, 1])
    assert wave.shape == (2, CLIP_SAMPLES) and float(wave.abs().max()) <= 1
    assert len(data) == len(data.captions) == 6 and len(data.captions[0]) == 3
    expected = render([spec_of_item("train", 4, 1)[0]])[0]
    assert np.abs(wave[0].numpy() - expected).max() < 1e-4
    assert data.labels["instrument"][4] == data.specs[4].label("instrument")
    with pytest.raises(ValueError, match="another recipe"):
        build_sound_dataset(tmp_path, **{**sizes, "train": 7}, seed=1, workers=1)
    with pytest.raises(FileNotFoundError, match="build_sound_dataset"):
        SoundDataset.load(tmp_path / "none", "train")
