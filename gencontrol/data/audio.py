"""Audio files and plain waveform operations: reading, writing, mono mix, resampling, chunks.

A waveform is a float32 tensor in [-1, 1], [n] or [channels n], with its rate in Hz beside it.  Reading and writing
files needs `soundfile` (extra `audio`), imported inside the functions; `wav_bytes` needs only the standard library.
Resampling is windowed-sinc interpolation (Smith, "Digital Audio Resampling", 2002; Kaiser window, derived here), a
linear map written as one strided convolution per phase, so it is differentiable and batched.
"""

from __future__ import annotations

import io
import math
import wave as _wave
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import EnvironmentMissing, UsageError

#: File name endings that `list_audio` takes as sound.
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif")

_ZERO_CROSSINGS = 24
_KAISER_BETA = 12.0
_ROLLOFF = 0.945


def _soundfile() -> Any:
    """Return the soundfile module or say how to install it."""
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise EnvironmentMissing(
            f"reading and writing audio files needs soundfile ({error}); install it: pip install 'gencontrol[audio]'."
        ) from error
    return soundfile


def list_audio(folder: str | Path) -> list[Path]:
    """Return all audio files under a folder, at any depth, in sorted order.

    Raises:
        UsageError: the path is not a folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"'{folder}' is not a folder; give one that holds {', '.join(AUDIO_SUFFIXES[:3])} files.")
    return sorted(path for path in root.rglob("*") if path.is_file() and path.suffix.lower() in AUDIO_SUFFIXES)


def read_audio(path: str | Path, *, max_seconds: float | None = None) -> tuple[Float[Tensor, "c n"], int]:
    """Read a wav, flac, mp3, ogg, opus or aiff file as float32 in [-1, 1]; returns (samples, rate in Hz).

    Args:
        max_seconds: read no more than this from the start; None reads all.

    Raises:
        UsageError: no such file, not sound, or without a single sample.
        EnvironmentMissing: soundfile is not installed.
    """
    soundfile = _soundfile()
    if not Path(path).is_file():
        raise UsageError(f"audio file '{path}' does not exist.")
    try:
        with soundfile.SoundFile(str(path)) as file:
            rate = int(file.samplerate)
            frames = -1 if max_seconds is None else max(1, round(max_seconds * rate))
            data = file.read(frames, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise UsageError(f"'{path}' cannot be read as sound ({error}); expected wav, flac, mp3 or ogg.") from error
    if data.shape[0] == 0:
        raise UsageError(f"'{path}' holds no samples.")
    return torch.from_numpy(data.T.copy()), rate


def write_audio(path: str | Path, samples: Float[Tensor, "*c n"], sampling_rate: int) -> None:
    """Write a sound file (wav, flac, ogg or mp3 by its ending); wav files are written without soundfile.

    Raises:
        UsageError: an unknown ending, or samples that `wav_bytes` refuses.
        EnvironmentMissing: soundfile is needed and not installed.
    """
    target = Path(path)
    if target.suffix.lower() == ".wav":
        target.write_bytes(wav_bytes(samples, sampling_rate))
        return
    _check_samples(samples)
    soundfile = _soundfile()
    kind = target.suffix.lower().lstrip(".").upper()
    if kind not in soundfile.available_formats():
        raise UsageError(f"'{path}' has an unknown ending; use .wav, .flac, .ogg or .mp3.")
    frames = samples.detach().clamp(-1, 1).float().cpu().reshape(-1, samples.shape[-1]).T.numpy()
    soundfile.write(str(target), frames, int(sampling_rate), format=kind)


def _check_samples(samples: Tensor) -> None:
    """Raise UsageError unless the tensor is one finite sound, [n] or [channels n]."""
    if samples.ndim not in (1, 2) or samples.shape[-1] == 0:
        raise UsageError(f"one sound is a tensor [n] or [channels n] with n > 0, not {list(samples.shape)}.")
    if not bool(torch.isfinite(samples).all()):
        raise UsageError("the sound holds NaN or infinite samples; it cannot be written.")


def wav_bytes(samples: Float[Tensor, "*c n"], sampling_rate: int) -> bytes:
    """Return a 16-bit PCM WAV file of one sound ([n] or [channels n], clipped to [-1, 1]), standard library only.

    Raises:
        UsageError: wrong shape, no samples, or non-finite values.
    """
    _check_samples(samples)
    channels = samples.detach().float().cpu().reshape(-1, samples.shape[-1])
    pcm = (channels * 32768.0).round().clamp(-32768, 32767).to(torch.int16).T.contiguous()
    buffer = io.BytesIO()
    with _wave.open(buffer, "wb") as file:
        file.setnchannels(pcm.shape[1])
        file.setsampwidth(2)
        file.setframerate(int(sampling_rate))
        file.writeframes(pcm.numpy().astype("<i2").tobytes())
    return buffer.getvalue()


def to_mono(samples: Float[Tensor, "b *c n"]) -> Float[Tensor, "b n"]:
    """Average the channels of a batch [b n] or [b c n].

    Raises:
        UsageError: another number of axes, or no samples.
    """
    if samples.ndim not in (2, 3) or samples.shape[-1] == 0:
        raise UsageError(f"audio is a tensor [b n] or [b channels n] with n > 0, not {list(samples.shape)}.")
    return samples.mean(dim=1) if samples.ndim == 3 else samples


@lru_cache(maxsize=32)
def _sinc_kernel(up: int, down: int) -> tuple[Tensor, int]:
    """Polyphase filters [up 1 taps] float64 and the left padding in input samples (derived: windowed sinc).

    Output sample k·up + p sits at input position k·down + p·down/up; its value is the input convolved with a low-pass
    sinc whose cutoff is the lower of both Nyquist frequencies, times a roll-off for the transition band.
    """
    cutoff = _ROLLOFF * min(1.0, up / down)
    half = _ZERO_CROSSINGS / cutoff
    width = math.ceil(half)
    taps = torch.arange(-width, width + down, dtype=torch.float64)
    phase = torch.arange(up, dtype=torch.float64)[:, None] * down / up
    offset = taps[None, :] - phase
    inside = (1 - (offset / half).square()).clamp_min(0).sqrt()
    beta = torch.tensor(_KAISER_BETA, dtype=torch.float64)
    window = torch.special.i0(beta * inside) / torch.special.i0(beta) * (offset.abs() <= half)
    kernel = cutoff * torch.sinc(cutoff * offset) * window
    return (kernel / kernel.sum(dim=1, keepdim=True))[:, None, :], width


def resample(samples: Float[Tensor, "*b n"], rate: int, new_rate: int) -> Float[Tensor, "*b m"]:
    """Change the sampling rate along the last axis; m = ceil(n·new_rate/rate); differentiable, deterministic.

    Raises:
        UsageError: a rate that is not a positive whole number.
    """
    if int(rate) != rate or int(new_rate) != new_rate or rate <= 0 or new_rate <= 0:
        raise UsageError(f"sampling rates are positive whole numbers of Hz, not {rate} and {new_rate}.")
    if rate == new_rate:
        return samples
    common = math.gcd(int(rate), int(new_rate))
    up, down = int(new_rate) // common, int(rate) // common
    kernel, width = _sinc_kernel(up, down)
    length = samples.shape[-1]
    flat = torch.nn.functional.pad(samples.reshape(-1, 1, length), (width, width + down))
    phases = torch.nn.functional.conv1d(flat, kernel.to(flat), stride=down)
    wave = phases.transpose(1, 2).reshape(flat.shape[0], -1)
    return wave[:, : -(-length * up // down)].reshape(*samples.shape[:-1], -1)


def chunk_starts(length: int, size: int, hop: int) -> list[int]:
    """First samples of the windows of `size` every `hop` that cover a clip; the last window ends with the clip.

    A clip shorter than `size` has the one window that starts at 0.
    """
    if length <= size:
        return [0]
    starts = list(range(0, length - size + 1, hop))
    return starts if starts[-1] + size >= length else [*starts, length - size]


def chunks(samples: Float[Tensor, "b n"], starts: Sequence[int], size: int) -> Float[Tensor, "b k m"]:
    """Cut windows of `size` at the given starts; m is the smaller of `size` and n."""
    return torch.stack([samples[:, start : start + size] for start in starts], dim=1)
