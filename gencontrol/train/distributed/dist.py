"""Several processes (torchrun): gradients and counts are summed, rank 0 writes, an error on one rank stops all.

Between two exchanges every rank does the same number of collectives, so a rank that failed simply goes to the next
exchange and reports there; ranks that are still working learn of it at their next poll through the key-value store.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from gencontrol.algorithms.base import Collectives
from gencontrol.errors import GencontrolError, Preempted, UsageError
from gencontrol.train.optim import gradients
from gencontrol.train.signals import SignalGuard

#: How long a rank waits for the reason after another rank has failed.
_PATIENCE_S = 60.0
_ERROR, _STOP = "gencontrol/error", "gencontrol/stop"


class PeerError(GencontrolError):
    """Another rank failed; the message carries its rank and error."""


class Watch(threading.Thread):
    """Ends this process when another rank failed and this one does not notice: it waits in a collective, or is slow.

    Args:
        store: a connection of its own.
        patience_s: time that a rank has to end by itself after the announcement.
    """

    def __init__(self, store: Any, patience_s: float = 5.0) -> None:
        super().__init__(name="gencontrol-watch", daemon=True)
        self._store, self._patience_s, self._done = store, patience_s, threading.Event()

    def run(self) -> None:
        """Look twice a second."""
        since: float | None = None
        while not self._done.wait(0.5):
            try:
                if since is None and self._store.check([_ERROR]):
                    since = time.monotonic()
                if since is None or time.monotonic() - since < self._patience_s:
                    continue
                text = self._store.get(_ERROR).decode()
            except RuntimeError:
                return  # the store ended with its rank; the launcher ends this one
            os.write(2, f"\n{text}; this process waited for it and ends now.\n".encode())
            os._exit(1)

    def stop(self) -> None:
        """End the thread."""
        self._done.set()


class Turns(Protocol):
    """Keeps the ranks of a sharded network in step; see `gencontrol.train.distributed.lockstep`."""

    def synchronize(self) -> None: ...
    def failed(self) -> None: ...


class Group(Collectives):
    """The process group of a run, that of torch or else by RANK and WORLD_SIZE; one process needs no backend at all.

    Args:
        timeout_s: a collective that waits longer ends the run; stacks are printed at half of it.
    """

    def __init__(self, timeout_s: float = 600.0) -> None:
        if torch.distributed.is_initialized():
            self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"RANK = {self.rank} and WORLD_SIZE = {self.world_size}; start with torchrun.")
        self.timeout_s, self.timeout = timeout_s, datetime.timedelta(seconds=timeout_s)
        self.turns: Turns | None = None  # of a sharded network
        self._owned = False
        self._watch: Watch | None = None
        self._checked = 0.0

    def __enter__(self) -> Group:
        if self.world_size > 1 and not torch.distributed.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            local = os.environ.get("LOCAL_RANK", "")
            if torch.cuda.is_available() and local.isdigit() and int(local) < torch.cuda.device_count():
                torch.cuda.set_device(int(local))  # collectives use the current device
            torch.distributed.init_process_group(backend, timeout=self.timeout)
            self._owned = True
        if self.world_size > 1:
            self._watch = Watch(self._store().clone())
            self._watch.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None and self.world_size > 1 and not isinstance(error, Preempted):
            with contextlib.suppress(RuntimeError):  # the store may be gone with the rank that held it
                self.announce(error)
        if self._owned:
            torch.distributed.destroy_process_group()
            self._owned = False
        if self._watch is not None:
            self._watch.stop()

    def gather(self, value: Any) -> list[Any]:
        """Return the JSON value of every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        faulthandler.dump_traceback_later(self.timeout_s / 2, file=sys.stderr)
        try:
            data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
            torch.distributed.all_gather(sizes, torch.tensor([data.numel()]))
            longest = max(int(size) for size in sizes)
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: data.numel()] = data
            parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
            torch.distributed.all_gather(parts, padded)
        finally:
            faulthandler.cancel_dump_traceback_later()
        pairs = zip(parts, sizes, strict=True)
        return [json.loads(bytes(part[: int(size)].tolist()).decode()) for part, size in pairs]

    def exchange(self, signals: SignalGuard, *, heed: bool = True) -> Exchange:
        """Return a block of work that all ranks do together; with heed = False signals wait for a later one."""
        return Exchange(self, signals, heed)

    def announce(self, error: BaseException) -> str:
        """Tell the other ranks of an error of this one; returns its text."""
        text = f"{type(error).__name__}: {error}"[:2000]
        if not isinstance(error, PeerError):
            self._store().set(_ERROR, f"rank {self.rank} failed: {text}")
        return text

    def told(self) -> str:
        """Return what a failed rank announced, or an empty text."""
        store = self._store()
        return str(store.get(_ERROR).decode()) if store.check([_ERROR]) else ""

    def _store(self) -> Any:
        return torch.distributed.distributed_c10d._get_default_store()

    def poll(self, signals: SignalGuard) -> None:
        """Raise Preempted on a signal to any rank, PeerError when another rank failed.

        The store is asked at most once a second.  With a sharded network all ranks stop at the same turn instead.
        """
        if self.world_size > 1:
            if signals.pending is not None and self.turns is None:
                self._store().set(_STOP, "1")
            elif time.monotonic() - self._checked >= 1:
                self._checked = time.monotonic()
                if told := self.told():
                    raise PeerError(told)
                if self.turns is None and self._store().check([_STOP]):
                    raise signals.error()
        if self.turns is None:
            signals.poll()

    def gather_rows(self, rows: Shaped[Tensor, "b *d"]) -> Shaped[Tensor, "w *d"]:
        """Concatenate the rows of all ranks in rank order; every rank must hold the same shape."""
        if self.world_size == 1:
            return rows
        if self.turns is not None:
            self.turns.synchronize()
        local = rows.to(_wire_device(rows.device)).contiguous()
        wire = local.to(torch.uint8) if local.dtype == torch.bool else local
        parts = [torch.empty_like(wire) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, wire)
        return torch.cat(parts).to(device=rows.device, dtype=rows.dtype)

    def sum_numbers(self, values: Sequence[float]) -> list[float]:
        """Add numbers over all ranks in float64."""
        if self.world_size == 1:
            return super().sum_numbers(values)
        if self.turns is not None:
            self.turns.synchronize()
        device = _wire_device(torch.device("cpu"))
        total = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(total)
        return [float(value) for value in total.tolist()]

    @contextlib.contextmanager
    def all_or_none(self, poll: Callable[[], None]) -> Iterator[None]:
        """Run a block of rank-local work before a collective; see the base class."""
        if self.world_size == 1:
            yield
            return
        if self.turns is not None:
            # the Trainer's exchange reports a failure; until then the others learn of it at a pass of the network
            yield
            self.turns.synchronize()
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = self.sum_numbers([float(error is not None)])[0]
        if error is not None:
            raise error
        if failed:
            deadline = time.monotonic() + _PATIENCE_S
            while time.monotonic() < deadline:
                poll()
                time.sleep(0.2)
            raise GencontrolError("another process of this run failed in the same step; see its message.")

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up the gradients of all ranks in place; a missing gradient counts as zero."""
        if self.world_size == 1:
            return
        grads = gradients(parameters)
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        self.sum(flat)
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def sum(self, value: Tensor) -> Tensor:
        """Add up a tensor over all ranks in place."""
        if self.world_size > 1:
            faulthandler.dump_traceback_later(self.timeout_s / 2, file=sys.stderr)
            try:
                torch.distributed.all_reduce(value)
            finally:
                faulthandler.cancel_dump_traceback_later()
        return value


class Exchange:
    """A block of rank-local work with a common end: `notes` holds every rank's `note` (a JSON value) afterwards.

    Leaving the block raises the rank's own error; PeerError when only another rank failed; Preempted on all ranks when
    one got a signal.
    """

    def __init__(self, group: Group, signals: SignalGuard, heed: bool) -> None:
        self.note: Any = None
        self.notes: list[Any] = []
        self._group, self._signals, self._heed = group, signals, heed

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        group, signals = self._group, self._signals
        if group.world_size == 1 or (error is not None and not isinstance(error, Exception)):
            if error is None and self._heed:
                signals.poll()
            self.notes = [self.note]
            return
        stop = isinstance(error, Preempted)
        failed = None if stop else error
        if error is None:
            try:
                if group.turns is not None:
                    group.turns.synchronize()
                stop = self._heed and signals.pending is not None
            except Preempted:
                stop = True
            except Exception as caught:
                failed = caught
        text = ""
        if failed is not None:
            text = group.announce(failed)
            if group.turns is not None:
                group.turns.failed()
        reports = group.gather({"error": text, "stop": stop, "note": self.note})
        if failed is not None:
            raise failed
        for rank, row in enumerate(reports):
            if row["error"] and not row["error"].startswith("PeerError"):
                raise PeerError(f"rank {rank} failed: {row['error']}") from None
        if any(row["stop"] for row in reports):
            raise signals.error() from None
        self.notes = [row["note"] for row in reports]


Table = dict[str, dict[str, Tensor]]


class Layout:
    """How the weights of a run lie in memory; here every rank holds all of every tensor.

    The Trainer, the optimizer and the checkpoints see tensors through a Layout alone;
    `gencontrol.train.distributed.shard` splits them.  Gradients are summed after the last micro-batch of an update.
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make all gradients sums over the ranks."""
        self.group.sum_gradients(parameters)

    def local(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the parts of tensors that this rank holds, as plain tensors on the same memory."""
        return list(tensors)

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the 2-norm of all gradients, a scalar on their device."""
        # what torch.nn.utils.get_total_norm does for one device, at a third of its cost for a small network
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients(parameters))))

    def copied(self, table: Mapping[str, Mapping[str, Tensor]]) -> Table:
        """Return a copy that later optimizer steps do not alter."""
        return {name: {key: t.detach().to("cpu", copy=True) for key, t in row.items()} for name, row in table.items()}

    def whole(self, table: Mapping[str, Mapping[str, Tensor]]) -> Table:
        """Return the tensors as a checkpoint stores them, on rank 0; all ranks must call it."""
        return {name: dict(row) for name, row in table.items()}

    def placed(self, stored: Tensor, live: Tensor | None) -> Tensor:
        """Undo `whole`: the stored tensor in the form of the live one."""
        return stored

    def release(self) -> None:
        """Make the network an ordinary module again, whole on every rank; all ranks must call it."""

    def backward(self, total: Tensor) -> None:
        """Add the gradients of a loss."""
        total.backward()


def _wire_device(device: torch.device) -> torch.device:
    """Where a tensor must lie to be exchanged: nccl takes CUDA tensors only."""
    if torch.distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return device
