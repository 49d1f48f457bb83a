"""Schedules by which the frozen parameter sets follow the policy, and the history that places a reward in [0, 1].

Schedules: methods/crd.md §3.2 (PORT; the same rule serves DiffusionNFT).  The history is ours: a KL strength that grows
with the reward needs a reward in [0, 1], and an unbounded one has no place there but its rank among those seen so far.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

#: Schedules by name (PORT).
PRESETS = {
    "none": "0-0-0-0",
    "slow": "0-0-0.001-0.5",
    "medium": "75-0-0.0075-0.999",
    "offline": "0-1-0-1",
    "fast": "0-0-0.02-0.99",
    "moderate": "0-0-0.01-0.5",
}
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_FORM = re.compile("-".join([_NUMBER] * 4))


@dataclass(frozen=True)
class LinearDecay:
    """d(s) = first for s < start, else min(first + slope·(s − start), last); d = 0 copies the policy, d = 1 freezes.

    Args:
        start: optimizer step from which the decay rises.
        first, last: decay before and at the end, in [0, 1].
        slope: rise per optimizer step, ≥ 0.
    """

    start: float
    first: float
    slope: float
    last: float

    @classmethod
    def parse(cls, text: str) -> LinearDecay:
        """Read "start-first-slope-last", e.g. "75-0.0-0.0075-0.999", or the name of a preset.

        Raises:
            ValueError: another form, or a decay outside [0, 1].
        """
        found = _FORM.fullmatch(PRESETS.get(text, text).replace(" ", ""))
        if found is None:
            raise ValueError(
                f"decay {text!r}; expected start-first-slope-last like 75-0-0.0075-0.999, or {', '.join(PRESETS)}"
            )
        decay = cls(*(float(part) for part in found.groups()))
        if decay.first > 1 or decay.last > 1:
            raise ValueError(f"decay {text!r} leaves [0, 1]; 0 copies the policy, 1 freezes the snapshot")
        return decay

    def at(self, step: int) -> float:
        """Decay after `step` optimizer steps."""
        return self.first if step < self.start else min(self.first + self.slope * (step - self.start), self.last)


class RewardRange:
    """Places rewards in [0, 1]: as they are while all lie there, else by rank among all rewards seen so far.

    The history keeps at most `LIMIT` values: when it is full, every second value of the sorted list stays and only
    every second new one enters from then on, so that old and new ones keep equal weight.
    """

    LIMIT = 4096

    def __init__(self) -> None:
        self.unbounded = False
        self.stride = 1
        self.seen: Float[Tensor, " n"] = torch.zeros(0, dtype=torch.float64)

    def add(self, values: Float[Tensor, " n"]) -> None:
        """Enter a round's valid rewards."""
        values = values.detach().double().cpu()
        self.unbounded = self.unbounded or bool(((values < 0) | (values > 1)).any())
        self.seen = torch.cat([self.seen, values.sort().values[:: self.stride]]).sort().values
        while len(self.seen) > self.LIMIT:
            self.seen, self.stride = self.seen[::2].clone(), 2 * self.stride

    def place(self, values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return the rewards' places in [0, 1], float64 on the CPU; the middle of its ties for a repeated value."""
        values = values.detach().double().cpu()
        if not self.unbounded:
            return values.clamp(0.0, 1.0)
        if not len(self.seen):
            return torch.zeros_like(values)
        values = values.contiguous()
        below = torch.searchsorted(self.seen, values, right=False)
        upto = torch.searchsorted(self.seen, values, right=True)
        return (below + upto).double() / (2 * len(self.seen))

    def state_dict(self) -> dict[str, object]:
        """Everything, for the checkpoint."""
        return {"unbounded": self.unbounded, "stride": self.stride, "seen": self.seen.clone()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore what `state_dict` returned."""
        seen = state["seen"]
        assert isinstance(seen, Tensor)
        self.unbounded, self.stride = bool(state["unbounded"]), int(str(state["stride"]))
        self.seen = seen.double().clone()
