"""diffusers models as Denoisers: a scheduler's configuration becomes a process, a prediction type and a time map.

Times: t in [0, 1] with t = 0 data; what a diffusers network is given is computed here and nowhere else.

| scheduler | process | prediction | network's timestep |
|---|---|---|---|
| over `alphas_cumprod` (DDIM, DPM-Solver, Euler, …) | Table, a² + s² = 1 | epsilon, v, x0 | index of the table |
| FlowMatch Euler and Heun | Linear | velocity (noise − data) | 1000·t |
| CosineDPMSolverMultistep (Stable Audio) | Cosine: sigma = tan(πt/2) | v, or EDM for "epsilon" | t = 2/π·atan(sigma) |
| EDM Euler, EDM DPM-Solver | Edm | EDM | ln(sigma)/4 |

Euler-type schedulers keep x in variance-exploding scale; ours is x/sqrt(1 + sigma²) in both directions, so that one
denoiser serves all of them, and a `ddim` step here is their Euler step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gencontrol.errors import UsageError
from gencontrol.models.adapters.networks import DiffusersNetwork
from gencontrol.models.denoiser import Denoiser
from gencontrol.process import Cosine, Edm, GaussianProcess, Linear, Table
from gencontrol.process.schedule import Schedule
from gencontrol.types import Prediction

_PREDICTIONS = {"epsilon": Prediction.EPS, "v_prediction": Prediction.V, "sample": Prediction.X0}
_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_COSINE = "CosineDPMSolverMultistepScheduler"
_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
#: schedulers over a table of alphas; the second group gives its inference grid as sigmas, the first as indices
_BY_INDEX = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")
_BY_SIGMA = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
)


@dataclass(frozen=True)
class Law:
    """What a scheduler says about the network: noise law, meaning of the output, its timestep, scale of the data."""

    schedule: Schedule
    prediction: Prediction
    timestep: Callable[[Tensor], Tensor]
    sigma_data: float = 1.0


def from_diffusers(network: nn.Module, scheduler: Any) -> Denoiser:
    """Return a diffusers network with its scheduler as a Denoiser; conditions are described in `adapters_networks`.

    Raises:
        UsageError: a network class, scheduler class or setting without an adapter.
    """
    law = scheduler_law(scheduler)
    wrapped = DiffusersNetwork(network, law.timestep)
    return Denoiser(wrapped, GaussianProcess(law.schedule), law.prediction, sigma_data=law.sigma_data)


def scheduler_law(scheduler: Any) -> Law:
    """Read the noise law that a scheduler was configured with.

    Raises:
        UsageError: a scheduler class or setting without an adapter.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name in _FLOW:
        if config.get("invert_sigmas", False):
            raise UsageError(f"{name} with invert_sigmas (Mochi) has no adapter.")
        return Law(Linear(), Prediction.VELOCITY, lambda t: t * float(config.num_train_timesteps))
    if name == _COSINE:
        return _cosine_law(config)
    if name in _EDM:
        if config.prediction_type != "epsilon":
            raise UsageError(f"{name} with prediction_type '{config.prediction_type}' has no adapter; only 'epsilon'.")
        edm = Edm(config.sigma_min, config.sigma_max, config.rho)
        return Law(edm, Prediction.EDM, lambda t: edm.coeffs(t).s.log() / 4, float(config.sigma_data))
    if name not in _BY_INDEX + _BY_SIGMA:
        known = ", ".join((*_BY_INDEX, *_BY_SIGMA, *_FLOW, _COSINE, *_EDM))
        raise UsageError(f"no adapter for the scheduler {name}; known: {known}.")
    flow_sigmas = name in _BY_SIGMA and config.get("use_flow_sigmas", False)
    if config.prediction_type == "flow_prediction" or flow_sigmas:
        if config.prediction_type != "flow_prediction" or not flow_sigmas:
            raise UsageError(f"{name}: use_flow_sigmas and prediction_type 'flow_prediction' go together; set both.")
        return Law(Linear(), Prediction.VELOCITY, lambda t: t * float(config.num_train_timesteps))
    if config.prediction_type not in _PREDICTIONS:
        raise UsageError(f"prediction_type '{config.prediction_type}' is unknown; known: {', '.join(_PREDICTIONS)}.")
    if config.get("timestep_type", "discrete") != "discrete":
        raise UsageError(f"{name} with timestep_type '{config.timestep_type}' has no adapter; only 'discrete'.")
    table = Table.from_alphas_cumprod(scheduler.alphas_cumprod.double())
    return Law(table, _PREDICTIONS[config.prediction_type], table.index_of)


