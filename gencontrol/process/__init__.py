"""Noise laws: schedules, prediction types, the Gaussian and the masked process."""

from gencontrol.process.gaussian import GaussianProcess, GridProcess, Time
from gencontrol.process.masked import MaskedProcess
from gencontrol.process.schedule import VP, Coeffs, Cosine, Edm, Linear, Schedule, Table

__all__ = [
    "VP",
    "Coeffs",
    "Cosine",
    "Edm",
    "GaussianProcess",
    "GridProcess",
    "Linear",
    "MaskedProcess",
    "Schedule",
    "Table",
    "Time",
]
