"""Times at which NFT, AWM and CRD train, on shifted and unshifted grids, against their official code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gencontrol.algorithms.forward import times
from gencontrol.algorithms.forward.awm import AwmConfig
from gencontrol.algorithms.forward.base import LinearDecay
from gencontrol.algorithms.forward.crd import CrdConfig
from gencontrol.algorithms.forward.nft import NftConfig
from tests.helpers.golden import cases, tensors

STARTS: dict[str, times.Start] = {"discrete": "drawn", "discrete_wo_init": "out", "discrete_with_init": "always"}


def grid_of(case: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    data = tensors("training_times", case)
    return data, (data["timesteps"].double() / 1000).tolist()


@pytest.mark.parametrize("case", cases("training_times"))
@pytest.mark.parametrize(("method", "kind", "share"), [("awm", AwmConfig, 0.9), ("crd", CrdConfig, 0.99)])
@pytest.mark.parametrize("name", STARTS)
def test_strata_of_the_grid(case: str, method: str, kind: Any, share: float, name: str) -> None:
    data, grid = grid_of(case)
    offsets = data[f"{method}_{name}_u"].double()
    if name == "discrete_with_init":
        offsets = torch.cat([torch.zeros(1), offsets])
    config = kind(time_sampling="grid", time_start=STARTS[name], time_range=share, train_times=6, demo_steps=len(grid))
    found = config.spaced_times(offsets.view(1, 6, 1), grid, torch.zeros(1, len(grid)))
    # t = 1 is taken at 1 − 1e-4, where a prediction of noise still says something of x0
    torch.testing.assert_close(
        found.flatten().float(), data[f"{method}_{name}_t"].clamp(max=1 - 1e-4), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("case", cases("training_times"))
def test_permutations_of_the_grid(case: str) -> None:
    data, grid = grid_of(case)
    order, steps = data["nft_perm"], len(grid)
    count = times.kept_by_count(grid, 0.99)
    config = NftConfig(demo_steps=steps, train_times=count)
    found = config.spaced_times(torch.zeros(len(order), count, 1), grid, order.argsort(1).double())
    torch.testing.assert_close(found[..., 0].float(), data["nft_t"].clamp(max=1 - 1e-4), rtol=0, atol=1e-6)
    if steps == 10:
        assert NftConfig().train_times == count == data["nft_t"].shape[1]


@pytest.mark.parametrize("case", cases("snapshot_decay"))
def test_schedules_of_snapshots(case: str) -> None:
    data, config = tensors("snapshot_decay", case), cases("snapshot_decay")[case]
    text = config.get("text") or "-".join(str(config.get(k) or 0.0) for k in ("flat", "start", "slope", "last"))
    decay = LinearDecay.parse(text)
    found = torch.tensor([decay.at(int(step)) for step in data["steps"]], dtype=torch.float64)
    torch.testing.assert_close(found, data["decay"], rtol=0, atol=1e-12)
