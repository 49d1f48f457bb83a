"""Rewards by name: "clap", "clap:0.7", "package.module:Name", "http://host:port/name", and weighted lists of them.

A name with a dot before its colon is user code: an object with the Reward surface, a class of such objects, or a plain
function `fn(samples, context)` that returns one number per sample (None where it cannot score).  User code is wrapped:
what it returns is checked, and what it raises becomes a RewardError with its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gencontrol.errors import RewardError, UsageError
from gencontrol.registry import REWARDS, find, resolve_dotted
from gencontrol.rewards.base import Features, OfSets, Reward, SetReward, SetState, checked, guarded
from gencontrol.rewards.compose import weighted
from gencontrol.types import RewardContext, RewardOut


def _batch_of(samples: Any, name: str) -> int:
    """Number of samples in a batch."""
    try:
        return len(samples)
    except TypeError as error:
        raise RewardError(f"reward '{name}' got samples without a length: {type(samples).__name__}") from error


@dataclass(frozen=True)
class UserItemReward:
    """User code as an item reward with checked outputs."""

    name: str
    call: Callable[[Any, RewardContext], Any]
    differentiable: bool = False
    kind: ClassVar[Literal["item", "set"]] = "item"

    def __call__(self, samples: Any, context: RewardContext) -> RewardOut:
        """Score and check.

        Raises:
            RewardError: the code raised, or returned something else than one number per sample.
        """
        return checked(
            self.name, guarded(self.name, lambda: self.call(samples, context)), _batch_of(samples, self.name)
        )


@dataclass(frozen=True)
class _UserState:
    """User code's set state; exceptions carry the reward's name."""

    name: str
    inner: SetState

    def value(self) -> float:
        """Value of the set."""
        return float(guarded(self.name, self.inner.value))

    def propose(self, slot: int, candidate: int) -> float:
        """Value after the exchange; NaN counts as refused."""
        value = float(guarded(self.name, lambda: self.inner.propose(slot, candidate)))
        return value if value == value else float("-inf")

    def swap(self, slot: int, candidate: int) -> None:
        """Exchange."""
        guarded(self.name, lambda: self.inner.swap(slot, candidate))

    def influence(self) -> Float[Tensor, " n"]:
        """Leave-one-out effects."""
        return torch.as_tensor(guarded(self.name, self.inner.influence), dtype=torch.float64)


@dataclass(frozen=True)
class UserSetReward(OfSets):
    """User code as a set reward with checked outputs."""

    name: str
    inner: SetReward

    def __call__(self, samples: Any, context: RewardContext) -> RewardOut:
        """Score and check."""
        out = guarded(self.name, lambda: self.inner(samples, context))
        return checked(self.name, out, _batch_of(samples, self.name))

    def features(self, samples: Any, context: RewardContext) -> dict[str, Tensor]:
        """Features with one row per sample, and "valid".

        Raises:
            RewardError: no mapping of such tensors, or no "valid" mask.
        """
        features = guarded(self.name, lambda: self.inner.features(samples, context))
        batch = _batch_of(samples, self.name)
        if not isinstance(features, Mapping) or "valid" not in features:
            raise RewardError(f"reward '{self.name}': features() must return a mapping of tensors with a key 'valid'.")
        for key, value in features.items():
            if not isinstance(value, Tensor) or value.ndim < 1 or len(value) != batch:
                raise RewardError(f"reward '{self.name}': feature '{key}' must be a tensor with {batch} rows.")
        return {**features, "valid": features["valid"].bool()}

    def evaluate(self, features: Features) -> float:
        """Value of the set."""
        return float(guarded(self.name, lambda: self.inner.evaluate(features)))

    def state(self, pool: Features, chosen: Int64[Tensor, " n"]) -> SetState:
        """The code's incremental state."""
        return _UserState(self.name, guarded(self.name, lambda: self.inner.state(pool, chosen)))


