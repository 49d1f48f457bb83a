"""Random streams as pure functions of their name: nothing in gencontrol draws from the global generator.

A stream is determined by (seed, name, *indices), hashed with BLAKE2b to 63 bits.  Item i of a batch therefore has the
same noise in any batch size, on any rank, before and after a resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def stream_seed(seed: int, name: str, *indices: int | str) -> int:
    """Return a 63-bit seed that depends on nothing but the arguments."""
    key = "\x1f".join([str(int(seed)), name, *(str(i) for i in indices)]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") & (2**63 - 1)


def stream(seed: int, name: str, *indices: int | str) -> torch.Generator:
    """Return a fresh CPU generator for the stream (seed, name, *indices)."""
    return torch.Generator().manual_seed(stream_seed(seed, name, *indices))


def item_noise(shape: Sequence[int], seed: int, name: str, items: Iterable[int | str]) -> Tensor:
    """Standard normal noise [len(items), *shape] float32 whose row i depends on (seed, name, items[i]) alone."""
    return torch.stack([torch.randn(tuple(shape), generator=stream(seed, name, item)) for item in items])


def item_generators(seed: int, name: str, items: Iterable[int | str]) -> list[torch.Generator]:
    """One generator per item; accepted wherever a `generator` is (the list form)."""
    return [stream(seed, name, item) for item in items]


def randn(
    shape: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normal noise [b, *d] drawn on the generator's device and moved; a list of generators gives one row each.

    Raises:
        ValueError: the list's length is not the batch size.
    """
    if generator is None or isinstance(generator, torch.Generator):
        source = torch.device("cpu") if generator is None else generator.device
        return torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}; give one per sample or a single one")
    rows = [torch.randn(tuple(shape[1:]), generator=g, device=g.device, dtype=dtype).to(device) for g in generator]
    return torch.stack(rows)
