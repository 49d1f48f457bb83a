"""The bundled sound data: a grammar of short clips, its renderers and the data set made from them.

Clips are mono, 16 kHz, 2.048 s (32768 samples), float32 in [-1, 1]; on disk they are int16.  `grammar` says
what a clip is and how people describe it, `score` turns a description into notes, `synth` and `fluid` turn
notes into sound (numpy voices and General MIDI timbres), `effects` finishes the clip, `dataset` stores it.
Names are imported when they are asked for: prompts need no renderer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gencontrol.recipes.sound.data.dataset import SoundDataset, build_sound_dataset
    from gencontrol.recipes.sound.data.grammar import ATTRIBUTES, SoundSpec, caption, sample_captions, sample_spec

__all__ = [
    "ATTRIBUTES",
    "SoundDataset",
    "SoundSpec",
    "build_sound_dataset",
    "caption",
    "sample_captions",
    "sample_spec",
]


def __getattr__(name: str) -> Any:
    """Import an exported name when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "dataset" if name in ("SoundDataset", "build_sound_dataset") else "grammar"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
