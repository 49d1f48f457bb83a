"""Sampling: stateless steps, the loop, time grids and the controls (Model → Model)."""

from gencontrol.sampling.guidance import cfg, compose, inpaint, retime, score_shift
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

__all__ = [
    "STEPS",
    "Callback",
    "Path",
    "State",
    "Step",
    "ancestral",
    "blocks",
    "cfg",
    "compose",
    "confidence",
    "ddim",
    "dpmpp2m",
    "euler",
    "gaussian_log_prob",
    "heun",
    "inpaint",
    "make_step",
    "retime",
    "sample",
    "score_shift",
    "sde",
]
