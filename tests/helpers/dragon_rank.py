"""One process of the two-rank test: collect, move θ, and write Q, β and the gradient of the second update."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from gencontrol.algorithms.base import StepContext
from gencontrol.train.distributed.dist import Group
from tests.helpers.dragon_worlds import Share, make_dragon


def measure(ctx: StepContext) -> dict[str, Any]:
    """Return global metrics, Q, β, this rank's item count and summed gradient."""
    dragon = make_dragon(Share(), prompts_per_round=12)
    collected = dragon.collect(ctx)
    network = dragon.task.denoiser.network
    with torch.no_grad():  # shrink the untrained network's output: all errors fall, so Q > 0
        network.body[-1].weight *= 0.5
    count, found = 0, None
    for micro in dragon.minibatches(collected.data, 1, ctx):
        out = dragon.loss(micro, ctx)
        out.total.backward()
        count, found = count + out.count, out
    assert found is not None
    gradient = torch.cat([p.grad.flatten() for p in dragon.roles.trainable() if p.grad is not None])
    names = ("reward/positive", "reward/negative", "reward/model", "sets/pairs", "reward/valid_fraction")
    return {
        "metrics": {name: collected.metrics[name] for name in names},
        "baseline": found.metrics["policy/baseline"] / found.count,
        "beta": found.metrics["policy/beta"] / found.count,
        "count": count,
        "gradient": gradient.tolist(),
    }


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    result = measure(StepContext(seed=0, step=0, micro_batch=4, rank=rank, world_size=world, group=Group()))
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
