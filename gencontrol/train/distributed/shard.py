"""Sharded training (FSDP2): each rank holds one part of every weight, gradient, Adam moment and role copy.

`torch.distributed.fsdp.fully_shard` gathers a block's weights just before it runs and frees them after it; gradients
arrive as reduce-scattered sums.  Each element of the network's outermost ModuleLists is one unit, the rest another.
Role switches exchange shards in place between passes, checkpoints hold full tensors gathered on rank 0 one at a time,
and at the end the network is whole again on every rank, so that it saves as usual.

Works on CPU (gloo) and CUDA (nccl): torch 2.13's gloo has every collective that is used here (all_gather_into_tensor,
reduce_scatter_tensor, all_reduce), but of reduce_scatter's operations SUM alone, so sums are asked for by name.

Memory of a rank while training: (weights + gradients + 2 moments + role copies)/ranks + one unit whole.  Before and
after training the network itself lies whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from gencontrol.algorithms.base import RolesProtocol
from gencontrol.errors import UsageError
from gencontrol.train.distributed.dist import Group, Layout, Table
from gencontrol.train.distributed.lockstep import Lockstep
from gencontrol.train.optim import gradients
from gencontrol.train.signals import SignalGuard


@runtime_checkable
class Prepares(Protocol):
    """A network that computes parts of a condition beforehand (`TakesGroups`)."""

    def prepare(self, cond: Any) -> Any: ...


def units(module: nn.Module) -> list[nn.Module]:
    """Return the blocks that are gathered one at a time: elements of the outermost ModuleLists, in order."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            found += [block for block in child if any(True for _ in block.parameters())]
        else:
            found += units(child)
    return found


