"""The tree as flat columns: nodes, their children in one shared array, and reductions over ragged groups of children.

A node costs 47 bytes, a child's place at most 16 (blocks double when they are full; the old block is left behind), a
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

from gencontrol.rng import row_keys

Ints = NDArray[np.integer[Any]]
Floats = NDArray[np.floating[Any]]


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
    edge (log p/q of the transition that led here); log_p (log-probability of that transition, NaN where unknown).
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
                "log_p": np.float32,
            }
        )
        self._slots = np.zeros(16, np.int32)
        self._used = 0
        self.add(roots, parent=-1, multiplicity=1, visits=1)

    def link(self, parents: Ints, children: Ints) -> None:
        """Append children to their parents' lists, in the order given; amortised O(1) each."""
        unique, added = np.unique(parents, return_counts=True)
        total = self["count"][unique] + added
        full = total > _capacity(self["count"][unique])
        movers, sizes = unique[full], _capacity(total[full])
        old = self.children(movers)
        start = self._reserve(int(sizes.sum())) + np.cumsum(sizes) - sizes
        self._slots[old.spread(start - old.offsets[:-1]) + np.arange(len(old.ids))] = old.ids
        self["start"][movers] = start
        rank, _ = ranks(parents)
        self._slots[self["start"][parents] + self["count"][parents] + rank] = children
        self["count"][unique] = total

    def _reserve(self, size: int) -> int:
        """Reserve places for children; returns the first."""
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
        """Multiplicity of ready nodes, 0 of others."""
        return np.where(self["ready"][ids], self["multiplicity"][ids], 0).astype(np.float64)

    def shares(self, children: Children) -> Floats:
        """Weight of each child in the mean over its siblings; sums to 1.

        A child counts as often as it was drawn.  Where the transitions' probabilities are known and the unseen siblings
        have less than 1/k of them after k draws, a child counts its probability: the bias of order 1/k is below the
        noise of the counts, of order k^(-1/2) (docs/methods/dts.md#tokens, derived).
        """
        copies = self["multiplicity"][children.ids].astype(np.float64)
        draws = children.sum(copies)
        chance = np.exp(self["log_p"][children.ids].astype(np.float64))
        seen = children.sum(chance)
        known = 1.0 - seen <= 1.0 / draws  # False for NaN
        counted = copies / children.spread(draws)
        return np.where(children.spread(known), chance / children.spread(seen), counted)

    def back_up(self, ids: Ints, inverse_temperature: float, *, hard: bool) -> None:
        """Recompute v̂ of nodes from their children: soft (1/λ)·log mean exp(λ·v̂), hard the maximum (arXiv 2506.20701,
        §4).

        A child without a valid leaf counts in the mean with exp(−∞) = 0: the target lives on the valid samples.
        """
        ids = ids[self["count"][ids] > 0]
        if not len(ids):
            return
        children = self.children(ids)
        weights = self.weights(children.ids)
        ready = children.max(weights) > 0
        if hard:
            value = children.max(np.where(weights > 0, self["value"][children.ids], -np.inf))
        else:
            with np.errstate(divide="ignore"):
                scores = self.scores(children.ids, inverse_temperature) + np.log(weights)
            total = children.sum(self["multiplicity"][children.ids])
            value = (children.logsumexp(scores) - np.log(total)) / inverse_temperature
        self["ready"][ids] = ready
        self["value"][ids] = np.where(ready, value, 0.0)

    def slots(self) -> NDArray[np.int32]:
        """The array of children, without spare room."""
        return self._slots[: self._used]

    def set_slots(self, slots: NDArray[np.int32]) -> None:
        """Put back what `slots` returned."""
        self._slots, self._used = slots.copy(), len(slots)

    def bytes(self) -> int:
        """Bytes in use, states left out."""
        return self.size * self.bytes_per_row() + self._used * self._slots.itemsize


def ranks(nodes: Ints) -> tuple[Ints, Ints]:
    """Return, for each entry, how many earlier entries name its node, and how many do in all."""
    _, group, sizes = np.unique(nodes, return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    rank = np.empty(len(nodes), np.int64)
    rank[order] = np.arange(len(nodes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rank, sizes[group]


def _capacity(counts: Ints) -> Ints:
    """Places in the block of a node with so many children: the next power of two, 0 for none."""
    return np.where(counts > 0, 1 << np.frexp(np.maximum(counts - 1, 0).astype(np.float64))[1].astype(np.int64), 0)


class Lookup:
    """Integers → integers as two sorted columns, 12 bytes an entry."""

    def __init__(self) -> None:
        self._keys = np.zeros(0, np.int64)
        self._values = np.zeros(0, np.int32)

    def find(self, keys: Ints) -> Ints:
        """Value of each key; −1 where there is none."""
        if not len(self._keys):
            return np.full(len(keys), -1)
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[place] == keys, self._values[place], -1)

    def add(self, keys: Ints, values: Ints) -> None:
        """Enter keys; where one is there already, or given twice, the first value stays."""
        fresh, first = np.unique(keys, return_index=True)
        absent = self.find(fresh) < 0
        fresh, first = fresh[absent], first[absent]
        place = np.searchsorted(self._keys, fresh)
        self._keys = np.insert(self._keys, place, fresh)
        self._values = np.insert(self._values, place, values[first])

    def bytes(self) -> int:
        """Bytes in use."""
        return self._keys.nbytes + self._values.nbytes


class StatePool:
    """States of the nodes of one level, [size *d], growing by doubling on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states: Tensor | None = None
        self.size = 0

    def add(self, x: Shaped[Tensor, "b *d"]) -> Ints:
        """Append states and return their rows."""
        states = self.reserve(x)
        first, self.size = self.size, self.size + len(x)
        states[first : self.size] = x
        return np.arange(first, self.size)

    def reserve(self, x: Shaped[Tensor, "b *d"]) -> Shaped[Tensor, "n *d"]:
        """Make room for states like x, so that adding them cannot run out of memory; returns the whole pool."""
        size = self.size + len(x)
        if self._states is None:
            self._states = torch.empty((max(16, size), *x.shape[1:]), dtype=x.dtype, device=self._device)
        if size > len(self._states):
            grown = self._states.new_empty((max(size, 2 * len(self._states)), *x.shape[1:]))
            grown[: self.size] = self._states[: self.size]
            self._states = grown
        return self._states

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


def hashes(owners: Ints, tokens: Int64[Tensor, "b n"]) -> Ints:
    """64-bit hashes of (owner, tokens): a sum of hashes of (position, token), hashed with the owner."""
    places = torch.arange(tokens.shape[1]).expand(tokens.shape)
    each = row_keys(0, "tree/token", places.flatten(), tokens.cpu().flatten())
    whole = each.reshape(tokens.shape).sum(1)
    return row_keys(0, "tree/sequence", torch.from_numpy(np.asarray(owners, np.int64)), whole).numpy()
