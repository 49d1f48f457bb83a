"""Time of one action chunk: our policy against diffusers' scheduler loop over the same network, in one process.

Claims: one observation, a U-Net of about 4 million parameters, 16 steps: at least 1.3 × faster; what the loop adds to
its network is at most 15 µs per step.  Both encode the observation once per chunk and give the same chunk (checked).
Interleaved runs; CPU time on the CPU, wall time on an accelerator; the ratio is the median of pairwise ratios.

Our share has three parts: the loop, what depends on time and condition alone done once per chunk, and convolutions of
one item as matrix products.  "equal kernels" gives diffusers' loop the last one too, so that it compares the first two.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gencontrol.config import Count, options
from gencontrol.data.normalize import Normalizer
from gencontrol.rng import Keyed
from gencontrol.robotics.policies.chunked import PolicySpec
from gencontrol.robotics.policies.config import DiffusionPolicyConfig
from gencontrol.robotics.policies.diffusion import DiffusionPolicy
from gencontrol.sampling.fast import run

#: what each claim needs
FASTER, OVERHEAD_US = 1.3, 15.0


@dataclass(frozen=True)
class Latency:
    """Result of `latency`.

    Args:
        parameters: of the network.
        ours_ms, diffusers_ms, diffusers_equal_kernels_ms: median time of a chunk.
        ratio: median over runs of diffusers' time over ours.
        ratio_equal_kernels: the same with our convolution kernels in diffusers' loop.
        overhead_us: median time per step of our loop without a network.
        diffusers_overhead_us: the same of diffusers' scheduler, with the encoder and the start.
        difference: largest difference between the two chunks.
        device: where it ran.
    """

    parameters: int
    ours_ms: float
    diffusers_ms: float
    diffusers_equal_kernels_ms: float
    ratio: float
    ratio_equal_kernels: float
    overhead_us: float
    diffusers_overhead_us: float
    difference: float
    device: str


def example_policy(backbone: str, steps: int, device: str) -> DiffusionPolicy:
    """Return a policy of two 20-number observations and 7-number actions, horizon 16."""
    spec = PolicySpec({"state": (20,)}, action_dim=7, horizon=16, n_obs=2, n_action=8)
    normalizers = {key: Normalizer(torch.zeros(n), torch.ones(n)) for key, n in (("state", 20), ("action", 7))}
    config = DiffusionPolicyConfig(backbone=backbone, inference_steps=steps)  # type: ignore[arg-type]  # checked there
    return DiffusionPolicy(spec, config, normalizers).to(device)


def latency(policy: DiffusionPolicy, *, runs: int) -> Latency:
    """Measure a policy whose sampler is DDIM; `runs` interleaved runs after three of warm-up.

    Raises:
        ValueError: the chunks disagree, so that their times cannot be compared.
    """
    steps, device = policy.sampler_steps, policy.device
    scheduler = _scheduler(policy, steps)
    shape = (1, policy.spec.horizon, policy.spec.action_dim)
    history = {"state": np.random.default_rng(0).standard_normal((1, policy.spec.n_obs, 20)).astype(np.float32)}
    noise, zero = Keyed(torch.zeros(1, dtype=torch.int64)), torch.zeros(shape, device=device)
    levels = policy.config.train_steps if isinstance(policy.config, DiffusionPolicyConfig) else 0
    table, _ = policy.plan(policy.sampler, device)

    def theirs(call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        cond = policy.encode(history)
        x = noise.normal(shape, device)
        for t in scheduler.timesteps:
            output = call(x, ((t + 1) / levels).to(device).expand(1), cond)
            x = scheduler.step(output, t, x, use_clipped_model_output=True).prev_sample
        return x

    def planned(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return policy.network.planned(x, policy.network.plan(t, cond)[0])

    calls: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: policy.draw(policy.encode(history), noise),
        "diffusers": lambda: theirs(policy.network),
        "equal": lambda: theirs(planned),
        "loop": lambda: run(table, lambda x, entry: zero, table.times, zero.clone()),
        "scheduler": lambda: theirs(lambda x, t, cond: zero),
    }
    with torch.inference_mode():
        difference = float((calls["ours"]() - calls["diffusers"]()).abs().max())
        if not difference < 1e-3:
            raise ValueError(f"the chunks differ by {difference:.2g}; their times cannot be compared")
        times = _interleaved(calls, runs, device)

    def ratio(name: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times["ours"], strict=True))

    def middle(name: str) -> float:
        return statistics.median(times[name])

    return Latency(
        parameters=sum(p.numel() for p in policy.network.parameters()),
        ours_ms=middle("ours") * 1e3,
        diffusers_ms=middle("diffusers") * 1e3,
        diffusers_equal_kernels_ms=middle("equal") * 1e3,
        ratio=ratio("diffusers"),
        ratio_equal_kernels=ratio("equal"),
        overhead_us=middle("loop") / steps * 1e6,
        diffusers_overhead_us=middle("scheduler") / steps * 1e6,
        difference=difference,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    )


def _scheduler(policy: DiffusionPolicy, steps: int) -> Any:
    """Diffusers' DDIM of the policy's schedule."""
    from diffusers import DDIMScheduler

    config = policy.config
    assert isinstance(config, DiffusionPolicyConfig)
    scheduler = DDIMScheduler(
        num_train_timesteps=config.train_steps,
        beta_schedule="squaredcos_cap_v2",
        clip_sample=True,
        clip_sample_range=config.clip,
        prediction_type="epsilon",
        timestep_spacing=config.spacing,
    )
    scheduler.set_timesteps(steps)
    return scheduler


def _interleaved(calls: dict[str, Callable[[], Tensor]], runs: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every run of every call, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(runs + 3):
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            clock = time.perf_counter if device.type == "cuda" else time.process_time
            start = clock()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if index >= 3:
                times[name].append(clock() - start)
    return times


@options
class Options:
    """Options of the benchmark.

    Args:
        steps: sampler steps of a chunk.
        runs: measured pairs.
        backbone: the network.
        device: where it runs.
    """

    steps: Count = 16
    runs: Count = 41
    backbone: Literal["unet", "transformer", "mlp"] = "unet"
    device: str = "cpu"


def main(options: Options) -> int:
    """Measure, print one JSON line; returns 0 when both claims hold, else 1."""
    torch.set_num_threads(1)
    result = latency(example_policy(options.backbone, options.steps, options.device), runs=options.runs)
    print(json.dumps({key: round(v, 6) if isinstance(v, float) else v for key, v in asdict(result).items()}))
    return 0 if result.ratio >= FASTER and result.overhead_us <= OVERHEAD_US else 1
