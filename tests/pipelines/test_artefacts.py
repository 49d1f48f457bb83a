"""The picture of a sound: a tone is bright where its pitch is, at its time, and nowhere else."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from gencontrol.pipelines.artefacts import spectrogram_png


def _brightness(wave: torch.Tensor) -> np.ndarray:
    """Sum of the colours [h, w]; the ramp rises in it from floor to peak."""
    return np.asarray(Image.open(io.BytesIO(spectrogram_png(wave))), dtype=float).sum(-1)


@pytest.mark.parametrize("hertz", [110.0, 440.0, 3000.0])
def test_a_tone_lies_at_its_pitch(hertz: float) -> None:
    time = torch.arange(16000) / 16000
    picture = _brightness(0.5 * torch.sin(2 * math.pi * hertz * time))
    row = picture[:, 100:400].mean(1).argmax()
    height = picture.shape[0]
    expected = height - 1 - height * math.log(hertz / 50.0) / math.log(160.0)
    # 1024 samples resolve 16 Hz, which is two musical tones at 110 Hz: 7 rows of 144
    assert abs(row - expected) <= (7 if hertz < 200 else 3)


def test_silence_is_black_beside_sound() -> None:
    wave = torch.zeros(16000)
    wave[8000:] = torch.sin(2 * math.pi * 440 * torch.arange(8000) / 16000)
    picture = _brightness(wave)
    width = picture.shape[1]
    assert picture[:, : width // 2 - 30].max() == picture.min()
    assert picture[:, width // 2 + 30 :].max() > 600


def test_short_and_silent_sounds_have_pictures() -> None:
    assert _brightness(torch.randn(100, generator=torch.Generator().manual_seed(0))).shape[0] == 144
    assert _brightness(torch.zeros(4000)).shape[0] == 144
