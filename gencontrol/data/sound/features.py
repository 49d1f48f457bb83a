"""Features of a sound split, computed once and kept in half precision beside the clips."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.data.sound.dataset import SoundDataset

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
        path.parent.mkdir(parents=True, exist_ok=True)
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
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    whole: np.ndarray | None = None
    for start in range(0, count, CHUNK):
        if poll is not None:
            poll()
        part = compute(dataset.waveforms(np.arange(start, min(start + CHUNK, count)))).half().numpy()
        if whole is None:
            whole = np.lib.format.open_memmap(temporary, "w+", np.float16, (count, *part.shape[1:]))
        whole[start : start + len(part)] = part
    if whole is None:
        raise ValueError(f"no clips to compute features of for {path}")
    del whole
    os.replace(temporary, path)


def gather(features: np.ndarray, items: Tensor) -> Float[Tensor, "b *d"]:
    """Rows of a cached array as float32."""
    return torch.from_numpy(np.asarray(features[items.numpy()])).float()
