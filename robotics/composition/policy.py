"""GPC: one policy out of several trained ones, by mixing their predictions while a chunk is sampled (arXiv 2510.01068).

Parents may differ in observations, network, prediction type, schedule (diffusion and flow) and horizon: their
predictions meet at equal signal-to-noise ratio, in one action space, from ONE shared noise.  The convex mix of eps is
the mix of scores; what law it samples is in docs/methods/gpc.md#exact-laws.  Against the paper's code (ours): noise
levels are matched instead of equal steps, observations are encoded once per chunk, a parent of weight 0 is not called,
the composed clean chunk is clipped instead of each parent's, and normalisers are compared instead of trusted.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError, nearest
from gencontrol.files import replacing
from gencontrol.models.denoiser import Pred, TokenPred
from gencontrol.process.gaussian import GaussianProcess, GridProcess, Time
from gencontrol.process.schedule import Scalar, Table
from gencontrol.rng import Keyed
from gencontrol.robotics.composition.operators import And, Or, Superposition
from gencontrol.robotics.composition.placing import covered, place, share_where_covered
from gencontrol.robotics.policies.chunked import ChunkedPolicy, PolicySpec
from gencontrol.robotics.policies.denoising import ChunkSampler, History, ParentModel
from gencontrol.robotics.policies.diffusion import GenerativePolicy
from gencontrol.robotics.policies.loading import load_policy
from gencontrol.sampling.guidance import Composed, Weights, compose, own_conditions
from gencontrol.types import Cond

OPERATORS: dict[str, type[Superposition]] = {"and": And, "or": Or}


class ComposedPolicy(ChunkedPolicy):
    """A policy that samples from a composition of parents.

    Args:
        parents: at least one `ParentModel`, or name → parent.
        weights: one number per parent, ≥ 0, sum 1.
        operator: "convex" (GPC), or, experimental, "and" and "or" (`robotics.composition.operators`) or one of its
            objects.
        schedule: instead of `weights`, weights that change with the noise level, action dimension or place in the chunk
            (`gencontrol.robotics.composition.mixing`, or any function of the log-SNR); for the convex operator.
        reference: the parent whose noise law, time grid, sampler and action normaliser are used.  None is the first
            with discrete noise levels, else the first: a flow parent can be asked at any level, a discrete one cannot.
        sampler: instead of the reference's own.
        horizons: "equal" refuses parents of different horizons or histories; "overlap" aligns them at the newest
            observation, composes where chunks overlap and takes the rest from those that reach there (see `composed`).
        n_action: actions executed per chunk; None: the parents must agree.
        allow_scale_mismatch: accept normalisers of different scales, mapped in x0 (approximate).

    A parent whose weight is 1 is that parent, drawn by its own sampler, bit for bit.

    Raises:
        UsageError: parents that cannot be composed; the message names the contract and the parents.
    """

    def __init__(
        self,
        parents: Sequence[ParentModel] | Mapping[str, ParentModel],
        weights: Sequence[float] | None = None,
        *,
        operator: str | Superposition = "convex",
        schedule: Weights | None = None,
        reference: int | None = None,
        sampler: ChunkSampler | None = None,
        horizons: Literal["equal", "overlap"] = "equal",
        n_action: int | None = None,
        allow_scale_mismatch: bool = False,
    ) -> None:
        super().__init__()
        named = parents if isinstance(parents, Mapping) else {f"parent {i}": one for i, one in enumerate(parents)}
        self.names, self.parents = tuple(named), tuple(named.values())
        for name, parent in named.items():
            if not isinstance(parent, ParentModel):
                raise UsageError(
                    f"'{name}' ({type(parent).__name__}) cannot be composed: it declares no denoiser, "
                    "action_normalizer, sampler and encode; wrap it with "
                    "gencontrol.robotics.policies.foreign.ForeignPolicy."
                )
            if not isinstance(getattr(parent.denoiser, "process", None), GaussianProcess):
                raise UsageError(
                    f"the denoiser of '{name}' declares no Gaussian noise law; wrap its network with "
                    "gencontrol.robotics.policies.foreign.velocity_model or noise_model, which ask for the convention."
                )
        self._given = {"horizons": horizons, "n_action": n_action, "allow_scale_mismatch": allow_scale_mismatch}
        if isinstance(operator, str) and operator not in ("convex", *OPERATORS):
            known = ["convex", *OPERATORS]
            raise UsageError(f"unknown operator '{operator}'.{nearest(operator, known)} Known: {', '.join(known)}.")
        #: None for the convex mix
        self.operator: Superposition | None
        if isinstance(operator, str):
            self.operator = None if operator == "convex" else OPERATORS[operator]()
        else:
            self.operator = operator
        self.weights = _weights(weights, schedule, len(self.parents), self.operator)
        if reference is None:  # a parent of discrete levels cannot be asked at another's times
            processes = [parent.denoiser.process for parent in self.parents]
            discrete = [isinstance(p, GridProcess) or isinstance(p.schedule, Table) for p in processes]
            reference = discrete.index(True) if any(discrete) else 0
        self.reference = reference
        if not 0 <= self.reference < len(self.parents):
            raise UsageError(f"reference is {reference}; there are parents 0 to {len(self.parents) - 1}.")
        specs = [parent.spec for parent in self.parents]
        self.spec, self._windows = merge_specs(specs, self.names, horizons=horizons, n_action=n_action)
        self.sampler = self.parents[self.reference].sampler if sampler is None else sampler
        models = place(
            self.parents,
            self.names,
            self.reference,
            self._windows,
            self.spec.horizon,
            allow_scale_mismatch=allow_scale_mismatch,
        )
        # compose() takes the process of the first model
        self.order = [self.reference, *(i for i in range(len(models)) if i != self.reference)]
        self._models = [models[i] for i in self.order]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load a folder that `write_composition` wrote.

        Raises:
            UsageError: config.json is damaged or of something else, a parent is missing, or they cannot be composed.
        """
        place, file = Path(folder), Path(folder, "config.json")
        try:
            table = json.loads(file.read_text(encoding="utf-8"))
            if table["_class_name"] != cls.__name__:
                raise KeyError(f"_class_name {cls.__name__}")
            named = {str(name): str(where) for name, where in table["parents"].items()}
            weights, operator = [float(w) for w in table["weights"]], str(table["operator"])
            options = dict(table["options"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"'{file}' does not describe a composition ({error}); compose the policies again."
            ) from error
        parents = {name: load_policy(where if ":" in where else place / where) for name, where in named.items()}
        try:
            return cls(parents, weights, operator=operator, **options)
        except TypeError as error:
            raise UsageError(f"'{file}' has options that a composition does not take: {error}.") from error

    @property
    def composed(self) -> Tensor:
        """Which actions of a chunk [H] all parents predict; the others come from some of them alone."""
        return covered(self._windows, self.spec.horizon).all(0)

    @property
    def alone(self) -> int | None:
        """The parent that has all the weight, if there is one."""
        if callable(self.weights):
            return None
        active = [i for i, w in enumerate(self.weights) if isinstance(w, Tensor) or w > 0]
        return active[0] if len(active) == 1 else None

    def with_weights(
        self, weights: Sequence[float] | None = None, *, schedule: Weights | None = None
    ) -> ComposedPolicy:
        """Return the same composition with other weights."""
        named = dict(zip(self.names, self.parents, strict=True))
        return ComposedPolicy(
            named,
            weights,
            operator=self.operator or "convex",
            schedule=schedule,
            reference=self.reference,
            sampler=self.sampler,
            **self._given,  # type: ignore[arg-type]
        )

    def model(self) -> Composed:
        """Return the composition as a Model of normalised chunks; its condition is what `condition` returns."""
        return compose(self._models, self._ordered(self.weights), own_conditions=True)

    def condition(self, observation: History) -> Cond:
        """Encode the observations once for every parent that has weight; key → [b n_obs ...]."""
        weights = [1.0] * len(self.parents) if callable(self.weights) else list(self.weights)
        used = [isinstance(weight, Tensor) or weight > 0 for weight in weights]
        return own_conditions(
            [self.parents[i].encode(self.part(i, observation)) if used[i] else None for i in self.order]
        )

    def part(self, index: int, observation: History) -> History:
        """Return what one parent sees: its own keys and the newest of the history."""
        spec = self.parents[index].spec
        return {key: observation[key][:, -spec.n_obs :] for key in spec.observations}

    def sample_chunk(self, observation: History, noise: Keyed) -> Float[Tensor, "b horizon action"]:
        """Return chunks in the environment's units.

        Args:
            observation: key → [b n_obs ...] with the keys of all parents.
            noise: one stream per row, shared by all parents.
        """
        alone = self.alone
        if alone is not None:
            chunk = self.parents[alone].sample_chunk(self.part(alone, observation), noise)
            start, stop = self._windows[alone]
            if (start, stop) == (0, self.spec.horizon):
                return chunk
            # its ends are repeated beyond its window; those actions are never executed
            index = (torch.arange(self.spec.horizon, device=chunk.device) - start).clamp(0, chunk.shape[1] - 1)
            return chunk[:, index]
        shape = (len(noise), self.spec.horizon, self.spec.action_dim)
        condition = self.condition(observation)
        if self.operator is None:
            x = self.sampler.draw(self.model(), shape, noise, condition)
        else:
            x = self.operator.draw(self.model(), self.sampler, shape, noise, condition).x
        return self.parents[self.reference].finish(x)

    def _ordered(self, weights: Weights) -> Weights:
        """Weights in the order of the models, shared where a parent's window ends."""
        cover = covered(self._windows, self.spec.horizon)
        whole = bool(cover.all())

        def at(logsnr: Scalar) -> list[Scalar]:
            given = list(weights(logsnr)) if callable(weights) else list(weights)
            if len(given) != len(self.parents):
                raise UsageError(f"the schedule gives {len(given)} weights for {len(self.parents)} parents.")
            shared = given if whole else share_where_covered(given, cover)
            return [shared[i] for i in self.order]

        return at if callable(weights) else at(0.0)


def compose_prediction(
    parents: Sequence[ParentModel],
    weights: Weights,
    x: Float[Tensor, "b h a"],
    t: Time,
    conditions: Sequence[Cond],
) -> Pred | TokenPred:
    """Return the composed prediction at x_t for parents of any processes; x and t are those of the FIRST parent.

    Args:
        x: noisy chunks in the first parent's process and action space.
        t: its time.
        conditions: what every parent's `encode` returned.

    Raises:
        UsageError: the action spaces differ in scale.
        ValueError: the weights are not convex.
    """
    window = (0, parents[0].spec.horizon)
    names = [f"parent {i}" for i in range(len(parents))]
    models = place(parents, names, 0, [window] * len(parents), window[1], allow_scale_mismatch=False)
    pred: Pred | TokenPred = compose(models, weights, own_conditions=True)(x, t, own_conditions(conditions))
    return pred


def merge_specs(
    specs: Sequence[PolicySpec],
    names: Sequence[str],
    *,
    horizons: Literal["equal", "overlap"],
    n_action: int | None,
) -> tuple[PolicySpec, list[tuple[int, int]]]:
    """Return what the composition reads and writes, and each parent's window in the composed chunk.

    Raises:
        UsageError: observation shapes, action sizes, control conventions, horizons or executed actions differ.
    """
    observations: dict[str, tuple[int, ...]] = {}
    for spec, name in zip(specs, names, strict=True):
        for key, shape in spec.observations.items():
            if observations.setdefault(key, tuple(shape)) != tuple(shape):
                raise UsageError(
                    f"'{name}' reads observation '{key}' as {tuple(shape)}, another as {observations[key]}."
                )
        if spec.action_dim != specs[0].action_dim:
            raise UsageError(f"'{name}' has {spec.action_dim} action dimensions, '{names[0]}' {specs[0].action_dim}.")
    controls = {spec.control for spec in specs} - {""}
    if len(controls) > 1:
        raise UsageError(f"the parents' actions mean different things: {', '.join(sorted(controls))}.")
    if len({spec.task_conditioned for spec in specs}) > 1:
        warnings.warn(
            "a parent that is told the task is mixed with one that is not; the mix may ignore the task", stacklevel=3
        )
    n_obs = max(spec.n_obs for spec in specs)
    windows = [(n_obs - spec.n_obs, n_obs - spec.n_obs + spec.horizon) for spec in specs]
    length = max(stop for _, stop in windows)
    if horizons not in ("equal", "overlap"):
        raise UsageError(f"horizons is '{horizons}'; give 'equal' or 'overlap'.")
    if horizons == "equal" and any(window != (0, length) for window in windows):
        found = ", ".join(f"'{n}' horizon {s.horizon}, n_obs {s.n_obs}" for n, s in zip(names, specs, strict=True))
        raise UsageError(
            f"the parents' chunks differ: {found}; pass horizons='overlap' (--overlap) to align them at now."
        )
    executed = {spec.n_action for spec in specs} if n_action is None else {n_action}
    if len(executed) > 1:
        raise UsageError(f"the parents execute {sorted(executed)} actions of a chunk; name one with n_action=.")
    (count,) = executed
    reach = min(spec.horizon - spec.n_obs + 1 for spec in specs)
    if count > reach:
        raise UsageError(f"n_action is {count} but a parent's chunk has {reach} actions from now on.")
    tasked = any(spec.task_conditioned for spec in specs)
    return (
        PolicySpec(observations, specs[0].action_dim, length, n_obs, count, "".join(controls), tasked),
        windows,
    )


def _weights(
    weights: Sequence[float] | None, schedule: Weights | None, count: int, operator: Superposition | None
) -> Weights:
    """The one of `weights` and `schedule` that is given, checked."""
    if count < 1 or (weights is None) == (schedule is None):
        raise UsageError(f"{count} parents; give at least one, and either weights or a schedule.")
    if schedule is not None:
        if operator is not None:
            raise UsageError(
                "weights of the operators 'and' and 'or' are made while sampling; a schedule is for 'convex'."
            )
        return schedule
    assert weights is not None
    values = [float(w) for w in weights]
    if len(values) != count or min(values) < 0 or abs(sum(values) - 1) > 1e-6:
        raise UsageError(f"weights {values} for {count} parents; give one each, ≥ 0, with sum 1.")
    return values


def write_composition(
    folder: str | Path,
    sources: Mapping[str, Any],
    weights: Sequence[float],
    *,
    operator: str = "convex",
    options: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a composition; the folder, a policy like any other, appears complete or not at all.

    It holds config.json (weights, operator) and parents/, copies of the policies that are composed.

    Args:
        sources: name → what `load_policy` takes, or a policy of ours; folders and files are copied, objects saved, and
            package.module:make_policy is kept by its name.
        weights: one per policy.
        operator: of `ComposedPolicy`.
        options: its further arguments (horizons, n_action, allow_scale_mismatch).
        facts: kept in config.json under "fit", for people.

    Raises:
        UsageError: something is at `folder` already, a source is not there, or an object has no folder format.
    """
    target = Path(folder)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise UsageError(f"'{target}' exists; a composition is never written over something: choose another folder.")
    with replacing(target) as staged:
        staged.mkdir()
        parents = {}
        for index, (name, source) in enumerate(sources.items()):
            parents[name] = _put(name, source, staged / "parents", index)
        table = {
            "_class_name": ComposedPolicy.__name__,
            "parents": parents,
            "weights": list(weights),
            "operator": operator,
            "options": dict(options or {}),
            "fit": dict(facts or {}),
        }
        (staged / "config.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return target


def _put(name: str, source: Any, folder: Path, index: int) -> str:
    """Put a policy beside the others; returns its place in the composition's folder, or the name of user code."""
    target = folder / str(index)
    if isinstance(source, GenerativePolicy):
        source.save_pretrained(target)
        return f"parents/{target.name}"
    if not isinstance(source, (str, Path)):
        raise UsageError(f"'{name}' is a {type(source).__name__}, which has no folder format; give what it came from.")
    place = Path(source).expanduser()
    if not place.exists():
        return str(source)
    folder.mkdir(exist_ok=True)
    if place.is_file():
        target = folder / f"{index}{place.suffix}"
        shutil.copy2(place, target)
    else:
        final = place / "final"
        shutil.copytree(final if final.is_dir() and not (place / "config.json").exists() else place, target)
    return f"parents/{target.name}"
