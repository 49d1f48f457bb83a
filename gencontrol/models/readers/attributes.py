"""AttributeNet: a small convolutional judge of sound clips, independent of CLAP.

Its front-end is a log-frequency spectrogram with two bands per semitone, on which a transposition is a shift, so that
intervals (hence modes) look alike in every key.  Two-dimensional convolutions, then dilated convolutions over time,
give one 128-d vector per 64 ms; their mean is the clip's embedding, and linear heads on it classify the attributes.
It serves as second encoder for distribution rewards and as a judge that no reward was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gencontrol.errors import UsageError
from gencontrol.models.folders import read_config, read_weights, write_model
from gencontrol.models.readers.spectral import pad_clip, semitone_filterbank, stft


@dataclass(frozen=True)
class AttributeNetConfig:
    """Settings; `classes` maps each attribute to its class names."""

    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sampling_rate: int = 16000
    n_fft: int = 2048
    hop: int = 256
    bands: int = 160
    low_hz: float = 62.0
    widths: tuple[int, ...] = (24, 48, 80, 112)
    dim: int = 128
    dilations: tuple[int, ...] = (1, 3, 9)


class _Block(nn.Module):
    """Strided convolution, group norm, GELU."""

    def __init__(self, inside: int, outside: int, stride: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm = nn.GroupNorm(8, outside)

    def forward(self, x: Float[Tensor, "b c f t"]) -> Float[Tensor, "b c2 f2 t2"]:
        return F.gelu(self.norm(self.conv(x)))


class _Temporal(nn.Module):
    """Residual dilated convolution over time."""

    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, dim)
        self.conv = nn.Conv1d(dim, dim, 3, padding=dilation, dilation=dilation)

    def forward(self, x: Float[Tensor, "b d t"]) -> Float[Tensor, "b d t"]:
        return x + F.gelu(self.conv(self.norm(x)))


class AttributeNet(nn.Module):
    """Waveforms [b, n] at 16 kHz in [-1, 1] -> class logits per attribute and 128-d embeddings."""

    filters: Tensor
    window: Tensor
    centre: Tensor
    spread: Tensor

    def __init__(self, config: AttributeNetConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.register_buffer(
            "filters", semitone_filterbank(c.bands, 24, c.n_fft, c.sampling_rate, c.low_hz), persistent=False
        )
        self.register_buffer("window", torch.hann_window(c.n_fft), persistent=False)
        self.register_buffer("centre", torch.tensor(-8.8))
        self.register_buffer("spread", torch.tensor(2.4))
        strides = ((2, 1), (2, 2), (2, 2), (2, 1))
        widths = (1, *c.widths)
        self.trunk = nn.Sequential(*(_Block(widths[i], widths[i + 1], strides[i]) for i in range(len(strides))))
        self.join = nn.Conv1d(c.widths[-1] * (c.bands // 16), c.dim, 1)
        self.temporal = nn.Sequential(*(_Temporal(c.dim, d) for d in c.dilations))
        self.norm = nn.GroupNorm(1, c.dim)
        self.heads = nn.ModuleDict({name: nn.Linear(c.dim, len(names)) for name, names in c.classes.items()})

    def features(self, wave: Float[Tensor, "b n"]) -> Float[Tensor, "b 1 bands frames"]:
        """Natural logarithm of band magnitudes, centred and scaled; n / 256 frames."""
        c = self.config
        if wave.ndim != 2 or wave.shape[1] < c.n_fft:
            raise UsageError(f"waveform has shape {tuple(wave.shape)}; expected [batch, n] with n >= {c.n_fft}.")
        with torch.autocast(wave.device.type, enabled=False):
            magnitude = stft(pad_clip(wave.float(), c.n_fft, c.hop), self.window, c.hop).abs()
            return ((torch.log(self.filters @ magnitude + 1e-5) - self.centre) / self.spread)[:, None]

    def frames_of(self, features: Float[Tensor, "b 1 bands frames"]) -> Float[Tensor, "b t d"]:
        """Frame embeddings of precomputed features, one per four frames."""
        maps = self.trunk(features)
        frames = self.temporal(self.join(maps.flatten(1, 2)))
        return self.norm(frames).transpose(1, 2)

    def embed(self, wave: Float[Tensor, "b n"]) -> Float[Tensor, "b t d"]:
        """Embeddings of the clip's parts, one per 64 ms (each sees the whole clip around it, sharpest nearby)."""
        return self.frames_of(self.features(wave))

    def embed_clip(self, wave: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        """One embedding per clip: the mean over its parts, the layer before the heads."""
        return self.embed(wave).mean(1)

    def classify(self, embedding: Float[Tensor, "b d"]) -> dict[str, Float[Tensor, "b classes"]]:
        """Logits of every attribute from clip embeddings."""
        return {name: head(embedding) for name, head in self.heads.items()}

    def forward(self, wave: Float[Tensor, "b n"]) -> dict[str, Float[Tensor, "b classes"]]:
        """Logits of every attribute."""
        return self.classify(self.embed_clip(wave))

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and model.safetensors (float16 halves the size; loading gives float32)."""
        weights = {name: value.to(dtype) for name, value in self.state_dict().items()}
        write_model(folder, "AttributeNet", asdict(self.config), weights)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> AttributeNet:
        """Load a folder that `save_pretrained` wrote, in float32.

        Raises:
            UsageError: no such folder, or that of another class.
        """
        table = read_config(folder, "AttributeNet")
        table["classes"] = {name: tuple(names) for name, names in table["classes"].items()}
        table |= {key: tuple(table[key]) for key in ("widths", "dilations")}
        with torch.random.fork_rng(devices=[]):  # the initial draw is overwritten; leave the global stream alone
            net = cls(AttributeNetConfig(**table))
        net.load_state_dict({name: tensor.float() for name, tensor in read_weights(folder).items()})
        return net.eval()


def build_attribute_net(seed: int, classes: Mapping[str, tuple[str, ...]]) -> AttributeNet:
    """A freshly initialised net; a pure function of its arguments (the global generator is put back)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AttributeNet(AttributeNetConfig(classes=dict(classes))).eval()
