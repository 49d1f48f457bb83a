"""The tree as flat columns: nodes, their children in one shared array, and reductions over ragged groups of children.

A node costs 43 bytes, a child's place at most 16 (blocks double when they are full; the old block is left behind), a
rollout 9.  Everything is NumPy on the host, values in float64; the states live elsewhere (`StatePool`), on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Table:
    """Columns of equal length that grow by doubling; `table["name"]` is a view that writes through."""

    def __init__(self, dtypes: Mapping[str, Any]) -> None:
        self._columns = {name: np.zeros(16, dtype) for name, dtype in dtypes.items()}
        self.size = 0

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._columns[name][: self.size]

    def add(self, count: int, /, **values: Any) -> Ints:
        """Append `count` rows; columns that are not given are 0.  Returns their row numbers."""
        first, self.size = self.size, self.size + count
        for name, column in self._columns.items():
            if len(column) < self.size:
                grown = np.zeros(max(self.size, 2 * len(column)), column.dtype)
                grown[:first] = column[:first]
                self._columns[name] = column = grown
            column[first : self.size] = values.get(name, 0)
        return np.arange(first, self.size)

    def bytes_per_row(self) -> int:
        """Size of one row."""
        return sum(column.dtype.itemsize for column in self._columns.values())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All columns, without spare room."""
        return {name: self[name] for name in self._columns}


@dataclass(frozen=True)
class Children:
    """Children of several nodes: `ids` in one row, those of node i at offsets[i] : offsets[i + 1]."""

    ids: Ints
    offsets: Ints

    @property
    def counts(self) -> Ints:
        """Children of each node."""
        return np.diff(self.offsets)

    def spread(self, per_node: NDArray[Any]) -> NDArray[Any]:
        """Repeat a value per node for each of its children."""
        return np.repeat(per_node, self.counts)

    def sum(self, values: NDArray[Any]) -> NDArray[Any]:
        """Sum over the children of each node; no node may be childless."""
        return np.add.reduceat(values, self.offsets[:-1])

    def max(self, values: NDArray[Any]) -> NDArray[Any]:
        """Maximum over the children of each node; no node may be childless."""
        return np.maximum.reduceat(values, self.offsets[:-1])

    def argmax(self, values: NDArray[Any]) -> Ints:
        """Place in `ids` of each node's first maximum."""
        places = np.where(values == self.spread(self.max(values)), np.arange(len(values)), len(values))
        return np.minimum.reduceat(places, self.offsets[:-1])

    def logsumexp(self, values: Floats) -> Floats:
        """log Σ exp over the children of each node; −inf where all are −inf."""
        top = self.max(values)
        shift = np.where(np.isfinite(top), top, 0.0)
        with np.errstate(divide="ignore"):
            return shift + np.log(self.sum(np.exp(values - self.spread(shift))))


