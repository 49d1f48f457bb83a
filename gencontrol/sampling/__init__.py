"""Sampling: stateless steps, the loop, time grids and the controls (Model → Model)."""

from importlib import import_module
from typing import Any

from gencontrol.sampling.guidance import cfg, clip_x0, compose, inpaint, own_conditions, retime, score_shift
from gencontrol.sampling.loop import STEPS, Callback, Path, make_step, sample
from gencontrol.sampling.masked_steps import Ancestral as ancestral
from gencontrol.sampling.masked_steps import Blocks as blocks
from gencontrol.sampling.masked_steps import Confidence as confidence
from gencontrol.sampling.state import State, Step, gaussian_log_prob
from gencontrol.sampling.steps import Ddim as ddim
from gencontrol.sampling.steps import DpmPp2M as dpmpp2m
from gencontrol.sampling.steps import Euler as euler
from gencontrol.sampling.steps import Heun as heun
from gencontrol.sampling.steps import Sde as sde

#: Found on first use: they load rewards, which plain sampling does not need.
_LATER = {
    "best_of_n": "particles.particles",
    "importance_sampling": "particles.particles",
    "smc": "particles.particles",
    "beam": "particles.particles",
    "tds": "particles.guided",
    "das": "particles.guided",
    "dps": "particles.guided",
    "Particles": "particles.population",
}


def __getattr__(name: str) -> Any:
    """Load a particle sampler."""
    if name not in _LATER:
        raise AttributeError(f"module 'gencontrol.sampling' has no attribute '{name}'")
    return getattr(import_module(f"gencontrol.sampling.{_LATER[name]}"), name)


__all__ = [
    "STEPS",
    "Callback",
    "Particles",
    "Path",
    "State",
    "Step",
    "ancestral",
    "beam",
    "best_of_n",
    "blocks",
    "cfg",
    "clip_x0",
    "compose",
    "confidence",
    "das",
    "ddim",
    "dpmpp2m",
    "dps",
    "euler",
    "gaussian_log_prob",
    "heun",
    "importance_sampling",
    "inpaint",
    "make_step",
    "own_conditions",
    "retime",
    "sample",
    "score_shift",
    "sde",
    "smc",
    "tds",
]
