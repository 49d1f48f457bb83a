"""The collectives that on-policy algorithms need; each is the identity in a single process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch import distributed as dist

from gencontrol.algorithms.base import turns
from gencontrol.errors import GencontrolError


def _settle() -> None:
    if (order := turns()) is not None:
        order.settle()


#: How long a rank waits for the reason after another rank has failed.
_PATIENCE_S = 60.0


def active() -> bool:
    """Whether a process group of more than one rank is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_rows(rows: Shaped[Tensor, "b *d"]) -> Shaped[Tensor, "w *d"]:
    """Concatenate the rows of all ranks in rank order; every rank must hold the same shape."""
    if not active():
        return rows
    _settle()
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else rows.device
    local = rows.to(device).contiguous()
    wire = local.to(torch.uint8) if local.dtype == torch.bool else local
    parts = [torch.empty_like(wire) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, wire)
    return torch.cat(parts).to(device=rows.device, dtype=rows.dtype)


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Add numbers over all ranks in float64."""
    if not active():
        return [float(v) for v in values]
    _settle()
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    total = torch.tensor([float(v) for v in values], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return [float(v) for v in total.tolist()]


@contextmanager
def shared_fate(poll: Callable[[], None]) -> Iterator[None]:
    """Run a block of rank-local work before a collective; when it fails on one rank, no rank enters the collective.

    The others call `poll` until it tells them why (the Trainer's poll raises), at most a minute.

    Raises:
        GencontrolError: another rank failed and no reason arrived.
    """
    if (
        order := turns()
    ) is not None:  # the Trainer's exchange reports a failure; until then the others learn of it at a pass
        yield
        order.settle()
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        if not active():
            raise
        error = caught
    if not active():
        return
    failed = sum_over_ranks([float(error is not None)])[0]
    if error is not None:
        raise error
    if failed:
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            poll()
            time.sleep(0.2)
        raise GencontrolError("another process of this run failed in the same step; see its message.")
