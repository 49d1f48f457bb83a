"""Private names of torch that sharded training needs: a release that removes one is named here, not in a run."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

PRIVATE = [
    ("torch.distributed._composable.contract", "REGISTRY_KEY"),
    ("torch.distributed._composable.contract", "STATE_KEY"),
    ("torch.distributed._composable_state", "_module_state_mapping"),
    ("torch.distributed.distributed_c10d", "_get_default_store"),
    ("torch._C", "_current_graph_task_id"),
    ("torch", "_foreach_norm"),
    ("torch", "_foreach_mul_"),
    ("torch", "_foreach_lerp_"),
    ("torch", "_foreach_copy_"),
]


@pytest.mark.parametrize(("module", "name"), PRIVATE)
def test_torch_still_has(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name), (
        f"torch {torch.__version__} has no {module}.{name}; gencontrol.train (distributed/*.py, "
        "optim.py) and models/roles.py use it"
    )


def test_a_backward_pass_has_a_task_id_and_other_code_has_none() -> None:
    """How lockstep tells a recomputed forward of gradient checkpointing from one of the algorithm."""
    seen: list[int] = []
    parameter = nn.Parameter(torch.ones(2))
    parameter.register_hook(lambda gradient: seen.append(torch._C._current_graph_task_id()))
    parameter.sum().backward()
    assert seen and seen[0] != -1 and torch._C._current_graph_task_id() == -1


def test_fully_shard_still_has_the_parts_that_release_takes_off() -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    assert hasattr(fully_shard, "state"), f"torch {torch.__version__}: fully_shard.state is gone (shard.py)"
    calls = ("unshard", "reshard", "set_gradient_divide_factor", "set_force_sum_reduction_for_comms", "_get_fsdp_state")
    assert [name for name in calls if not hasattr(FSDPModule, name)] == []
    assert hasattr(FSDPState, "_lazy_init")
    source = set(FSDPState.__init__.__code__.co_names) | set(FSDPParamGroup.__init__.__code__.co_names)
    wanted = {"_fsdp_param_groups", "_module_to_pre_save_state_dict_hook_handle"}
    wanted |= {"_module_to_pre_load_state_dict_hook_handle"}
    assert wanted <= source | set(FSDPState.__annotations__) | set(vars(FSDPState)), wanted - source