def _parameters(target: Any) -> list[str]:
    """Names of the options that a class or factory takes."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in inspect.signature(target).parameters.values() if p.kind in kinds]


def _named(config: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """The options with `model` and `reward_model`, two names of one thing, under the one that the reward has."""
    twins = {"model": "reward_model", "reward_model": "model"}
    return {(twins[k] if k not in known and twins.get(k) in known else k): v for k, v in config.items()}


def _build(target: Any, name: str, config: Mapping[str, Any]) -> Any:
    """Construct a reward class with options, refusing unknown ones."""
    known = _parameters(target)
    config = _named(config, known)
    for key in config:
        if key not in known:
            raise UsageError(f"reward '{name}' has no option '{key}'; it takes: {', '.join(known) or 'none'}.")
    return target(**config)


def _user_reward(target: Any, name: str, config: Mapping[str, Any]) -> Reward:
    """Wrap user code: a class, an object with the Reward surface, or a plain function."""
    found = guarded(name, lambda: _build(target, name, config)) if inspect.isclass(target) else target
    if not inspect.isclass(target) and config:
        raise UsageError(f"reward '{name}' is no class and takes no options; remove: {', '.join(config)}.")
    if isinstance(found, SetReward) and found.kind == "set":
        return UserSetReward(name, found)
    if isinstance(found, Reward):
        if found.kind != "item":
            raise UsageError(f"reward '{name}' says kind '{found.kind}' but lacks features(), evaluate() or state().")
        return UserItemReward(name, found, found.differentiable)
    if callable(found):
        return UserItemReward(name, found)
    raise UsageError(f"reward '{name}' is a {type(found).__name__}; expected a class, a reward object or a function.")


def _adopted(found: Any) -> Reward:
    """A reward of this package as it is; other code wrapped, so that what it returns is checked."""
    if isinstance(found, Reward) and type(found).__module__.startswith("gencontrol."):
        return found
    own = found if inspect.isclass(found) or inspect.isfunction(found) else type(found)
    return _user_reward(found, str(getattr(found, "name", own.__qualname__)), {})


def _is_dotted(name: str) -> bool:
    """Whether a name points to user code (package.module:Name)."""
    return ":" in name and not is_url(name) and name.split(":")[0] not in REWARDS


def is_url(name: str) -> bool:
    """Whether a name is the address of a reward server."""
    return name.startswith(("http://", "https://"))


def load_reward(name: str, **config: Any) -> Reward:
    """Return the reward of that name: registered, user code "package.module:Name", a URL, or any with ":weight".

    Args:
        config: options of the reward's constructor, e.g. reward_model="bundled", reference="folder".

    Raises:
        UsageError: unknown name (with the nearest one), unknown option, or a value that the reward refuses.
        EnvironmentMissing: a package or file that it needs is not here.
        RewardError: user code raised while it was built.
    """
    plain, weight = parse_spec(name)
    if weight != 1.0:
        return weighted([(load_reward(plain, **config), weight)])
    if is_url(plain):
        plain, config = "remote", {"url": plain, **config}
    if _is_dotted(plain):
        return _user_reward(resolve_dotted(plain, "reward"), plain, config)
    built: Reward = _build(find(REWARDS, plain, "reward"), plain, config)
    return built


def parse_spec(spec: str) -> tuple[str, float]:
    """Split "clap:0.7" into ("clap", 0.7), "pkg.module:Name:0.7" and "http://host:port/name:0.7" likewise.

    Without a weight it is 1; a URL has one only behind a path, for "http://host:8000" ends in a port.

    Raises:
        UsageError: an empty name.
    """
    name, _, last = spec.rpartition(":")
    if is_url(spec) and "/" not in name.partition("://")[2]:
        return spec, 1.0
    try:
        weight = float(last)
    except ValueError:
        name, weight = spec, 1.0
    if not name:
        raise UsageError(f"reward '{spec}' has no name; write name, name:weight or package.module:Name.")
    return name, weight


def compose_rewards(parts: Sequence[tuple[str | Reward, float]], **config: Any) -> Reward:
    """Return Σ w_i·r_i; names are loaded with `config` (each takes the options it has, every option must be used).

    Raises:
        UsageError: as `load_rewards`.
    """
    used: set[str] = set()
    loaded: list[tuple[Reward, float]] = []
    for part, weight in parts:
        if not isinstance(part, str):
            loaded.append((part, weight))
            continue
        takes = _options_of(part)
        own = {key: value for key, value in config.items() if next(iter(_named({key: value}, takes))) in takes}
        used |= set(own)
        loaded.append((load_reward(part, **own), weight))
    if unused := sorted(set(config) - used):
        names = ", ".join(part if isinstance(part, str) else part.name for part, _ in parts)
        raise UsageError(f"no reward of ({names}) takes the option {', '.join(unused)}; leave it out.")
    return weighted(loaded)


def load_rewards(
    specs: Sequence[Any],
    *,
    reward_model: str | Path | None = None,
    reference: str | Path | None = None,
    encoder: str | None = None,
    device: str | torch.device | None = None,
    weights: Mapping[str, float] | None = None,
) -> Reward:
    """Return one reward from a list of specs such as ["clap:0.7", "fad:0.3"].

    Args:
        specs: "name", "name:weight", "package.module:Name[:weight]", or user code itself: a class, an object or a
            function, as `load_reward` takes them by name.
        reward_model, reference, encoder: given to every reward that has such an option; None leaves its default.
        device: likewise, where rewards have one; it need not be used.
        weights: of the attributes of "classifier".

    Raises:
        UsageError: unknown name, an option that no reward takes, a weight that is 0 or not finite.
    """
    if isinstance(specs, str):
        raise UsageError(f"give a list of rewards, e.g. ['{specs}'].")
    options = {"reward_model": reward_model, "reference": reference, "encoder": encoder, "weights": weights}
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    parsed: list[tuple[str | Reward, float]] = [
        parse_spec(spec) if isinstance(spec, str) else (_adopted(spec), 1.0) for spec in specs
    ]
    if device is not None and any("device" in _options_of(name) for name, _ in parsed if isinstance(name, str)):
        given["device"] = device
    return compose_rewards(parsed, **given)


def _options_of(name: str) -> list[str]:
    """Options of the reward of that name; none for functions and objects."""
    if is_url(name):
        name = "remote"
    target = resolve_dotted(name, "reward") if _is_dotted(name) else find(REWARDS, name, "reward")
    return _parameters(target) if inspect.isclass(target) else []
