"""How the weights of a run lie in memory: whole on every rank here, in shards in `gencontrol.train.distributed.shard`.

The Trainer, the optimizer and the checkpoints see tensors through a Layout alone; this one changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gencontrol.algorithms.base import RolesProtocol
from gencontrol.train.distributed.dist import Group
from gencontrol.train.optim import gradients
from gencontrol.train.signals import SignalGuard

Table = dict[str, dict[str, Tensor]]


def make_layout(roles: RolesProtocol, group: Group, signals: SignalGuard, *, shard: bool) -> Layout:
    """Return the layout of a run; with `shard` the network and its roles are split over the ranks in place."""
    if not shard:
        return Layout(group)
    from gencontrol.train.distributed.shard import Shards  # takes half a second to import

    return Shards(roles, group, signals)


class Layout:
    """Every rank holds all of every tensor; gradients are summed after the last micro-batch of an update."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make all gradients sums over the ranks."""
        self.group.sum_gradients(parameters)

    def local(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the parts of tensors that this rank holds, as plain tensors on the same memory."""
        return list(tensors)

    def norm(self, parameters: Sequence[nn.Parameter]) -> float:
        """Return the 2-norm of all gradients."""
        return float(torch.nn.utils.get_total_norm(gradients(parameters)))

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
