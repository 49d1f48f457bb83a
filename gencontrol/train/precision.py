"""The arithmetic that networks run in: autocast, and where bf16 pays."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

SLOW_BF16 = "precision = bf16: this CPU has no bf16 arithmetic and is many times slower in it than in fp32; use auto."


def fast_bf16(device: str) -> bool:
    """Whether bf16 is at least as fast as fp32: on accelerators, and on CPUs with AMX or AVX-512 BF16.

    MEASURED: an AMD EPYC with AVX2 alone multiplies 1024 x 256 x 256 at 51 GFLOP/s in fp32 and at 1.3 in bf16.
    """
    if device != "cpu":
        return True
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))


def autocast_dtype(precision: str, device: str) -> torch.dtype | None:
    """Return the type of the networks' autocast, or None for float32; "auto" is bf16 where that is fast."""
    if precision == "auto":
        precision = "bf16" if fast_bf16(device) else "fp32"
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def autocast(precision: str, device: str) -> AbstractContextManager[Any]:
    """Return the context that networks of this precision run in."""
    dtype = autocast_dtype(precision, device)
    return nullcontext() if dtype is None else torch.autocast(device, dtype=dtype)
