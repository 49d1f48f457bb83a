"""What our loops cost beside their networks: `sample` and the Trainer against bare loops over the same networks.

Claims: at 16 steps and batch 8 the sampling loop (times, coefficients, prediction types, steps, callbacks) takes at
most 5 % more CPU time than `x = x + dt·network(x, t)`; 400 steps of the Trainer on a perceptron of 7k weights, with
checkpoints and a metrics line every 10 steps, at most 30 % more than a loop with the same batches, AdamW and clipping.
Interleaved runs in one process, CPU time, median of pairwise ratios.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gencontrol.algorithms.base import Collected, Evaluation, LossOut, StepContext
from gencontrol.config import Count, options
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.roles import Roles
from gencontrol.process import GaussianProcess, Linear
from gencontrol.rng import stream
from gencontrol.sampling import sample
from gencontrol.train.trainer import TrainConfig, Trainer
from gencontrol.types import Cond


@dataclass(frozen=True)
class Overhead:
    """Result of `overhead` and of `trainer_overhead`.

    Args:
        ratio: median of CPU time of our loop over that of the bare loop, run by run.
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
    return _compare(full, bare, steps, runs)


def _compare(full: Callable[[], object], bare: Callable[[], object], steps: int, runs: int) -> Overhead:
    """Time two loops of `steps` in turn, after two runs of warm-up."""
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


class Regression:
    """A perceptron 32 → 64 → 64 → 8 that learns tanh of its first inputs from batches of 64 of 4096 rows."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = (nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        self.roles = Roles(nn.Sequential(*layers), ("policy",))
        self.inputs = torch.randn(4096, 32, generator=stream(0, "overhead/data"))

    def collect(self, ctx: StepContext) -> Collected:
        """Draw the step's rows."""
        return Collected(self.inputs[torch.randint(4096, (64,), generator=stream(0, "overhead/rows", ctx.step))], 1)

    def minibatches(self, data: Tensor, update: int, ctx: StepContext) -> Sequence[Tensor]:
        """One micro-batch."""
        return (data,)

    def loss(self, micro: Tensor, ctx: StepContext) -> LossOut:
        """Sum of squared errors, and the same as a metric."""
        with ctx.autocast():
            total = (self.roles.module(micro) - micro[:, :8].tanh()).square().sum()
        return LossOut(total, len(micro), {"loss/square": total})

    def after_update(self, ctx: StepContext, update: int) -> None:
        """There is no other role."""

    def evaluate(self, ctx: StepContext) -> Evaluation:
        """Nothing is measured."""
        return Evaluation({})

    def state_dict(self) -> dict[str, Any]:
        """There is no further state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no further state."""

    def save_final(self, folder: Path) -> None:
        """Write the weights."""
        save_file(self.roles.module.state_dict(), folder / "weights.safetensors")


def trainer_overhead(steps: int = 400, runs: int = 5, log_every: int = 10) -> Overhead:
    """Measure `Trainer.fit` (start, checkpoints and final/ included) against the least that a training loop does.

    Args:
        steps: of either loop.
        runs: pairs of timed runs, after two of warm-up.
        log_every: of the Trainer.

    Raises:
        ValueError: the two loops learn different weights, so that their times cannot be compared.
    """
    config = TrainConfig(steps=steps, lr=1e-3, micro_batch=64, log_every=log_every)

    def full() -> nn.Module:
        algorithm = Regression()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            Trainer(config, folder).fit(algorithm)
        return algorithm.roles.module

    def bare() -> nn.Module:
        algorithm = Regression()
        network = algorithm.roles.module
        adam = torch.optim.AdamW(network.parameters(), config.lr, config.betas, weight_decay=0.0, fused=True)
        for step in range(steps):
            rows = algorithm.inputs[torch.randint(4096, (64,), generator=stream(0, "overhead/rows", step))]
            adam.zero_grad(set_to_none=True)
            loss = (network(rows) - rows[:, :8].tanh()).square().sum(-1).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), config.max_grad_norm)
            adam.step()
            loss.item()
        return network

    for mine, theirs in zip(full().parameters(), bare().parameters(), strict=True):
        if not torch.allclose(mine, theirs, rtol=1e-2, atol=1e-3):
            raise ValueError("the loops disagree; their times cannot be compared")
    return _compare(full, bare, steps, runs)


def _cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of this process during one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


#: claimed ratios
LIMITS = {"sampler": 1.05, "trainer": 1.3}


@options
class Options:
    """Options of the benchmark.

    Args:
        steps: sampler steps.
        batch: rows.
        runs: measured pairs of the sampler; the Trainer has an eighth of them.
        parts: which loops are measured.
    """

    steps: Count = 16
    batch: Count = 8
    runs: Count = 41
    parts: Literal["all", "sampler", "trainer"] = "all"


def main(options: Options) -> int:
    """Measure, print one JSON line; returns 0 when the claims (at most 5 % and 30 %) hold, else 1."""
    torch.set_num_threads(1)
    found: dict[str, Overhead] = {}
    if options.parts != "trainer":
        found["sampler"] = overhead(shape=(options.batch, 64, 128), steps=options.steps, runs=options.runs)
    if options.parts != "sampler":
        found["trainer"] = trainer_overhead(runs=max(1, options.runs // 8))
    print(json.dumps({part: asdict(result) for part, result in found.items()}))
    return 0 if all(result.ratio <= LIMITS[part] for part, result in found.items()) else 1
