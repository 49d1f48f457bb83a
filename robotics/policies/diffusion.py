"""Diffusion and flow policies: observations in, chunks of actions out (Chi et al. 2023; Lipman et al. 2023).

A diffusion policy has the 100 levels of squaredcos_cap_v2 and is sampled by DDIM or DDPM; a flow policy is rectified
flow with Euler steps.  Both train at continuous times (ours: the table interpolates), so that either can be asked at
the noise levels of the other (gpc.md §3.2).  Chunks are normalised; x0 is clipped and eps follows from it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gencontrol.data.normalize import Normalizer
from gencontrol.errors import UsageError
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.networks.chunk_networks import ChunkMlp, ChunkNetwork, ChunkTransformer
from gencontrol.models.networks.unet1d import ChunkUnet
from gencontrol.process import GaussianProcess, GridProcess, Linear, Table
from gencontrol.rng import Keyed, stream_seed
from gencontrol.robotics.policies.chunked import PolicySpec
from gencontrol.robotics.policies.config import DiffusionPolicyConfig, FlowPolicyConfig, PolicyConfig
from gencontrol.robotics.policies.denoising import ChunkSampler, DenoisingPolicy, History
from gencontrol.robotics.policies.observation_encoder import ObservationEncoder
from gencontrol.sampling.fast import StepTable, run, step_noise, table_of
from gencontrol.sampling.grids import make_grid
from gencontrol.sampling.steps import Ddim, Euler

__all__ = ["DiffusionPolicy", "DiffusionPolicyConfig", "FlowPolicy", "FlowPolicyConfig", "GenerativePolicy"]


class GenerativePolicy(DenoisingPolicy):
    """What the two kinds share; make a `DiffusionPolicy` or a `FlowPolicy`.

    Attributes:
        denoiser: Denoiser of normalised chunks [b horizon A]; its condition is what `encode` returns.
        encoder: ObservationEncoder.
        normalizers: observation key → Normalizer, and "action".
        networks: ModuleDict of "network" and "encoder", the trained weights.
        clipped, drawn: numbers of all chunks so far that lay outside the data's limits, and numbers in all.
    """

    Config: ClassVar[type[PolicyConfig]] = PolicyConfig

    def __init__(
        self,
        spec: PolicySpec,
        config: PolicyConfig,
        normalizers: Mapping[str, Normalizer],
        limits: tuple[Tensor, Tensor] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        """Make a policy with fresh weights.

        Args:
            spec: what it reads and writes.
            config: options.
            normalizers: of each state (its shape) and of "action" [A].
            limits: smallest and largest action of the training data, each [A]; None where nothing is known.
            seed: of the weights.

        Raises:
            UsageError: a normaliser is missing or has another shape, or the network cannot have these sizes.
        """
        if "action" not in normalizers or tuple(normalizers["action"].shift.shape) != (spec.action_dim,):
            raise UsageError(f"the normaliser of 'action' must be there and have {spec.action_dim} numbers.")
        process, prediction, step = self._noise(config)
        self.config, self.normalizers = config, dict(normalizers)
        self.limits = limits
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "policy/weights"))
            self.encoder = ObservationEncoder(spec, normalizers, config.crop, config.image_features)
            network = _network(spec, config, self.encoder.channels, process)
        self.networks = nn.ModuleDict({"network": network, "encoder": self.encoder}).eval()
        self.network = network
        floor = -math.inf if config.clip else -14.0
        denoiser = Denoiser(network, process, prediction, eps_floor=floor)
        sampler = ChunkSampler(config.inference_steps, step, None, config.clip or None)
        super().__init__(spec, denoiser, normalizers["action"], sampler)
        self._plans: dict[tuple[ChunkSampler, torch.device], tuple[StepTable, Tensor]] = {}
        self.clipped, self.drawn = 0, 0

    def _noise(self, config: PolicyConfig) -> tuple[GaussianProcess, str, Ddim | Euler]:
        """Return process, prediction type and sampler step."""
        raise NotImplementedError(f"{type(self).__name__}: make a DiffusionPolicy or a FlowPolicy")  # abstract

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.networks.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        """Move the weights; returns the policy."""
        self.networks.to(device)
        return self

    # ---- acting -----------------------------------------------------------------------------------------------------

    def encode(self, history: History) -> Float[Tensor, "b c"]:
        """Return the denoiser's condition of observations key → [b n_obs ...]."""
        device = self.device
        tensors = {key: torch.as_tensor(history[key], device=device) for key in self.spec.observations}
        found: Tensor = self.encoder(tensors)
        return found

    def sample_chunk(self, observation: History, noise: Keyed) -> Float[Tensor, "b horizon action"]:
        """Return chunks in the environment's units; the final clipping to the data's limits is counted.

        Args:
            observation: key → [b n_obs ...].
            noise: one stream per row; draw 0 is the start, draw k + 1 the noise of step k.
        """
        with torch.inference_mode():
            return self.finish(self.draw(self.encode(observation), noise))

    @torch.no_grad()
    def draw(self, cond: Float[Tensor, "b c"], noise: Keyed) -> Float[Tensor, "b horizon action"]:
        """Return normalised chunks for encoded observations, by `self.sampler`.

        DDIM and Euler on the process's own grid go through the fast loop, anything else through `sample`.
        """
        shape = (len(cond), self.spec.horizon, self.spec.action_dim)
        if self.sampler.times is not None or not isinstance(self.sampler.step, (Ddim, Euler)):
            return self.sampler.draw(self.denoiser, shape, noise, cond)
        table, times = self.plan(self.sampler, cond.device)
        x = self.denoiser.process.prior(shape, noise, cond.device)
        entries = self.network.plan(times, cond)
        draws = step_noise(table, shape, noise, cond.device)
        return run(table, lambda k, state: self.network.planned(state, entries[k]), x, draws)

    def plan(self, sampler: ChunkSampler, device: torch.device) -> tuple[StepTable, Tensor]:
        """Return table and times [k] of a sampler of DDIM or Euler steps, computed once."""
        found = self._plans.get((sampler, device))
        if found is None:
            step = sampler.step
            assert isinstance(step, (Ddim, Euler))  # `draw` asked
            grid = make_grid(self.denoiser.process.schedule, *self._grid(sampler.steps))
            table = table_of(self.denoiser, grid, step, limit=sampler.clip or math.inf)
            found = table, torch.tensor(table.times, dtype=torch.float32, device=device)
            self._plans[sampler, device] = found
        return found

    def _grid(self, steps: int) -> tuple[int, Sequence[float] | None]:
        """Return the number of steps and the process's own times, None for equal ones."""
        times = self.denoiser.process.times(steps)
        return (steps, None) if times is None else (len(times) - 1, times)

    def finish(self, chunk: Float[Tensor, "b horizon action"]) -> Float[Tensor, "b horizon action"]:
        """Return a normalised chunk in the environment's units, clipped to the data's limits (counted)."""
        actions = self.action_normalizer.denormalize(chunk)
        if self.config.limits == "none" or self.limits is None:
            return actions
        low, high = (end.to(actions) for end in self.limits)
        inside = actions.clamp(low, high)
        # a chunk clipped in normalised units may still miss the limit by a rounding error
        span = (high - low).abs() * 1e-5
        self.clipped += int(((inside - actions).abs() > span).sum())
        self.drawn += actions.numel()
        return inside

    # ---- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors (weights, normalisers, limits)."""
        from gencontrol.robotics.policies.files import write_policy

        write_policy(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load a folder that `save_pretrained` wrote.

        Raises:
            UsageError: no such folder, a damaged file, or a policy of another class; one line names it.
        """
        from gencontrol.robotics.policies.files import read_policy

        return read_policy(cls, Path(folder))


class DiffusionPolicy(GenerativePolicy):
    """Chunks by denoising diffusion over the levels of squaredcos_cap_v2; see the module docstring."""

    Config = DiffusionPolicyConfig

    def _noise(self, config: PolicyConfig) -> tuple[GaussianProcess, str, Ddim | Euler]:
        if not isinstance(config, DiffusionPolicyConfig):
            raise UsageError(f"a DiffusionPolicy takes a DiffusionPolicyConfig, not a {type(config).__name__}.")
        levels, trailing = config.train_steps, config.spacing == "trailing"
        grid = functools.partial(diffusion_grid, levels, trailing=trailing)
        process = GridProcess(squaredcos(levels), grid=grid)
        return process, config.prediction, Ddim(1.0 if config.sampler == "ddpm" else 0.0)


class FlowPolicy(GenerativePolicy):
    """Chunks by rectified flow, from noise to actions along straight lines; see the module docstring."""

    Config = FlowPolicyConfig

    def _noise(self, config: PolicyConfig) -> tuple[GaussianProcess, str, Ddim | Euler]:
        if not isinstance(config, FlowPolicyConfig):
            raise UsageError(f"a FlowPolicy takes a FlowPolicyConfig, not a {type(config).__name__}.")
        return GaussianProcess(_line()), "velocity", Euler()


@functools.cache
def squaredcos(levels: int) -> Table:
    """Return the table of squaredcos_cap_v2 (Nichol & Dhariwal 2021, eq. 17; betas at most 0.999), one object per size.

    One object, because models that share their schedule are composed without conversion.
    """
    bar = [math.cos((i / levels + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(levels + 1)]
    product, found = 1.0, []
    for before, after in zip(bar, bar[1:]):
        product *= 1.0 - min(1.0 - after / before, 0.999)
        found.append(product)
    return Table.from_alphas_cumprod(found)


@functools.cache
def _line() -> Linear:
    """The one schedule of flow policies."""
    return Linear()


def diffusion_grid(levels: int, steps: int, *, trailing: bool) -> Sequence[float]:
    """Return times of the levels that diffusers visits with `steps` steps, then 0; level k lies at (k + 1)/levels.

    Args:
        trailing: levels from the last one down, else (leading) multiples of levels // steps from 0 up.

    Raises:
        UsageError: more steps than levels.
    """
    if not 1 <= steps <= levels:
        raise UsageError(f"{steps} steps of {levels} noise levels; give 1 to {levels}.")
    if trailing:
        visited = [round(levels - k * levels / steps) - 1 for k in range(steps)]
    else:
        visited = [k * (levels // steps) for k in reversed(range(steps))]
    return [(k + 1) / levels for k in visited] + [0.0]


def _network(spec: PolicySpec, config: PolicyConfig, channels: int, process: GaussianProcess) -> ChunkNetwork:
    """Return a fresh network.

    Raises:
        UsageError: it cannot have these sizes.
    """
    width, depth = config.sizes
    shape = (spec.horizon, spec.action_dim, channels)
    try:
        if config.backbone == "unet":
            return ChunkUnet(*shape, width, depth)
        if config.backbone == "transformer":
            return ChunkTransformer(*shape, width, depth)
        return ChunkMlp(*shape, process.schedule, width, depth)
    except ValueError as error:
        raise UsageError(f"{error}; change horizon, width or depth.") from error
