"""Features of a sound split, computed once and kept in half precision beside the clips."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.files import feed, replacing
from gencontrol.recipes.sound.data.dataset import SoundDataset

if TYPE_CHECKING:
    from gencontrol.models.networks.codec import MelCodec

Waves = Float[Tensor, "b n"]
CHUNK = 32


def cached_features(
    dataset: SoundDataset,
    folder: str | Path,
    name: str,
    settings: str,
    compute: Callable[[Waves], Float[Tensor, "b *d"]],
    *,
    limit: int | None = None,
    poll: Callable[[], None] | None = None,
) -> np.ndarray:
    """Memory-mapped float16 array [n, *d] of `compute` over the first `limit` clips, made on the first call.

    The file's name holds a digest of `settings`, which must tell everything that `compute` depends on.
    """
    count = len(dataset) if limit is None else min(limit, len(dataset))
    digest = hashlib.sha256(f"{settings}|{count}".encode()).hexdigest()[:10]
    path = Path(folder) / "cache" / f"{name}_{digest}.npy"
    if not path.exists():
        _fill(dataset, path, compute, count, poll)
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def _fill(
    dataset: SoundDataset,
    path: Path,
    compute: Callable[[Waves], Tensor],
    count: int,
    poll: Callable[[], None] | None,
) -> None:
    whole: np.ndarray | None = None
    with replacing(path) as staged:
        for start in range(0, count, CHUNK):
            if poll is not None:
                poll()
            part = compute(dataset.waveforms(np.arange(start, min(start + CHUNK, count)))).half().numpy()
            if whole is None:
                whole = np.lib.format.open_memmap(staged, "w+", np.float16, (count, *part.shape[1:]))
            whole[start : start + len(part)] = part
        if whole is None:
            raise ValueError(f"no clips to compute features of for {path}")
        del whole


def gather(features: np.ndarray, items: Tensor) -> Float[Tensor, "b *d"]:
    """Rows of a cached array as float32."""
    return torch.from_numpy(np.asarray(features[items.numpy()])).float()


class FeatureOptions(Protocol):
    """Options of a pretraining that decide which features are cached; see `ClapPretrainConfig` for their meaning."""

    @property
    def codec_share(self) -> float: ...
    @property
    def codec_clips(self) -> int: ...
    @property
    def eval_items(self) -> int: ...


@dataclass(frozen=True)
class SplitFeatures:
    """Cached features [n, *d] of training clips, of the first of them heard through the codec, and of held-out clips.

    `coded_rate` is the probability that a clip which has a coded version is read in it.
    """

    clean: np.ndarray
    held_out: np.ndarray
    coded: np.ndarray | None
    coded_rate: float

    @classmethod
    def load(
        cls,
        train: SoundDataset,
        held_out: SoundDataset,
        folder: str | Path,
        name: str,
        settings: str,
        compute: Callable[[Waves], Float[Tensor, "b *d"]],
        options: FeatureOptions,
        codec: MelCodec | None,
    ) -> SplitFeatures:
        """Compute the features, or open those computed before; `folder`, `settings`, `compute` as in `cached_features`.

        Args:
            name: of the caches: `{name}_train`, `{name}_val`, `{name}_coded`.
            options: how many clips, and which share of all reads the codec has.
            codec: needed where `codec_share` > 0.

        Raises:
            UsageError: `codec_share` > 0 without a codec.
        """
        if codec is None and options.codec_share > 0:
            raise UsageError("codec_share > 0 needs a codec; give one or set codec_share = 0.")
        clean = cached_features(train, folder, f"{name}_train", settings, compute)
        val = cached_features(held_out, folder, f"{name}_val", settings, compute, limit=options.eval_items)
        if codec is None or options.codec_share <= 0:
            return cls(clean, val, None, 0.0)

        def through_codec(wave: Waves) -> Tensor:
            return compute(codec.decode(codec.encode(wave)))

        settings = f"{settings}|{_digest(codec)}"
        coded = cached_features(train, folder, f"{name}_coded", settings, through_codec, limit=options.codec_clips)
        return cls(clean, val, coded, options.codec_share * len(train) / len(coded))

    def draw(self, items: Tensor, generator: torch.Generator) -> Float[Tensor, "b *d"]:
        """Features of training clips as float32, some of them (drawn) in the coded version where there is one."""
        features = gather(self.clean, items)
        if self.coded is None:
            return features
        coded = (torch.rand(len(items), generator=generator) < self.coded_rate) & (items < len(self.coded))
        if bool(coded.any()):
            features[coded] = gather(self.coded, items[coded])
        return features


def _digest(codec: MelCodec) -> str:
    """What the codec's sound depends on: its settings and its fitted tensors."""
    return str(feed(hashlib.sha256(repr(codec.config).encode()), codec.state_dict()).hexdigest())
