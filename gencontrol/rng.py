"""Random streams as pure functions of their name: nothing in gencontrol draws from the global generator.

A stream is determined by (seed, name, *indices), hashed with BLAKE2b to 63 bits.  Item i of a batch therefore has the
same noise in any batch size, on any rank, before and after a resume.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number: the increment of splitmix64
_MIX = (-4658895280553007687, -7723592293110705685)  # its two multipliers


@dataclass(frozen=True)
class Keyed:
    """Counter-based noise: row i is a pure function of (keys[i], counter), in any batch and on any device.

    Accepted wherever a `generator` is; it has no state, so nothing needs to be saved to resume.  One hash of a whole
    batch replaces a generator object per row.  The hash is splitmix64 (Steele et al. 2014) on 64-bit integers.

    Args:
        keys: int64 [b], one per row; see `row_keys`.
        counter: >= 0, which draw of the row this is (a sampler's step).
    """

    keys: Int64[Tensor, " b"]
    counter: int = 0

    def __len__(self) -> int:
        return len(self.keys)

    def draws(self, counters: Sequence[int]) -> Keyed:
        """Return several draws as one batch: row j·b + i is row i of `Keyed(keys, counters[j])`."""
        steps = torch.tensor([int(counter) for counter in counters], device=self.keys.device) * _GOLDEN
        return Keyed((self.keys + steps[:, None]).flatten())

    def uniform(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Float[Tensor, "b *d"]:
        """Return float64 numbers in [0, 1), 53 random bits each; shape[0] must be the number of keys.

        Raises:
            ValueError: it is not.
        """
        bits = self._bits(shape[0], math.prod(shape[1:]), device)
        return (_shifted(bits, 11).double() * 2.0**-53).reshape(tuple(shape))

    def normal(
        self, shape: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "b *d"]:
        """Return standard normal numbers: the halves of each hash, through the transform of Box and Muller.

        Raises:
            ValueError: shape[0] is not the number of keys.
        """
        size = math.prod(shape[1:])
        bits = self._bits(shape[0], (size + 1) // 2, device)
        wide = torch.promote_types(dtype, torch.float32)
        radius = ((_shifted(bits, 32).to(wide) + 0.5) * 2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = (bits & 0xFFFFFFFF).to(wide) * (2.0 * math.pi * 2.0**-32)
        both = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return both[:, :size].to(dtype).reshape(tuple(shape))

    def _bits(self, rows: int, count: int, device: torch.device | str) -> Int64[Tensor, "rows count"]:
        """Hash (key, counter, place) for `count` places of every row."""
        if rows != len(self.keys):
            raise ValueError(f"{len(self.keys)} keys for a batch of {rows}; give one per sample")
        start = _splitmix(self.keys.to(device) + torch.tensor(self.counter + 1, device=device) * _GOLDEN)
        return _splitmix(start[:, None] + torch.arange(1, count + 1, device=device) * _GOLDEN)


def row_keys(seed: int, name: str, *indices: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
    """Return one key per row from (seed, name, indices[0][i], indices[1][i], ...); vectorised over rows."""
    key = torch.tensor(stream_seed(seed, name), dtype=torch.int64).expand_as(indices[0])
    for index in indices:
        key = _splitmix(key + (index.long() + 1) * _GOLDEN)
    return key


def _splitmix(z: Int64[Tensor, "*d"]) -> Int64[Tensor, "*d"]:
    """Finaliser of splitmix64; integer products wrap around."""
    z = (z ^ _shifted(z, 30)).mul_(_MIX[0])
    z = (z ^ _shifted(z, 27)).mul_(_MIX[1])
    return z ^ _shifted(z, 31)


def _shifted(z: Int64[Tensor, "*d"], bits: int) -> Int64[Tensor, "*d"]:
    """Logical shift to the right (torch's is arithmetic)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def stream_seed(seed: int, name: str, *indices: int | str) -> int:
    """Return a 63-bit seed that depends on nothing but the arguments."""
    key = "\x1f".join([str(int(seed)), name, *(str(i) for i in indices)]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") & (2**63 - 1)


def seed_of(generator: torch.Generator | int | None) -> int:
    """Return a seed: the number itself, or one drawn from the generator (None: torch's global one)."""
    if isinstance(generator, int):
        return generator
    source = torch.device("cpu") if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=source))


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
    generator: torch.Generator | Sequence[torch.Generator] | Keyed | None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normal noise [b, *d] drawn on the generator's device and moved; a list of generators or keys gives one row each.

    Raises:
        ValueError: the list's length is not the batch size.
    """
    if isinstance(generator, Keyed):
        return generator.normal(shape, device, dtype)
    if generator is None or isinstance(generator, torch.Generator):
        source = torch.device("cpu") if generator is None else generator.device
        return torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}; give one per sample or a single one")
    rows = [torch.randn(tuple(shape[1:]), generator=g, device=g.device, dtype=dtype).to(device) for g in generator]
    return torch.stack(rows)