def _cosine_law(config: Any) -> Law:
    """Stable Audio: EDM preconditioning with sigma_data 1 is Cosine with V, since c_skip = a², c_out = −s, c_in = a."""
    if float(config.sigma_data) != 1.0:
        raise UsageError(f"{_COSINE} with sigma_data {config.sigma_data} has no adapter; only 1.0.")
    predictions = {"v_prediction": Prediction.V, "epsilon": Prediction.EDM}
    if config.prediction_type not in predictions:
        raise UsageError(f"{_COSINE} with prediction_type '{config.prediction_type}' has no adapter.")
    return Law(Cosine(), predictions[config.prediction_type], lambda t: t)


def scheduler_times(
    scheduler: Any,
    denoiser: Denoiser,
    steps: int,
    sequence_length: int | None = None,
    *,
    spacing: Literal["scheduler", "even"] | None = None,
) -> Float[Tensor, " k"]:
    """Return the times, from noise to data, of the scheduler's own grid: what its pipeline would step through.

    Args:
        scheduler: read only; a copy is asked for its grid.
        denoiser: made by `from_diffusers` with this scheduler.
        steps: number of inference steps; the result has one time more (two for Heun count as one).
        sequence_length: tokens of one latent, where the shift depends on it (`use_dynamic_shifting`, as in FLUX).
        spacing: of flow-matching noise levels before the shift: the scheduler's own (Stable Diffusion 3's pipeline), or
            "even", 1 − i/steps (FLUX's); None is even where the shift is dynamic.

    Raises:
        UsageError: the scheduler shifts dynamically and no `sequence_length` is given, or has no adapter.
    """
    own = copy.deepcopy(scheduler)
    assert isinstance(denoiser.process, GaussianProcess)
    name, config, schedule = type(own).__name__, own.config, denoiser.process.schedule
    if name in _BY_INDEX:
        assert isinstance(schedule, Table)
        own.set_timesteps(steps)
        index = own.timesteps.double()  # PNDM lists its second time twice
        # the last step of DDIM and PNDM lands on the first entry of the table unless set_alpha_to_one
        last = (
            0.0
            if config.get("set_alpha_to_one", True)
            else float(schedule.time_of_index(torch.zeros((), dtype=torch.float64)))
        )
        times = torch.cat([schedule.time_of_index(index), torch.tensor([last])])
        return _decreasing(times)
    euler = name == _FLOW[0]  # the Heun twin takes neither
    dynamic = euler and config.get("use_dynamic_shifting", False)
    shift = {"mu": _shift_of(config, sequence_length)} if dynamic else {}
    if euler and (spacing == "even" or (spacing is None and dynamic)):
        own.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], **shift)
    else:
        own.set_timesteps(steps, **shift)
    sigmas = own.sigmas.double()
    if isinstance(schedule, Linear):
        return _decreasing(sigmas)
    if isinstance(schedule, Cosine):
        return _decreasing(sigmas.atan() * (2 / math.pi))
    times = schedule.time_of(-2 * sigmas.clamp_min(1e-30).log())
    return _decreasing(torch.where(sigmas == 0, torch.zeros_like(times), times))


def _shift_of(config: Any, sequence_length: int | None) -> float:
    """FLUX's mu: linear in the number of tokens between two anchors."""
    if sequence_length is None:
        raise UsageError("this scheduler's shift depends on the size (use_dynamic_shifting); give sequence_length.")
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    part = (sequence_length - low) / (high - low)
    return config.get("base_shift", 0.5) + part * (config.get("max_shift", 1.15) - config.get("base_shift", 0.5))


def _decreasing(times: Tensor) -> Float[Tensor, " k"]:
    """Drop repeated times (Heun lists each inner time twice) and check the order."""
    times = torch.unique_consecutive(times.clamp(0.0, 1.0))
    if not bool((times.diff() < 0).all()):
        raise UsageError(f"the scheduler's grid does not decrease: {times.tolist()[:8]}…; check its configuration.")
    return times.double()
