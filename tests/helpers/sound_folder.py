"""A tiny folder of rendered sound, as `build_sound_dataset` lays it out, from the voices that need no soundfont."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from gencontrol.recipes.sound.data.dataset import CAPTIONS, render
from gencontrol.recipes.sound.data.grammar import INSTRUMENTS, caption, spec_of_item


def write_sound_folder(folder: Path, sizes: Mapping[str, int]) -> Path:
    """Render the first items of each split (name → clips) that a numpy voice plays; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in sizes.items():
        items = (spec_of_item(split, index, 0) for index in itertools.count())
        chosen = itertools.islice((item for item in items if INSTRUMENTS[item[0].instrument][1] is None), size)
        specs, lines = [], []
        for spec, rng in chosen:
            specs.append(spec)
            lines.append(json.dumps({"captions": [caption(spec, rng) for _ in range(CAPTIONS)], **asdict(spec)}))
        np.save(folder / f"{split}.npy", np.round(render(specs) * 32767).astype(np.int16))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder
