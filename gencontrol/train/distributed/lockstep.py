"""Keeps ranks in step whose passes of a sharded network are collectives, although their work differs.

Before every pass and every backward the ranks exchange what they want (one small all_gather): the kind of pass and the
role, whose weights they gather from one another.  A rank that has nothing to do, because fewer of its samples were
valid, runs a shadow pass on its own last inputs with weight zero; a rank that failed says so, and all others stop
there; a signal to any rank stops all at the same pass.  So any algorithm is right under sharding, whatever its ranks do
between two exchanges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gencontrol.algorithms.base import RolesProtocol
from gencontrol.train.distributed.dist import Group, PeerError
from gencontrol.train.signals import SignalGuard
from gencontrol.types import Grouped

#: What a rank wants.  A wish is kind · roles + role; where wishes differ, the smallest goes first and others shadow it.
_PASS, _GRAD, _PREPARE, _BACKWARD, _IDLE, _FAILED = range(6)


class Lockstep:
    """Turns of the ranks around a sharded module.

    Args:
        roles: of the sharded module, whose forward is watched.
        group: of the run.
        signals: of this process.
        prepare: does the collectives of the module's `prepare` and nothing else.
    """

    def __init__(self, roles: RolesProtocol, group: Group, signals: SignalGuard, prepare: Callable[[], None]) -> None:
        self.roles, self.module, self.group, self.signals = roles, roles.module, group, signals
        self._prepare = prepare
        self._control = torch.distributed.new_group(timeout=group.timeout)
        self._inputs: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._shadows: list[Tensor] = []
        self._shadowing = self._over = False
        self._hook = self.module.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True)
        group.turns = self

    def close(self) -> None:
        """Stop watching."""
        self._hook.remove()
        self._inputs.clear()
        self._over = True
        self.group.turns = None

    # ---------------------------------------------------------------- wishes

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recomputed = torch._C._current_graph_task_id() != -1  # gradient checkpointing inside a backward
        if self._shadowing or recomputed:
            return
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
        kind = _GRAD if learning else _PASS
        still = tuple(value.detach() if isinstance(value, Tensor) else value for value in args)
        self._inputs[kind] = (still, kwargs)
        self._wish(kind)

    def preparing(self) -> None:
        """Wait until all ranks prepare a condition together."""
        if not self._shadowing:
            self._wish(_PREPARE)

    def backward(self, total: Tensor) -> None:
        """Run the backward pass of a loss, together with the shadows that this rank ran beside it."""
        self._wish(_BACKWARD)
        self._run_backward(total)

    def synchronize(self) -> None:
        """Wait, before an exchange, until no rank wants a pass; shadow those that do.

        Raises:
            PeerError: another rank failed.
            Preempted: a signal arrived at any rank.
        """
        self._wish(_IDLE)

    def failed(self) -> None:
        """Tell the others, at their next turn, that this rank failed (once)."""
        if not self._over:
            self._over = True
            self._turn(_FAILED)

    def _wish(self, kind: int) -> None:
        """Shadow what goes before; returns when it is this rank's turn."""
        while not self._over:
            wishes, stop = self._turn(kind)
            kinds = [wish // len(self.roles.names()) for wish in wishes]
            if _FAILED in kinds:
                self._over = True
                raise PeerError(self.group.told() or f"rank {kinds.index(_FAILED)} failed; see its message.")
            if stop:
                raise self.signals.error()
            first = min(wishes)
            if first == wishes[self.group.rank] or (kind == min(kinds) and kind >= _BACKWARD):
                return
            kind_first, role = divmod(first, len(self.roles.names()))
            with self.roles.use(self.roles.names()[role]):
                self._shadow(kind_first)

    def _turn(self, kind: int) -> tuple[list[int], bool]:
        """Return the wishes of all ranks, and whether any has a signal pending."""
        role = list(self.roles.names()).index(self.roles.active)
        mine = torch.tensor([kind * len(self.roles.names()) + role, int(self.signals.pending is not None)])
        rows = [torch.zeros_like(mine) for _ in range(self.group.world_size)]
        torch.distributed.all_gather(rows, mine, group=self._control)
        return [int(row[0]) for row in rows], any(int(row[1]) for row in rows)

    # ---------------------------------------------------------------- shadows

    def _shadow(self, kind: int) -> None:
        """Take part in what another rank does, without effect."""
        if kind == _BACKWARD:
            self._run_backward(None)
            return
        if kind == _PREPARE:
            self._prepare()
            return
        args, kwargs = self._recorded(kind)
        self._shadowing = True
        try:
            with torch.set_grad_enabled(kind == _GRAD):
                out = self.module(*args, **kwargs)
        finally:
            self._shadowing = False
        if kind == _GRAD:
            self._shadows.append(out)

    def _recorded(self, kind: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Inputs of this rank's last pass of that kind, or of any; keys and values made without a gradient left out."""
        found = self._inputs.get(kind) or next(iter(self._inputs.values()), None)
        if found is None:
            raise RuntimeError(
                "this rank has run no pass of the network yet, and another rank needs it for one; give every rank work "
                "in the first step (a larger --batch), or train without shard."
            )
        if kind != _GRAD or kind in self._inputs:
            return found
        return tuple(_unprepared(value) for value in found[0]), {k: _unprepared(v) for k, v in found[1].items()}

    def _run_backward(self, total: Tensor | None) -> None:
        shadows, self._shadows = self._shadows, []
        parts = [] if total is None else [total]
        # not `0 · sum`: a shadow's output may be infinite
        parts += [torch.where(torch.zeros_like(out, dtype=torch.bool), out, 0.0).sum() for out in shadows]
        if parts:
            torch.stack([part.float() for part in parts]).sum().backward()


def _unprepared(value: Any) -> Any:
    if isinstance(value, Grouped) and isinstance(value.unique, dict) and "kv" in value.unique:
        return Grouped({key: part for key, part in value.unique.items() if key != "kv"}, value.rows)
    return value
