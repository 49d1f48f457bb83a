"""`gencontrol compose`: one policy out of several, with given weights or weights fitted by rollouts."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gencontrol.cli.environment import prepare
from gencontrol.errors import UsageError

if TYPE_CHECKING:
    from gencontrol.robotics.compose import ComposedPolicy, WeightFit


@dataclass(frozen=True)
class Request:
    """The options of the command."""

    policies: tuple[str, ...]
    weights: tuple[float, ...]
    operator: str
    overlap: bool
    n_action: int | None
    fit_env: str | None
    env_kwargs: tuple[str, ...]
    validation: int
    episodes: int
    seed_start: int
    method: str
    step: float
    num_envs: int
    rows_at_once: int
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
    if request.fit_env and request.operator != "convex":
        raise UsageError(f"--fit-env fits convex weights; the operator '{request.operator}' makes its own.")
    from gencontrol.robotics.compose import ComposedPolicy
    from gencontrol.robotics.composition import write_composition
    from gencontrol.robotics.evaluate import named
    from gencontrol.robotics.loading import load_policy

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
    from gencontrol.robotics.env_options import parse_kwargs

    first = request.seed_start
    print("fitting weights: every arm meets the same validation seeds", file=sys.stderr, flush=True)
    return fit_weights(
        policy,
        request.fit_env,
        validation_seeds=range(first, first + request.validation),
        test_seeds=range(first + request.validation, first + request.validation + request.episodes),
        method=request.method,  # type: ignore[arg-type]  # checked there
        step=request.step,
        num_envs=request.num_envs,
        evaluation={"env_kwargs": parse_kwargs(request.env_kwargs), "rows_at_once": request.rows_at_once},
    )
