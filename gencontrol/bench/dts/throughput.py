"""What the tree costs beside its network: model calls per second against plain sampling at the same batch and count.

A transformer of 6.4 million parameters; the tree makes K = 64 leaves a round, plain sampling takes the same stochastic
step in batches of 64.  Interleaved runs in one process, CPU time, median of pairwise ratios.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gencontrol.bench.base import Check, table
from gencontrol.bench.dts.measure import grow
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.networks.transformer import Transformer, TransformerConfig
from gencontrol.process import GaussianProcess, Linear
from gencontrol.rng import stream_seed
from gencontrol.sampling import sample
from gencontrol.sampling.tree.tree import DiffusionTree

STEPS, BATCH, SHAPE = 16, 64, (16, 16)


def network(dim: int, depth: int) -> Denoiser:
    """An untrained flow on [16 16]; what it computes does not matter here, how long it takes does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(0, "dts/throughput"))
        body = Transformer(TransformerConfig(in_dim=SHAPE[1], out_dim=SHAPE[1], dim=dim, depth=depth, heads=4))
    return Denoiser(body.eval(), GaussianProcess(Linear()), "velocity")


def plain(model: Any, nfe: int) -> int:
    """Draw samples in full batches until `nfe` model calls are spent; returns how many were."""
    for number in range(math.ceil(nfe / (BATCH * STEPS))):
        sample(model, (BATCH, *SHAPE), steps=STEPS, step="sde", generator=torch.Generator().manual_seed(number))
    return math.ceil(nfe / (BATCH * STEPS)) * BATCH * STEPS


def searched(model: Any, nfe: int, seed: int) -> int:
    """Grow a tree of the paper's settings; returns the model calls spent."""

    def reward(x: Tensor) -> Tensor:
        return x.flatten(1).sum(1)

    tree = DiffusionTree(
        model, reward, SHAPE if len(SHAPE) == 1 else (1, *SHAPE), steps=STEPS, leaf_batch=BATCH, generator=seed
    )
    grow(tree, nfe)
    return tree.nfe


def run(*, nfe: int, runs: int, dim: int, depth: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure; returns rows, checks and the printed table."""
    model = network(dim, depth)
    parameters = sum(p.numel() for p in model.network.parameters())
    plain(model, 1)
    pairs = []
    for number in range(runs):
        both: list[Callable[[], int]] = [partial(plain, model, nfe), partial(searched, model, nfe, number)]
        rates = [0.0, 0.0]
        for which in (0, 1) if number % 2 else (1, 0):
            began = time.process_time()
            spent = both[which]()
            rates[which] = spent / (time.process_time() - began)
        pairs.append(rates)
        say(f"throughput: plain {rates[0]:.0f}, tree {rates[1]:.0f} model calls per second")
    share = statistics.median(tree / base for base, tree in pairs)
    rates = [statistics.median(column) for column in zip(*pairs, strict=True)]
    printed = table(
        f"Throughput: {parameters / 1e6:.1f} M parameters, batch and K = {BATCH}, {nfe} model calls, "
        f"{runs} pairs of runs",
        ("", "model calls per CPU second"),
        [["plain sampling", rates[0]], ["tree", rates[1]]],
    )
    check = Check(
        f"throughput of a tree at K = {BATCH} ≥ 90 % of plain batched sampling ({parameters / 1e6:.1f} M parameters)",
        f"{share:.1%} (median of {runs} pairs)",
        share >= 0.9,
    )
    rows = {"parameters": parameters, "pairs": pairs, "share": share}
    return {"rows": rows, "checks": [check], "table": printed, "curves": {}}
