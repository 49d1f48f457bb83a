"""Which step of ours runs in place of a scheduler of diffusers, and what is said where it is not the same one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

#: scheduler → (our step, what differs; "" where it is followed: tests/golden/test_golden_samplers.py)
_FIXED: Mapping[str, tuple[str, str]] = {
    "FlowMatchEulerDiscreteScheduler": ("euler", ""),
    "FlowMatchHeunDiscreteScheduler": ("heun", ""),
    "DDIMScheduler": ("ddim", ""),
    "DDPMScheduler": ("sde", ""),
    "EulerDiscreteScheduler": ("ddim", ""),
    "EulerAncestralDiscreteScheduler": ("sde", ""),
    "EDMEulerScheduler": ("ddim", ""),
    "LMSDiscreteScheduler": ("lms", ""),
    "HeunDiscreteScheduler": ("heun", "Heun's rule in our coordinates instead of the noise level"),
    "DPMSolverSinglestepScheduler": ("dpmpp2m", "the multistep solver of order 2"),
    "UniPCMultistepScheduler": ("dpmpp2m", "the predictor of order 2 without UniPC's corrector"),
    "DEISMultistepScheduler": ("dpmpp2m", "DPM-Solver++ of order 2"),
}
_DPM = ("DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler")


def step_of(scheduler: Any) -> str:
    """Return the name of our step for a pipeline's scheduler; says in one warning where it is another one."""
    step, differs = _chosen(scheduler)
    if differs:
        warnings.warn(
            f"this pipeline's {type(scheduler).__name__} runs as '{step}': {differs}; `step=` takes others.",
            UserWarning,
            stacklevel=4,
        )
    return step


def _chosen(scheduler: Any) -> tuple[str, str]:
    """Return (our step, what differs or "")."""
    name, config = type(scheduler).__name__, scheduler.config
    if config.get("prediction_type") == "flow_prediction":
        return "euler", "Euler's rule, as flows are usually sampled"
    if name == "PNDMScheduler":
        return "plms", "" if config.get("skip_prk_steps") else "the same without its Runge–Kutta warm-up"
    kind = next((known for known in _DPM if known in [base.__name__ for base in type(scheduler).__mro__]), None)
    step, differs = _FIXED.get(name, ("ddim", "ddim")) if kind is None else _dpm(kind, config)
    if config.get("use_karras_sigmas") and not differs:
        differs = "at the exact noise levels of the Karras grid, whose times diffusers rounds to integers"
    return step, differs


def _dpm(kind: str, config: Any) -> tuple[str, str]:
    """DPM-Solver++ in its variants."""
    order, algorithm = config.get("solver_order", 2), config.get("algorithm_type", "dpmsolver++")
    noisy = kind == _DPM[2] or algorithm.startswith("sde")
    names = {True: {1: "sde", 2: "sde-dpmpp2m"}, False: {1: "ddim", 2: "dpmpp2m"}}[noisy]
    step = names.get(order, names[2])
    if order > 2:
        return step, "order 2 instead of 3"
    if not algorithm.endswith("++") and kind != _DPM[2]:
        return step, f"DPM-Solver++ instead of '{algorithm}'"
    if order == 2 and config.get("solver_type", "midpoint") != "midpoint":
        return step, f"the midpoint rule instead of '{config.get('solver_type')}'"
    if config.get("final_sigmas_type") == "sigma_min":
        return step, "with a last step of order 2 also below 15 steps"
    return step, ""
