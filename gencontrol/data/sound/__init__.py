"""The bundled sound data: a grammar of short clips, its renderers and the data set made from them.

Clips are mono, 16 kHz, 2.048 s (32768 samples), float32 in [-1, 1]; on disk they are int16.  `grammar` says
what a clip is and how people describe it, `score` turns a description into notes, `synth` and `fluid` turn
notes into sound (numpy voices and General MIDI timbres), `effects` finishes the clip, `dataset` stores it.
"""

from gencontrol.data.sound.dataset import SoundDataset, build_sound_dataset
from gencontrol.data.sound.grammar import ATTRIBUTES, SoundSpec, caption, sample_captions, sample_spec

__all__ = [
    "ATTRIBUTES",
    "SoundDataset",
    "SoundSpec",
    "build_sound_dataset",
    "caption",
    "sample_captions",
    "sample_spec",
]
