"""One process of CRD's two-rank test: collect, move the roles, and write the gradient of an update."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from gencontrol.algorithms.base import StepContext
from gencontrol.algorithms.forward.crd import Crd
from gencontrol.train.distributed.dist import Group
from tests.helpers.forward_worlds import make, move


def measure(ctx: StepContext, center: str) -> dict[str, Any]:
    """Return this rank's row count and summed gradient, and metrics that all ranks share."""
    crd = make(Crd, center=center, weight_temp=0.3, updates_per_round=1)
    move(crd.roles, 0.1, "policy", "old")
    collected = crd.collect(ctx)
    count = 0
    for micro in crd.minibatches(collected.data, 0, ctx):
        out = crd.loss(micro, ctx)
        out.total.backward()
        count += out.count
    gradient = torch.cat([p.grad.flatten() for p in crd.roles.trainable() if p.grad is not None])
    names = ("reward/mean", "policy/anchor_strength")
    return {"metrics": {n: collected.metrics[n] for n in names}, "count": count, "gradient": gradient.tolist()}


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    ctx = StepContext(seed=0, step=0, micro_batch=4, rank=rank, world_size=world, group=Group())
    (folder / f"rank{rank}.json").write_text(json.dumps({c: measure(ctx, c) for c in ("group", "batch")}))
    torch.distributed.destroy_process_group()
