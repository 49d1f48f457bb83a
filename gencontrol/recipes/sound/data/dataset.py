"""The rendered sound data set: resumable build into one memory-mapped file per split, and its reader.

Item i of a split is a pure function of (seed, split, i), so shards can be made in any order, by any number of
workers, and again after a cut: run the same command and finished shards are kept.  Files appear by rename only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.files import FileLayer, replacing
from gencontrol.recipes.sound.data.grammar import ATTRIBUTES, INSTRUMENTS, SoundSpec, caption, spec_of_item
from gencontrol.recipes.sound.data.synth import CLIP_SAMPLES, SAMPLE_RATE, render_synth

SHARD, CAPTIONS, RECIPE_VERSION = 250, 3, 1


def render(specs: Sequence[SoundSpec]) -> np.ndarray:
    """Finished clips [b, 32768] float32 in [-1, 1] of any specs."""
    from gencontrol.recipes.sound.data.effects import finish
    from gencontrol.recipes.sound.data.fluid import render_fluid

    midi = [i for i, spec in enumerate(specs) if INSTRUMENTS[spec.instrument][1] is not None]
    raw: dict[int, np.ndarray] = {}
    if midi:
        raw = dict(zip(midi, render_fluid([specs[i] for i in midi]), strict=True))
    clips = [finish(raw[i] if i in raw else render_synth(spec), spec) for i, spec in enumerate(specs)]
    return np.stack(clips)


def build_sound_dataset(
    folder: str | Path, *, train: int = 12000, val: int = 500, test: int = 1000, seed: int = 0, workers: int = 2
) -> Path:
    """Render the splits into `folder` (`train.npy` int16 [n, 32768], `train.jsonl`, ..., `recipe.json`); resumable."""
    folder = Path(folder)
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    sizes = {"train": train, "val": val, "test": test}
    recipe = {"version": RECIPE_VERSION, "seed": seed, "sizes": sizes, "sampling_rate": SAMPLE_RATE}
    recipe |= {"samples": CLIP_SAMPLES, "captions": CAPTIONS, "shard": SHARD}
    # Refuse to mix two recipes in one folder.
    path = folder / "recipe.json"
    if path.exists() and json.loads(path.read_text()) != recipe:
        raise ValueError(f"{path} records another recipe than {recipe}: choose an empty folder or repeat its settings")
    FileLayer().replace_file(path, json.dumps(recipe, indent=1).encode())
    jobs = [
        (folder, split, start, min(start + SHARD, size), seed)
        for split, size in sizes.items()
        if not (folder / f"{split}.npy").exists()
        for start in range(0, size, SHARD)
    ]
    with ProcessPoolExecutor(workers) as pool:
        for job, _ in zip(jobs, pool.map(_render_shard, jobs), strict=True):
            print(f"rendered {job[1]} {job[2]}..{job[3]}", flush=True)
    for split, size in sizes.items():
        _write_rows(folder / f"{split}.jsonl", split, size, seed)
        _join_shards(folder, split, size)
    return folder


def _shard_path(folder: Path, split: str, start: int) -> Path:
    return folder / "shards" / f"{split}_{start:06d}.npy"


def _render_shard(job: tuple[Path, str, int, int, int]) -> None:
    folder, split, start, stop, seed = job
    path = _shard_path(folder, split, start)
    if path.exists():
        return
    clips = render([spec_of_item(split, index, seed)[0] for index in range(start, stop)])
    with replacing(path) as staged:
        np.save(staged, np.round(clips * 32767).astype(np.int16))


def _join_shards(folder: Path, split: str, size: int) -> None:
    """Copy the shards into one memory-mapped file and drop them."""
    target = folder / f"{split}.npy"
    if target.exists():
        return
    starts = range(0, size, SHARD)
    with replacing(target) as staged:
        whole = np.lib.format.open_memmap(staged, "w+", np.int16, (size, CLIP_SAMPLES))
        for start in starts:
            shard = np.load(_shard_path(folder, split, start), mmap_mode="r")
            whole[start : start + len(shard)] = shard
        whole.flush()
        del whole
    for start in starts:
        _shard_path(folder, split, start).unlink()


def _write_rows(path: Path, split: str, size: int, seed: int) -> None:
    lines = []
    for index in range(size):
        spec, rng = spec_of_item(split, index, seed)
        captions = [caption(spec, rng) for _ in range(CAPTIONS)]
        lines.append(json.dumps({"captions": captions, **asdict(spec)}))
    FileLayer().replace_file(path, ("\n".join(lines) + "\n").encode())


@dataclass(frozen=True)
class SoundDataset:
    """One split in memory-mapped form.

    `captions[i]` are the wordings of clip i; `labels[attribute]` is an int64 array [n] of classes of `ATTRIBUTES`,
    -1 where the attribute does not apply; `specs[i]` is what was rendered.
    """

    pcm: np.ndarray
    captions: list[list[str]]
    labels: dict[str, np.ndarray]
    specs: list[SoundSpec]

    @classmethod
    def load(cls, folder: str | Path, split: str) -> SoundDataset:
        """Open the split "train", "val" or "test" of a folder made by `build_sound_dataset`."""
        path = Path(folder) / f"{split}.npy"
        if not path.exists():
            raise FileNotFoundError(f"no sound data at {path}: build_sound_dataset({str(folder)!r}) makes it")
        rows = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
        captions = [row.pop("captions") for row in rows]
        specs = [SoundSpec(**row) for row in rows]
        labels = {name: np.array([spec.label(name) for spec in specs]) for name in ATTRIBUTES}
        return cls(np.load(path, mmap_mode="r"), captions, labels, specs)

    def __len__(self) -> int:
        return len(self.pcm)

    def waveforms(self, indices: Sequence[int] | np.ndarray) -> Float[Tensor, "b n"]:
        """Clips at 16 kHz, float32 in [-1, 1]."""
        return torch.from_numpy(self.pcm[np.asarray(indices)].astype(np.float32) / 32767)
