"""Affine normalisers, one per array: x = (a − shift)/scale, with an exact inverse, stored with the policy.

The modes follow LeRobot's names (docs/robot-interfaces.md#lerobot-normalisers, FOUND): min_max and quantiles map to
[-1, 1], mean_std to unit variance.  Two things differ from it (ours): the inverse uses the same numbers as the forward
map, and a dimension that hardly varies is only shifted (to 0), because dividing by its range would blow its noise up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from gencontrol.errors import UsageError, nearest

Array = NDArray[Any]
#: statistic → array of one row's shape, plus "count" [1]
Statistics = Mapping[str, Array]

#: ranges below this are constant: the threshold of Diffusion Policy's LinearNormalizer (FOUND)
CONSTANT = 1e-4
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def statistics(array: Array) -> dict[str, Array]:
    """Return min, max, mean, std (population), count and the quantiles q01 q10 q50 q90 q99 over the first axis.

    Args:
        array: [n *d] of numbers or booleans, n ≥ 1.

    Raises:
        UsageError: there is no row, or a value is not finite.
    """
    values = np.asarray(array, dtype=np.float64)
    if values.ndim == 0 or len(values) == 0:
        raise UsageError(f"statistics need rows; the array has shape {values.shape}.")
    if not np.isfinite(values).all():
        raise UsageError("statistics need finite numbers; the array holds NaN or infinity.")
    found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    levels = np.quantile(values, list(QUANTILES.values()), axis=0)
    return {**found, "count": np.array([len(values)]), **dict(zip(QUANTILES, levels, strict=True))}


def _identity(found: Statistics) -> tuple[Array, Array]:
    """Change nothing."""
    return np.zeros_like(found["min"]), np.ones_like(found["min"])


def _mean_std(found: Statistics) -> tuple[Array, Array]:
    """Mean 0 and variance 1."""
    return found["mean"], np.where(found["max"] - found["min"] < CONSTANT, 1.0, found["std"])


def _ends(low: Array, high: Array) -> tuple[Array, Array]:
    """[low, high] to [-1, 1]; where they meet, a shift alone."""
    return (low + high) / 2, np.where(high - low < CONSTANT, 1.0, (high - low) / 2)


def _min_max(found: Statistics) -> tuple[Array, Array]:
    """[min, max] to [-1, 1]."""
    return _ends(found["min"], found["max"])


def _quantiles(found: Statistics) -> tuple[Array, Array]:
    """[q01, q99] to [-1, 1]; a dimension that leaves one value in under 1 % of rows uses its ends instead."""
    flat = found["q99"] - found["q01"] < CONSTANT
    return _ends(np.where(flat, found["min"], found["q01"]), np.where(flat, found["max"], found["q99"]))


MODES: dict[str, Callable[[Statistics], tuple[Array, Array]]] = {
    "identity": _identity,
    "mean_std": _mean_std,
    "min_max": _min_max,
    "quantiles": _quantiles,
}


@dataclass(frozen=True)
class Normalizer:
    """x = (a − shift)/scale of one array.

    Args:
        shift: b, of one row's shape.
        scale: g, of the same shape, all above 0.

    Raises:
        UsageError: shapes differ, or a number is not finite or a scale not above 0.
    """

    shift: Float[Tensor, "*d"]
    scale: Float[Tensor, "*d"]

    def __post_init__(self) -> None:
        """Refuse what has no inverse."""
        if self.shift.shape != self.scale.shape:
            raise UsageError(f"normaliser shift has shape {tuple(self.shift.shape)}, scale {tuple(self.scale.shape)}.")
        if not (torch.isfinite(self.shift).all() and torch.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise UsageError("a normaliser needs finite shifts and finite scales above 0; fit it again.")

    @classmethod
    def fit(cls, array: Array | Tensor, mode: str = "min_max") -> Normalizer:
        """Fit to rows.

        Args:
            array: [n *d], n ≥ 1, finite.
            mode: "min_max", "quantiles" (1 % and 99 %) to [-1, 1], "mean_std" or "identity".
        """
        values = array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
        return cls.from_statistics(statistics(values), mode)

    @classmethod
    def from_statistics(cls, found: Statistics, mode: str = "min_max") -> Normalizer:
        """Make one from known statistics, e.g. those of a LeRobot data set.

        Raises:
            UsageError: the mode is unknown, or a statistic that it needs is missing.
        """
        if mode not in MODES:
            raise UsageError(f"unknown normaliser '{mode}'; choose from {', '.join(MODES)}.{nearest(mode, MODES)}")
        try:
            shift, scale = MODES[mode]({key: np.asarray(value, np.float64) for key, value in found.items()})
        except KeyError as error:
            raise UsageError(
                f"normaliser '{mode}' needs the statistic {error}; there are {', '.join(found)}."
            ) from error
        return cls(torch.from_numpy(np.asarray(shift)).float(), torch.from_numpy(np.asarray(scale)).float())

    def normalize(self, a: Tensor) -> Float[Tensor, "*b d"]:
        """Return (a − shift)/scale for a of shape [... *d]."""
        return (a - self.shift.to(a.device)) / self.scale.to(a.device)

    def denormalize(self, x: Tensor) -> Float[Tensor, "*b d"]:
        """Return scale·x + shift."""
        return x * self.scale.to(x.device) + self.shift.to(x.device)

    def state_dict(self) -> dict[str, Tensor]:
        """Return {"shift", "scale"}, contiguous, as safetensors wants them."""
        return {"shift": self.shift.contiguous(), "scale": self.scale.contiguous()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Normalizer:
        """Invert `state_dict`.

        Raises:
            UsageError: an entry is missing.
        """
        if missing := {"shift", "scale"} - set(state):
            raise UsageError(f"a stored normaliser has no {', '.join(sorted(missing))}; its file is not one of ours.")
        return cls(state["shift"], state["scale"])


def fit_normalizers(arrays: Mapping[str, Array], modes: Mapping[str, str] | str = "min_max") -> dict[str, Normalizer]:
    """Fit one normaliser per key; `modes` is one for all or one per key.

    Raises:
        UsageError: a key has no mode, or an array cannot be fitted; the message names the key.
    """
    found = {}
    for key, array in arrays.items():
        mode = modes if isinstance(modes, str) else modes.get(key)
        if mode is None:
            raise UsageError(f"no normaliser is named for '{key}'; give one of {', '.join(MODES)}.")
        try:
            found[key] = Normalizer.fit(array, mode)
        except UsageError as error:
            raise UsageError(f"'{key}': {error}") from error
    return found


def pack(normalizers: Mapping[str, Normalizer]) -> dict[str, Tensor]:
    """Return one flat dictionary for a safetensors file: "<key>.shift" and "<key>.scale"."""
    return {f"{key}.{name}": t for key, one in normalizers.items() for name, t in one.state_dict().items()}


def unpack(state: Mapping[str, Tensor]) -> dict[str, Normalizer]:
    """Invert `pack`; keys may hold dots."""
    keys = dict.fromkeys(name.rpartition(".")[0] for name in state)
    entries = {key: {n: state[f"{key}.{n}"] for n in ("shift", "scale") if f"{key}.{n}" in state} for key in keys}
    return {key: Normalizer.from_state_dict(entry) for key, entry in entries.items()}
