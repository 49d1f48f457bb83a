"""What the sampling loop costs beside its network: `sample` against a bare Euler loop over the same network.

Claim: at 16 steps and batch 8 the loop (times, coefficients, prediction types, steps, callbacks) takes at most 5 %
more CPU time than `x = x + dt·network(x, t)`.  Interleaved runs in one process, CPU time, median of pairwise ratios.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from gencontrol.config import Count, options
from gencontrol.models.denoiser import Denoiser
from gencontrol.process import GaussianProcess, Linear
from gencontrol.sampling import sample
from gencontrol.types import Cond


@dataclass(frozen=True)
class Overhead:
    """Result of `overhead`.

    Args:
        ratio: median of CPU time of `sample` over that of the bare loop, run by run.
        per_step_us: median extra CPU time of one step in microseconds.
        bare_ms: median CPU time of a bare run in milliseconds.
    """

    ratio: float
    per_step_us: float
    bare_ms: float


class ResidualNetwork(nn.Module):
    """A residual perceptron over [b n width] with a time input: about 1 ms per call at the defaults on one core.

    Args:
        width: channels.
        depth: number of blocks.
    """

    def __init__(self, width: int = 128, depth: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )
        self.time = nn.Linear(1, width)

    def forward(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return a velocity for x_t [b n width] at t [b]; unconditional, so a condition is refused."""
        if cond is not None:
            raise ValueError("this network is unconditional; leave cond out")
        x = xt + self.time(t[:, None])[:, None]
        for block in self.blocks:
            x = x + block(x)
        return x


def bare_loop(network: nn.Module, x: Tensor, steps: int) -> Tensor:
    """The least a sampler can do: Euler on t = 1 ... 0 with the network's output as velocity."""
    times = [1.0 - i / steps for i in range(steps)] + [0.0]
    with torch.no_grad():
        for t, t_next in zip(times, times[1:]):
            velocity = network(x, torch.full((len(x),), t), None)
            x = torch.add(x, velocity, alpha=t_next - t)
    return x


def overhead(
    network: nn.Module | None = None,
    shape: Sequence[int] = (8, 64, 128),
    steps: int = 16,
    runs: int = 21,
) -> Overhead:
    """Measure `sample` against `bare_loop` on one thread-count, in interleaved runs.

    Args:
        network: called as (x, t, cond); by default a ResidualNetwork of 1 ms per call.
        shape: of the sample, batch first.
        steps: of either loop.
        runs: pairs of timed runs, after two of warm-up.

    Raises:
        ValueError: the two loops disagree, so that their times cannot be compared.
    """
    network = ResidualNetwork(shape[-1]) if network is None else network
    model = Denoiser(network, GaussianProcess(Linear()), "velocity")
    x = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0))

    def full() -> Tensor:
        return sample(model, shape, steps=steps, step="euler", x_init=x)

    def bare() -> Tensor:
        return bare_loop(network, x, steps)

    if not torch.allclose(full(), bare(), rtol=1e-3, atol=1e-3):
        raise ValueError("the loops disagree; their times cannot be compared")
    pairs = []
    for run in range(runs + 2):
        first, second = (full, bare) if run % 2 else (bare, full)
        times = {first: _cpu_seconds(first), second: _cpu_seconds(second)}
        if run >= 2:
            pairs.append((times[full], times[bare]))
    return Overhead(
        ratio=statistics.median(a / b for a, b in pairs),
        per_step_us=statistics.median(a - b for a, b in pairs) / steps * 1e6,
        bare_ms=statistics.median(b for _, b in pairs) * 1e3,
    )


def _cpu_seconds(call: Callable[[], Tensor]) -> float:
    """CPU time of this process during one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


@options
class Options:
    """Options of the benchmark.

    Args:
        steps: sampler steps.
        batch: rows.
        runs: measured pairs.
    """

    steps: Count = 16
    batch: Count = 8
    runs: Count = 41


def main(options: Options) -> int:
    """Measure, print one JSON line; returns 0 when the claim (at most 5 %) holds, else 1."""
    torch.set_num_threads(1)
    result = overhead(shape=(options.batch, 64, 128), steps=options.steps, runs=options.runs)
    print(json.dumps(asdict(result)))
    return 0 if result.ratio <= 1.05 else 1
