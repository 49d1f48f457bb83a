"""Sampling: stateless steps, the loop, time grids, the controls (Model → Model), and searches by reward.

Names are found on first use, so that the table of samplers (`gencontrol.sampling.samplers`) costs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gencontrol.sampling.guidance import cfg, clip_x0, compose, inpaint, own_conditions, retime, score_shift
    from gencontrol.sampling.loop import STEPS, Callback, Path, make_step, sample
    from gencontrol.sampling.masked_steps import Ancestral as ancestral
    from gencontrol.sampling.masked_steps import Blocks as blocks
    from gencontrol.sampling.masked_steps import Confidence as confidence
    from gencontrol.sampling.multistep import DpmPp2M as dpmpp2m
    from gencontrol.sampling.state import State, Step, gaussian_log_prob
    from gencontrol.sampling.steps import Ddim as ddim
    from gencontrol.sampling.steps import Euler as euler
    from gencontrol.sampling.steps import Heun as heun
    from gencontrol.sampling.steps import Sde as sde

_WHERE = {
    **dict.fromkeys(("cfg", "clip_x0", "compose", "inpaint", "own_conditions", "retime", "score_shift"), "guidance:"),
    **dict.fromkeys(("STEPS", "Callback", "Path", "make_step", "sample"), "loop:"),
    **dict.fromkeys(("State", "Step", "gaussian_log_prob"), "state:"),
    "ancestral": "masked_steps:Ancestral",
    "blocks": "masked_steps:Blocks",
    "confidence": "masked_steps:Confidence",
    "ddim": "steps:Ddim",
    "dpmpp2m": "multistep:DpmPp2M",
    "euler": "steps:Euler",
    "heun": "steps:Heun",
    "sde": "steps:Sde",
}


def __getattr__(name: str) -> Any:
    """Import an exported name when it is first asked for."""
    if name not in _WHERE:
        raise AttributeError(f"module 'gencontrol.sampling' has no attribute '{name}'")
    module, _, attribute = _WHERE[name].partition(":")
    return getattr(import_module(f"gencontrol.sampling.{module}"), attribute or name)


__all__ = [
    "STEPS",
    "Callback",
    "Path",
    "State",
    "Step",
    "ancestral",
    "blocks",
    "cfg",
    "clip_x0",
    "compose",
    "confidence",
    "ddim",
    "dpmpp2m",
    "euler",
    "gaussian_log_prob",
    "heun",
    "inpaint",
    "make_step",
    "own_conditions",
    "retime",
    "sample",
    "score_shift",
    "sde",
]