class Shards(Layout):
    """Shards the network of `roles` and all its role copies over the ranks of `group`; ranks must hold equal weights.

    Parameters without axes cannot be split: they stay whole, and their gradients are summed as without sharding.
    """

    def __init__(self, roles: RolesProtocol, group: Group, signals: SignalGuard) -> None:
        """Shard in place.

        Raises:
            UsageError: weights are shared between units.
        """
        super().__init__(group)
        self.roles, self.module = roles, roles.module
        self._check_ties()
        first = next(self.module.parameters())
        # a process group of its own, so that a rank that waits in a pass never meets another collective of the run
        self.mesh = DeviceMesh.from_group(torch.distributed.new_group(timeout=group.timeout), first.device.type)
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        self._split(first.device)
        live = dict(self.module.named_parameters())
        roles.convert(lambda tensor: self._converted(tensor, live.get(names.get(id(tensor), ""))), exchange)
        self.lockstep = Lockstep(roles, group, signals, self._gather_once)

    def _check_ties(self) -> None:
        inside = {id(part): number for number, unit in enumerate(units(self.module)) for part in unit.modules()}
        owner: dict[int, int] = {}
        for part in self.module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                number = inside.get(id(part), -1)
                if owner.setdefault(id(parameter), number) != number:
                    raise UsageError(
                        f"train.shard: weight '{name}' of {type(part).__name__} is shared between blocks, which "
                        "fully_shard cannot split; leave shard out for this model."
                    )

    def _split(self, device: torch.device) -> None:
        whole = {parameter for parameter in self.module.parameters() if parameter.ndim == 0}
        for unit in (*units(self.module), self.module):
            fully_shard(unit, mesh=self.mesh, reshard_after_forward=True, ignored_params=whole)
        for part in self._parts():
            part.set_gradient_divide_factor(1.0)  # losses are sums
            part.set_force_sum_reduction_for_comms(True)
        fully_shard.state(self.module)._lazy_init()  # type: ignore[attr-defined]  # set by torch's contract decorator
        if isinstance(self.module, Prepares):
            self._gather_for_prepare(self.module)

    def _gather_for_prepare(self, module: Prepares) -> None:
        """`prepare` runs layers outside of their blocks' forward: gather all units around it."""
        plain = module.prepare

        def prepare(cond: Any) -> Any:
            self.lockstep.preparing()
            self._unshard()
            try:
                return plain(cond)
            finally:
                self.reshard()

        module.prepare = prepare  # type: ignore[method-assign]  # of this instance, until `release`

    def _parts(self) -> Iterator[FSDPModule]:
        return (part for part in self.module.modules() if isinstance(part, FSDPModule))

    def _unshard(self) -> None:
        for part in self._parts():
            part.unshard()

    def _gather_once(self) -> None:
        self._unshard()
        self.reshard()

    def reshard(self) -> None:
        """Free all gathered weights."""
        for part in self._parts():
            part.reshard()

    def _converted(self, tensor: Tensor, live: Tensor | None) -> Tensor:
        """Return the live parameter that took a tensor's place, or this rank's part of a copy."""
        if live is not None:
            return live
        return distribute_tensor(tensor, self.mesh, [Shard(0)], src_data_rank=None) if tensor.ndim else tensor

    # ---------------------------------------------------------------- gradients

    def backward(self, total: Tensor) -> None:
        """Add the gradients of a loss, as sums over the ranks."""
        self.lockstep.backward(total)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients of unsplit parameters; those of shards are sums already."""
        plain = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        if plain:
            self.group.sum_gradients(plain)

    def local(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return this rank's parts."""
        return [local_part(tensor) for tensor in tensors]

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the 2-norm over the shards of all ranks (squares summed in float64)."""
        grads = gradients(parameters)
        squares = torch.zeros(2, dtype=torch.float64, device=grads[0].device)
        for grad in grads:
            split = isinstance(grad, DTensor)
            squares[int(split)] += torch.linalg.vector_norm(local_part(grad)).double().square()
        return (squares[0] + self.group.sum(squares[1])).sqrt()

    # ---------------------------------------------------------------- checkpoints

    def copied(self, table: Mapping[str, Mapping[str, Tensor]]) -> Table:
        """Return a copy of this rank's shards, on their device."""
        return {name: {key: t.detach().clone() for key, t in row.items()} for name, row in table.items()}

    def whole(self, table: Mapping[str, Mapping[str, Tensor]]) -> Table:
        """Gather tensor by tensor; rank 0 keeps them, on the CPU, the others return empty rows."""
        keep = self.group.rank == 0
        rows: Table = {name: {} for name in table}
        for name, row in table.items():
            for key, tensor in row.items():
                full = whole_tensor(tensor)
                if keep:
                    rows[name][key] = full.to("cpu", copy=True)
        return rows

    def placed(self, stored: Tensor, live: Tensor | None) -> Tensor:
        """Take this rank's shard where the live tensor is sharded and of the same shape."""
        if isinstance(live, DTensor) and live.shape == stored.shape:
            return self._converted(stored.to(live.device), None)
        return stored

    # ---------------------------------------------------------------- the end

    def release(self) -> None:
        """Put whole parameters and the network's own class back (torch has no call for it)."""
        self.lockstep.close()
        self.reshard()
        replaced: dict[int, nn.Parameter] = {}
        keep: list[Tensor] = []  # ids stay unique while their tensors live
        for part in list(self.module.modules()):
            for name, parameter in list(part.named_parameters(recurse=False)):
                if isinstance(parameter, DTensor):
                    if id(parameter) not in replaced:
                        whole = nn.Parameter(whole_tensor(parameter), requires_grad=parameter.requires_grad)
                        replaced[id(parameter)] = whole
                        keep.append(parameter)
                    part._parameters[name] = replaced[id(parameter)]
        self.roles.convert(lambda t: replaced[id(t)] if id(t) in replaced else whole_tensor(t), None)
        for wrapped in list(self._parts()):
            _unwrap(wrapped)
        if isinstance(self.module, Prepares):
            del self.module.prepare  # the class's own again


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's shard on the same memory, or the tensor itself where it is whole."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; all ranks must call it in the same order."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with torch.no_grad():
        full: Tensor = tensor.full_tensor()
    return full.detach()


@torch.no_grad()
def exchange(policy: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Swap the contents of two sets of shards; the memory that fully_shard gathers from stays where it is."""
    if policy is other:
        return
    for name, tensor in other.items():
        mine, theirs = local_part(policy[name].detach()), local_part(tensor.detach())
        held = mine.clone()
        mine.copy_(theirs)
        theirs.copy_(held)


def _unwrap(part: Any) -> None:
    """Take fully_shard's hooks, state and class off a module."""
    state = part._get_fsdp_state()
    handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
    for group in state._fsdp_param_groups:
        handles += group._module_to_pre_save_state_dict_hook_handle.values()
        handles += group._module_to_pre_load_state_dict_hook_handle.values()
    for handle in handles:
        handle.remove()
    part.__class__ = type(part).__mro__[2]  # FSDP<Class>, FSDPModule, Class
    _module_state_mapping.pop(part, None)
    for key in (STATE_KEY, REGISTRY_KEY):
        part.__dict__.pop(key, None)
