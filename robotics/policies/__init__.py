"""Policies: diffusion and flow policies trained here, those of other libraries, and loading by name."""

from typing import TYPE_CHECKING

from gencontrol.registry import lazily

if TYPE_CHECKING:
    from gencontrol.robotics.policies.diffusion import DiffusionPolicy, FlowPolicy, GenerativePolicy
    from gencontrol.robotics.policies.foreign import ForeignPolicy, noise_model, velocity_model
    from gencontrol.robotics.policies.loading import load_policy

__all__ = [
    "DiffusionPolicy",
    "FlowPolicy",
    "ForeignPolicy",
    "GenerativePolicy",
    "load_policy",
    "noise_model",
    "velocity_model",
]

__getattr__ = lazily(
    __name__,
    {
        "DiffusionPolicy": "diffusion",
        "FlowPolicy": "diffusion",
        "ForeignPolicy": "foreign",
        "GenerativePolicy": "diffusion",
        "load_policy": "loading",
        "noise_model": "foreign",
        "velocity_model": "foreign",
    },
)
