"""`gencontrol compose`: one policy out of several, with given weights or weights fitted by rollouts."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gencontrol.errors import UsageError
from gencontrol.jobs.setup.environment import prepare

if TYPE_CHECKING:
    from gencontrol.robotics.compose import ComposedPolicy, WeightFit


@dataclass(frozen=True)
class Request:
    """The options of the command; `fitting` holds those that need `fit_env`, None where not given."""

    policies: tuple[str, ...]
    weights: tuple[float, ...]
    operator: str
    overlap: bool
    n_action: int | None
    fit_env: str | None
    fitting: Mapping[str, Any]
    output: str
    threads: int


def command(request: Request) -> None:
    """Compose, fit the weights where an environment is given, and write the folder.

    Raises:
        UsageError: policies that cannot be composed, or options that contradict each other; nothing is written.
    """
    prepare(threads=request.threads)
    target = Path(request.output)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise UsageError(f"--output {target} exists; choose another folder.")
    if len(request.policies) < 2:
        raise UsageError("one policy is not composed with anything; give two or more.")
    if request.weights and request.fit_env:
        raise UsageError("--weight gives the weights and --fit-env looks for them; give one of the two.")
    idle = [name for name, value in request.fitting.items() if value is not None]
    if idle and not request.fit_env:
        raise UsageError(f"--{idle[0].replace('_', '-')} belongs to the fitting of weights; give --fit-env too.")
    if request.fit_env and request.operator != "convex":
        raise UsageError(f"--fit-env fits convex weights; the operator '{request.operator}' makes its own.")
    from gencontrol.robotics.compose import ComposedPolicy
    from gencontrol.robotics.composition.policy import write_composition
    from gencontrol.robotics.evaluate import named
    from gencontrol.robotics.policies.loading import load_policy

    sources = {name: str(given) for name, given in named(request.policies).items()}
    count = len(sources)
    weights = request.weights or (1.0 / count,) * count
    options: dict[str, Any] = {"horizons": "overlap" if request.overlap else "equal", "n_action": request.n_action}
    parents = {name: load_policy(given) for name, given in sources.items()}
    policy = ComposedPolicy(parents, weights, operator=request.operator, **options)
    fit = _fitted(policy, request) if request.fit_env else None
    chosen = weights if fit is None else fit.best
    facts = {} if fit is None else json.loads(fit.to_json())
    write_composition(target, sources, chosen, operator=request.operator, options=options, facts=facts)
    if fit is not None:
        (target / "weights.md").write_text(fit.table(), encoding="utf-8")
        fit.plot(target / "weights.svg")
        print(fit.table())
    print(f"{target}: " + ", ".join(f"{name} {weight:g}" for name, weight in zip(sources, chosen, strict=True)))


def _fitted(policy: ComposedPolicy, request: Request) -> WeightFit:
    from gencontrol.robotics.compose import fit_weights
    from gencontrol.robotics.envs.options import parse_kwargs

    given = {name: value for name, value in request.fitting.items() if value is not None}
    first = given.get("seed_start", 200_000)
    middle = first + given.get("validation", 100)
    print("fitting weights: every arm meets the same validation seeds", file=sys.stderr, flush=True)
    return fit_weights(
        policy,
        request.fit_env,
        validation_seeds=range(first, middle),
        test_seeds=range(middle, middle + given.get("episodes", 200)),
        method=given.get("method", "halving"),
        step=given.get("step", 0.1),
        num_envs=given.get("num_envs", 1),
        evaluation={"env_kwargs": parse_kwargs(given.get("env_kwarg")), "rows_at_once": given.get("rows_at_once", 1)},
    )
