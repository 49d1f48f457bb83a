"""Diffusion and flow policies: observations in, chunks of actions out (Chi et al. 2023; Lipman et al. 2023).

A diffusion policy has the 100 levels of squaredcos_cap_v2 and is sampled by DDIM or DDPM; a flow policy is rectified
flow with Euler steps.  Both train at continuous times (ours: the table interpolates), so that either can be asked at
the noise levels of the other (docs/methods/gpc.md#noise-levels).  Chunks are normalised; x0 is clipped and eps follows
from it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gencontrol.config import build
from gencontrol.data.normalize import Normalizer, pack, unpack
from gencontrol.errors import UsageError
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.folders import read_config, read_weights, write_model
from gencontrol.models.networks.chunk_networks import ChunkMlp, ChunkNetwork, ChunkTransformer
from gencontrol.models.networks.unet1d import ChunkUnet
from gencontrol.process import GaussianProcess, GridProcess, Linear, Table
from gencontrol.rng import Keyed, stream_seed
from gencontrol.robotics.policies.chunked import PolicySpec
from gencontrol.robotics.policies.config import DiffusionPolicyConfig, FlowPolicyConfig, PolicyConfig
from gencontrol.robotics.policies.denoising import ChunkSampler, DenoisingPolicy, History
from gencontrol.robotics.policies.observation_encoder import ObservationEncoder
from gencontrol.sampling.fast import StepTable, run, step_noise, step_table
from gencontrol.sampling.grids import make_grid
from gencontrol.sampling.steps import Ddim, Euler

#: the one schedule of flow policies: models that share their schedule object are composed without conversion
LINE = Linear()

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
            width, depth = config.sizes
            shape = (spec.horizon, spec.action_dim, self.encoder.channels)
            try:
                network: ChunkNetwork
                if config.backbone == "mlp":
                    network = ChunkMlp(*shape, process.schedule, width, depth)
                else:
                    network = (ChunkUnet if config.backbone == "unet" else ChunkTransformer)(*shape, width, depth)
            except ValueError as error:
                raise UsageError(f"{error}; change horizon, width or depth.") from error
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
        found: Tensor = self.encoder(
            {key: torch.as_tensor(history[key], device=device) for key in self.spec.observations}
        )
        return found

    @torch.no_grad()
    def draw(self, cond: Float[Tensor, "b c"], noise: Keyed) -> Float[Tensor, "b horizon action"]:
        """Return normalised chunks for encoded observations, by `self.sampler`.

        DDIM and Euler on the process's own grid go through the fast loop, anything else through `sample`.
        """
        if self.sampler.times is not None or not isinstance(self.sampler.step, (Ddim, Euler)):
            return super().draw(cond, noise)
        shape = (len(cond), self.spec.horizon, self.spec.action_dim)
        table, times = self.plan(self.sampler, cond.device)
        x = self.denoiser.process.prior(shape, noise, cond.device)
        # what follows from time and condition alone is computed for all steps at once
        entries = self.network.plan(times, cond)
        return run(table, self.network.planned, entries, x, step_noise(table, shape, noise, cond.device))

    def plan(self, sampler: ChunkSampler, device: torch.device) -> tuple[StepTable, Tensor]:
        """Return table and times [k] of a sampler of DDIM or Euler steps, computed once."""
        found = self._plans.get((sampler, device))
        if found is None:
            step, process = sampler.step, self.denoiser.process
            assert isinstance(step, (Ddim, Euler))  # `draw` asked
            own = process.times(sampler.steps)  # the levels that were trained; None where every time was
            grid = make_grid(process.schedule, sampler.steps if own is None else len(own) - 1, own)
            table = step_table(self.denoiser, grid, step, limit=sampler.clip or math.inf)
            found = table, torch.tensor(table.times, dtype=torch.float32, device=device)
            self._plans[sampler, device] = found
        return found

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
        """Write config.json (class, spec, options) and model.safetensors; the weights appear whole or not at all.

        The tensors are "network.*" and "encoder.*", "normalizer.<key>.shift" and ".scale" in the environment's units,
        and "limits.low", "limits.high" where they are known.

        Raises:
            UsageError: a file is in the way.
        """
        if Path(folder).is_file():
            raise UsageError(f"'{folder}' is a file; save_pretrained writes a folder: give another path.")
        spec = dataclasses.asdict(self.spec)
        spec["observations"] = {key: list(shape) for key, shape in self.spec.observations.items()}
        weights: dict[str, Tensor] = dict(self.networks.state_dict())
        # copies: keys that share one normaliser share its tensors, which safetensors refuses
        weights |= {f"normalizer.{name}": value.clone() for name, value in pack(self.normalizers).items()}
        if self.limits is not None:
            weights |= {"limits.low": self.limits[0], "limits.high": self.limits[1]}
        table = {"spec": spec, "policy": dataclasses.asdict(self.config)}
        write_model(folder, type(self).__name__, table, weights)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load a folder that `save_pretrained` wrote.

        Raises:
            UsageError: no such folder, a damaged file, or a policy of another class; one line names it.
        """
        table, weights = _read(cls.__name__, Path(folder))
        try:
            given = dict(table["spec"])
            given["observations"] = {key: tuple(shape) for key, shape in given["observations"].items()}
            spec = PolicySpec(**given)
            config = build(cls.Config, table["policy"], "policy")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UsageError(f"'{folder}/config.json' does not describe a {cls.__name__}: {error}") from error
        parts: dict[str, dict[str, Tensor]] = {"normalizer": {}, "limits": {}, "": {}}
        for name, value in weights.items():
            first, _, rest = name.partition(".")
            parts[first if first in parts else ""][rest if first in parts else name] = value
        theirs, ends = parts[""], parts["limits"]
        limits = (ends["low"], ends["high"]) if {"low", "high"} <= set(ends) else None
        policy = cls(spec, config, unpack(parts["normalizer"]), limits)
        mine = policy.networks.state_dict()
        missing, unknown = sorted(mine.keys() - theirs.keys()), sorted(theirs.keys() - mine.keys())
        wrong = sorted(key for key in mine.keys() & theirs.keys() if mine[key].shape != theirs[key].shape)
        if missing or unknown or wrong:
            raise UsageError(
                f"'{folder}/model.safetensors' does not fit its config.json: missing {missing[:3]}, unknown "
                f"{unknown[:3]}, other shape {wrong[:3]}; save the policy again."
            )
        policy.networks.load_state_dict(theirs)
        return policy


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
        return GaussianProcess(LINE), "velocity", Euler()


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


def _read(name: str, folder: Path) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Return the config and the tensors of a folder of the class `name`."""
    try:
        table = read_config(folder, name)
    except UsageError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"'{folder}/config.json' is damaged ({error}); copy or save the policy again.") from error
    path = folder / "model.safetensors"
    if not path.exists():
        raise UsageError(f"'{folder}' has no model.safetensors; copy or save the policy again.")
    try:
        return table, read_weights(folder)
    except Exception as error:  # safetensors raises an exception class of its own
        raise UsageError(f"'{path}' is damaged ({error}); copy or save the policy again.") from error
