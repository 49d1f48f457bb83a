"""The one table of search methods and their traits.  Importing it loads no torch: commands and pages read it too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gencontrol.errors import UsageError, nearest


@dataclass(frozen=True)
class Sampler:
    """A search method.

    Args:
        title: what people call it.
        readout: "sample" where its samples follow p·exp(r/τ), "best" where it looks for the largest reward.
        call: "module:function" of a particle sampler, (target, number of particles, options) → Particles.
        select, widening: selection rule and widening of a tree, by name; "" for particles.
        gradient: whether it follows the gradient of the reward.
        children: candidates that every step draws, each at the price of a model call; None: there is one path.
        anytime: whether a finished search goes on with a larger budget; trees and islands.
    """

    title: str
    readout: Literal["best", "sample"]
    call: str = ""
    select: str = ""
    widening: str = ""
    gradient: bool = False
    children: int | None = None
    anytime: bool = False

    @property
    def tree(self) -> bool:
        """Whether it grows a tree, which can be stored and grown further."""
        return not self.call

    def cost(self, steps: int, children: int | None = None) -> int:
        """Model calls of one sample on a path of so many steps; children: None takes the sampler's own number."""
        if self.children is None:
            return steps
        return 1 + (self.children if children is None else children) * (steps - 1)  # the last step draws nothing


_UNGUIDED, _STEERING = "gencontrol.sampling.particles.unguided", "gencontrol.sampling.particles.steering"
_ISLANDS = "gencontrol.sampling.particles.islands"

#: name → sampler.  DTS and DTS* are arXiv 2506.20701; selection and widening of DTS are ours
#: (docs/methods/dts.md#shrunk), and so is the widening of DTS*: the paper's is best-of-n for the first 36 rollouts,
#: more than most budgets pay for.  Ten children are those of SVDD's public code (CODE).
SAMPLERS: dict[str, Sampler] = {
    "dts": Sampler("diffusion tree sampling (DTS)", "sample", select="shrunk", widening="steady", anytime=True),
    "dts-star": Sampler("diffusion tree search (DTS*)", "best", select="uct", widening="small", anytime=True),
    "islands": Sampler("calibrated islands", "sample", f"{_ISLANDS}:islands", anytime=True),
    "best-of-n": Sampler("best of n", "best", f"{_UNGUIDED}:best_of_n"),
    "snis": Sampler("importance sampling", "sample", f"{_UNGUIDED}:snis"),
    "smc": Sampler("sequential Monte Carlo", "sample", f"{_STEERING}:smc"),
    "tds": Sampler("twisted sequential Monte Carlo (TDS)", "sample", f"{_STEERING}:tds", gradient=True),
    "das": Sampler("tempered sequential Monte Carlo (DAS)", "sample", f"{_STEERING}:das", gradient=True),
    "beam": Sampler("greedy search (beam)", "best", f"{_UNGUIDED}:beam", children=10),
    "dps": Sampler("gradient guidance (DPS)", "best", f"{_STEERING}:dps", gradient=True),
}
TREES = tuple(name for name, row in SAMPLERS.items() if row.tree)
PARTICLES = tuple(name for name, row in SAMPLERS.items() if not row.tree)
#: for messages
NO_GRADIENT = ", ".join(name for name, row in SAMPLERS.items() if not row.gradient)


def sampler(name: str) -> Sampler:
    """Return the sampler of a name.

    Raises:
        UsageError: there is none; the message gives the nearest and all.
    """
    if name not in SAMPLERS:
        raise UsageError(f"unknown sampler '{name}'.{nearest(name, SAMPLERS)} Known: {', '.join(SAMPLERS)}.")
    return SAMPLERS[name]