class Nodes(Table):
    """Nodes of a forest; the first rows are the roots.

    Columns: parent; level (0 is a root, the last is clean); ready (backed up and valid); multiplicity (equal siblings
    kept as one node); value v̂ (reward units); visits N; start and count of its children; drawn (children counted with
    multiplicity, those still under way and invalid ones too: what widening looks at); row in the pool of its level;
    edge (log p/q of the transition that led here).
    """

    def __init__(self, roots: int) -> None:
        super().__init__(
            {
                "parent": np.int32,
                "level": np.int16,
                "ready": np.bool_,
                "multiplicity": np.int32,
                "value": np.float64,
                "visits": np.int32,
                "start": np.int32,
                "count": np.int32,
                "drawn": np.int32,
                "row": np.int32,
                "edge": np.float32,
            }
        )
        self._slots = np.zeros(16, np.int32)
        self._used = 0
        self.add(roots, parent=-1, multiplicity=1, visits=1)

    def link(self, parent: int, child: int) -> None:
        """Append a child to its parent's list; amortised O(1)."""
        count = int(self["count"][parent])
        if count & (count - 1) == 0:  # 0 or a power of two: the block is full
            start = self._block(max(1, 2 * count))
            old = int(self["start"][parent])
            self._slots[start : start + count] = self._slots[old : old + count]
            self["start"][parent] = start
        self._slots[self["start"][parent] + count] = child
        self["count"][parent] = count + 1

    def _block(self, size: int) -> int:
        """Reserve places for children."""
        start, self._used = self._used, self._used + size
        if self._used > len(self._slots):
            grown = np.zeros(max(self._used, 2 * len(self._slots)), np.int32)
            grown[:start] = self._slots[:start]
            self._slots = grown
        return start

    def children(self, ids: Ints) -> Children:
        """Children of the given nodes, in the order in which they were made."""
        counts = self["count"][ids].astype(np.int64)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        places = np.repeat(self["start"][ids] - offsets[:-1], counts) + np.arange(offsets[-1])
        return Children(self._slots[places].astype(np.int64), offsets)

    def at_level(self, level: int) -> Ints:
        """All nodes of a level."""
        return np.flatnonzero(self["level"] == level)

    def root_of(self, ids: Ints) -> Ints:
        """The root above each node."""
        found = ids.copy()
        while (above := self["parent"][found] >= 0).any():
            found = np.where(above, self["parent"][found], found)
        return found

    def scores(self, ids: Ints, inverse_temperature: float) -> Floats:
        """λ·v̂ + log p/q of nodes; −inf for those that are not ready."""
        scores = inverse_temperature * self["value"][ids] + self["edge"][ids]
        return np.where(self["ready"][ids], scores, -np.inf)

    def weights(self, ids: Ints) -> Floats:
        """Multiplicity of ready nodes, 0 of others: the Monte-Carlo weight of a child in its parent's mean."""
        return np.where(self["ready"][ids], self["multiplicity"][ids], 0).astype(np.float64)

    def back_up(self, ids: Ints, inverse_temperature: float, *, hard: bool) -> None:
        """Recompute v̂ of nodes from their children: soft (1/λ)·log mean exp(λ·v̂), hard the maximum (DTS §4)."""
        ids = ids[self["count"][ids] > 0]
        if not len(ids):
            return
        children = self.children(ids)
        weights = self.weights(children.ids)
        total = children.sum(weights)
        if hard:
            value = children.max(np.where(weights > 0, self["value"][children.ids], -np.inf))
        else:
            with np.errstate(divide="ignore", invalid="ignore"):
                scores = self.scores(children.ids, inverse_temperature) + np.log(weights)
                value = (children.logsumexp(scores) - np.log(total)) / inverse_temperature
        self["ready"][ids] = total > 0
        self["value"][ids] = np.where(total > 0, value, 0.0)

    def slots(self) -> NDArray[np.int32]:
        """The array of children, without spare room."""
        return self._slots[: self._used]

    def set_slots(self, slots: NDArray[np.int32]) -> None:
        """Put back what `slots` returned."""
        self._slots, self._used = slots.copy(), len(slots)

    def bytes(self) -> int:
        """Bytes in use, states left out."""
        return self.size * self.bytes_per_row() + self._used * self._slots.itemsize


class StatePool:
    """States of the nodes of one level, [size *d], growing by doubling on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states: Tensor | None = None
        self.size = 0

    def add(self, x: Shaped[Tensor, "b *d"]) -> Ints:
        """Append states and return their rows."""
        first, self.size = self.size, self.size + len(x)
        if self._states is None:
            self._states = torch.empty((max(16, len(x)), *x.shape[1:]), dtype=x.dtype, device=self._device)
        if self.size > len(self._states):
            grown = self._states.new_empty((max(self.size, 2 * len(self._states)), *x.shape[1:]))
            grown[:first] = self._states[:first]
            self._states = grown
        self._states[first : self.size] = x.to(self._device)
        return np.arange(first, self.size)

    def take(self, rows: Ints, device: torch.device) -> Shaped[Tensor, "b *d"]:
        """Return states of the given rows on a device.

        Raises:
            IndexError: the pool is empty.
        """
        if self._states is None:
            raise IndexError("no state was stored at this level")
        index: Int64[Tensor, " b"] = torch.from_numpy(np.asarray(rows, np.int64)).to(self._device)
        return self._states[index].to(device)

    def all(self) -> Shaped[Tensor, "b *d"] | None:
        """All states, or None."""
        return None if self._states is None else self._states[: self.size]
