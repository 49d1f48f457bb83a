"""What a reward is: protocols, checks of what a reward returned, and the two adapters between items and sets.

An item reward gives one number per sample.  A set reward gives one number for a whole set (a law, alone or against a
reference law) and, beside it, an incremental state for exchange rules: `propose` an exchange, `swap`, leave-one-out
`influence` (DRAGON, arXiv 2504.15217, asks for such rewards; the incremental interface is ours).  Higher is better
everywhere, and an item that could not be scored is invalid with value NaN, never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from gencontrol.errors import GencontrolError, RewardError, UsageError, is_out_of_memory
from gencontrol.types import RewardContext, RewardOut

#: What the encoders of a set reward computed once: tensors with the batch axis first, and "valid" [b] bool.
Features = Mapping[str, Tensor]


@runtime_checkable
class Reward(Protocol):
    """Samples → one value per sample; a set reward broadcasts its one value and puts it in `extras["set_value"]`."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Literal["item", "set"]: ...
    @property
    def differentiable(self) -> bool: ...
    def __call__(self, samples: Any, context: RewardContext) -> RewardOut:
        """Score a batch of samples."""
        ...


class SetState(Protocol):
    """A chosen set of fixed size n whose members are exchanged against other items of a pool."""

    def value(self) -> float:
        """Reward of the set as it is."""
        ...

    def propose(self, slot: int, candidate: int) -> float:
        """Reward if the slot's item were pool item `candidate`; changes nothing; −inf for an invalid candidate."""
        ...

    def swap(self, slot: int, candidate: int) -> None:
        """Put pool item `candidate` into the slot."""
        ...

    def influence(self) -> Float[Tensor, " n"]:
        """Leave-one-out effect R(S) − R(S∖i) of each slot, float64."""
        ...


@runtime_checkable
class SetReward(Reward, Protocol):
    """A reward of a whole set; `features` runs the encoders once, everything else is cheap algebra on them."""

    def features(self, samples: Any, context: RewardContext) -> dict[str, Tensor]:
        """Tensors with one row per item, and "valid" [b] bool."""
        ...

    def evaluate(self, features: Features) -> float:
        """Reward of the valid rows as one set."""
        ...

    def state(self, pool: Features, chosen: Int64[Tensor, " n"]) -> SetState:
        """Incremental state of the set pool[chosen]; all chosen items must be valid."""
        ...


class OfSets:
    """Base of our set rewards: kind "set", and no gradient, for they are optimised through sets."""

    kind: Literal["item", "set"] = "set"
    differentiable = False

    # typed by the protocol: `name` is a property of some of these classes and a field of others
    def __call__(self: SetReward, samples: Any, context: RewardContext) -> RewardOut:
        """The set's value on every valid item."""
        features = self.features(samples, context)
        return broadcast(self.name, self.evaluate(features), features, {})


def as_set_reward(reward: Reward) -> SetReward:
    """Return the reward as what its kind "set" promises.

    Raises:
        UsageError: it is an item reward, or lacks a method of a set reward.
    """
    if reward.kind != "set" or not isinstance(reward, SetReward):
        raise UsageError(f"reward '{reward.name}' is no set reward: it needs features(), evaluate() and state().")
    return reward


def checked(
    name: str, values: RewardOut | Tensor | Sequence[float | None], batch: int, valid: Tensor | None = None
) -> RewardOut:
    """Turn what a reward returned into a RewardOut: float32 [b], NaN and infinity invalid, None invalid.

    Args:
        values: a RewardOut, a tensor or array of shape [b] or [b 1], or a sequence of numbers and None.
        valid: further mask [b]; items outside it become invalid.

    Raises:
        RewardError: another length, shape or type; the message names the reward.
    """
    extras: Mapping[str, Any] = {}
    if isinstance(values, RewardOut):
        extras, own = values.extras, values.valid
        valid = own if valid is None else valid & own
        values = values.values
    if not isinstance(values, Tensor):
        try:
            values = torch.tensor([float("nan") if v is None else float(v) for v in values])
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"reward '{name}' returned {type(values).__name__} ({error}); expected {batch} numbers, None for an "
                "item that cannot be scored."
            ) from error
    if values.shape not in ((batch,), (batch, 1)) or values.is_complex():
        raise RewardError(
            f"reward '{name}' returned shape {list(values.shape)} {values.dtype}; expected {batch} numbers, one each."
        )
    values = values.reshape(batch).float()
    good = torch.isfinite(values.detach())
    if valid is not None:
        if valid.shape != (batch,):
            raise RewardError(
                f"reward '{name}' returned a valid mask of shape {list(valid.shape)}; expected [{batch}]."
            )
        good = good & valid.to(good.device, torch.bool)
    return RewardOut(torch.where(good, values, torch.full_like(values, float("nan"))), good, extras)


def guarded(name: str, call: Callable[[], Any]) -> Any:
    """Run user code; any exception of it becomes a RewardError that names the reward.

    Raises:
        RewardError: the code raised; our own errors (GencontrolError) pass unchanged, and out of memory as well, with
            a note that names the reward: what mends it is a smaller batch.
    """
    try:
        return call()
    except GencontrolError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            error.add_note(f"in reward '{name}'")
            raise
        raise RewardError(f"reward '{name}' failed: {type(error).__name__}: {error}") from error


def require_valid(out: RewardOut, name: str, *, min_valid: float = 0.8) -> RewardOut:
    """Return the output unchanged when at least the share `min_valid` of its items is valid.

    Raises:
        RewardError: fewer are; the message gives the count.
    """
    count, total = int(out.valid.sum()), out.valid.numel()
    if total == 0 or count < min_valid * total:
        raise RewardError(
            f"reward '{name}' scored only {count} of {total} samples; at least {min_valid:.0%} are needed. "
            "Look at the rejected samples, or lower min_valid."
        )
    return out


def check_chosen(valid: Bool[Tensor, " b"], chosen: Int64[Tensor, " n"], least: int = 1) -> None:
    """Check the rows with which a set state starts.

    Raises:
        RewardError: fewer than `least` rows, a row outside the pool, or an invalid one.
    """
    rows = chosen.cpu()
    if rows.ndim != 1 or rows.numel() < least:
        raise RewardError(f"a set needs at least {least} items, not {list(rows.shape)}.")
    if int(rows.min()) < 0 or int(rows.max()) >= valid.shape[0]:
        raise RewardError(f"the set names rows {int(rows.min())} to {int(rows.max())} of a pool of {valid.shape[0]}.")
    if not bool(valid.cpu()[rows].all()):
        raise RewardError("the set starts with items whose score is invalid; choose among the valid rows only.")


def broadcast(name: str, value: float, features: Features, extras: Mapping[str, Any]) -> RewardOut:
    """One set value as an item-shaped output: every valid item carries it; `extras["set_value"]` holds it too."""
    valid = features["valid"]
    values = torch.full(valid.shape, value, dtype=torch.float32, device=valid.device)
    out = checked(name, values, valid.shape[0], valid)
    return RewardOut(out.values, out.valid, {**extras, "set_value": value, "set_size": int(valid.sum())})


class MeanState:
    """Mean of per-item values over a changing set; every operation is O(1) (influence O(n))."""

    def __init__(
        self, values: Float[Tensor, " pool"], valid: Bool[Tensor, " pool"], chosen: Int64[Tensor, " n"]
    ) -> None:
        """Start with the rows `chosen`."""
        check_chosen(valid, chosen)
        self._values = [float(v) if ok else float("-inf") for v, ok in zip(values.double(), valid, strict=True)]
        self._slots = [int(row) for row in chosen]
        self._sum = sum(self._values[row] for row in self._slots)

    def value(self) -> float:
        """Mean over the set."""
        return self._sum / len(self._slots)

    def propose(self, slot: int, candidate: int) -> float:
        """Mean after the exchange."""
        return (self._sum - self._values[self._slots[slot]] + self._values[candidate]) / len(self._slots)

    def swap(self, slot: int, candidate: int) -> None:
        """Exchange; the sum is taken anew, so no rounding accumulates.

        Raises:
            RewardError: the candidate is invalid.
        """
        if self._values[candidate] == float("-inf"):
            raise RewardError(f"pool item {candidate} has no valid score and cannot enter the set.")
        self._slots[slot] = candidate
        self._sum = sum(self._values[row] for row in self._slots)

    def influence(self) -> Float[Tensor, " n"]:
        """(r_i − mean)/(n − 1), which is R(S) − R(S∖i) exactly; zeros for a set of one."""
        values = torch.tensor([self._values[row] for row in self._slots], dtype=torch.float64)
        return (values - values.mean()) / max(1, len(self._slots) - 1)


@dataclass(frozen=True)
class ItemAsSet(OfSets):
    """Gives an item reward the surface of a set reward: the reward of a set is the mean of its items' values."""

    reward: Reward

    @property
    def name(self) -> str:
        """Name of the item reward."""
        return self.reward.name

    def __call__(self, samples: Any, context: RewardContext) -> RewardOut:
        """The mean over the valid items, on every valid item."""
        features = self.features(samples, context)
        return broadcast(self.name, self.evaluate(features), features, {"items": features["values"]})

    def features(self, samples: Any, context: RewardContext) -> dict[str, Tensor]:
        """Per-item "values" and "valid"."""
        out = self.reward(samples, context)
        return {"values": out.values.detach(), "valid": out.valid}

    def evaluate(self, features: Features) -> float:
        """Mean of the valid values; NaN when there is none."""
        values = features["values"][features["valid"]]
        return float(values.double().mean()) if values.numel() else float("nan")

    def state(self, pool: Features, chosen: Int64[Tensor, " n"]) -> SetState:
        """O(1) incremental mean."""
        return MeanState(pool["values"], pool["valid"], chosen)


@dataclass(frozen=True)
class InfluenceAsItem:
    """Gives a set reward the surface of an item reward: the value of item i is R(S) − R(S∖i) in the set of the batch.

    It is the fair way to give a set reward to a method that knows item rewards only.  The values are of order 1/n and
    depend on the other items of the batch, so batches of equal size should be compared.
    """

    reward: SetReward
    kind: ClassVar[Literal["item", "set"]] = "item"
    differentiable = False

    @property
    def name(self) -> str:
        """The set reward's name with "-influence"."""
        return f"{self.reward.name}-influence"

    def __call__(self, samples: Any, context: RewardContext) -> RewardOut:
        """Leave-one-out influence of every valid item; `extras["set_value"]` is the value of the whole set.

        Raises:
            RewardError: fewer than two valid items.
        """
        features = self.reward.features(samples, context)
        rows = features["valid"].nonzero().flatten()
        check_chosen(features["valid"], rows, least=2)
        state = self.reward.state(features, rows)
        values = torch.full(features["valid"].shape, float("nan"), dtype=torch.float64, device=rows.device)
        values[rows] = state.influence().to(values)
        out = checked(self.name, values, len(values), features["valid"])
        return RewardOut(out.values, out.valid, {"set_value": state.value(), "set_size": len(rows)})
