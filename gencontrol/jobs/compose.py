"""`compose`: one policy out of several, with given weights or weights fitted by rollouts."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from gencontrol.config import POSITIONAL, Count, Natural, Positive, build, dump_toml, options, to_table
from gencontrol.errors import Inconclusive, UsageError
from gencontrol.jobs.setup.environment import prepare
from gencontrol.jobs.setup.settings import Start, place

if TYPE_CHECKING:
    from gencontrol.robotics.compose import ComposedPolicy, WeightFit
    from gencontrol.robotics.envs.types import EnvSource


@options
class ComposeConfig:
    """What is composed, and how.

    Args:
        policies: policy folders, checkpoints or package.module:make_policy.
        weights: one per policy, in order, sum 1 (default: equal).
        operator: convex, or (experimental) and, or.
        overlap: align chunks of different horizons at now.
        n_action: actions executed per chunk (default: theirs).
        fit_env: fit the weights by rollouts in this environment: an id, or package.module:make_fn.
        output: folder of the composition, a policy like others.
        threads: CPU threads; 0 leaves it to the library.
    """

    policies: Annotated[tuple[str, ...], POSITIONAL] = ()
    weights: tuple[float, ...] = ()
    operator: str = "convex"
    overlap: bool = False
    n_action: Count | None = None
    fit_env: str | None = None
    output: str = "composition"
    threads: Natural = 0


@options
class FitConfig:
    """How weights are fitted, with fit_env.

    Args:
        env_kwargs: an argument of the environment; may be repeated.
        validation: seeds that choose the weights.
        episodes: fresh seeds that measure them.
        seed_start: first seed; the others follow.
        method: how they are searched for.
        step: of the grid of weights.
        num_envs: environments side by side.
        rows_at_once: rows in one network call, see evaluate.
        allow_unseeded: fit also where episodes are no function of their seed; the arms then meet different ones.
    """

    env_kwargs: dict[str, Any] = field(default_factory=dict)
    validation: Count = 100
    episodes: Count = 200
    seed_start: Natural = 200_000
    method: Literal["halving", "grid", "bandit"] = "halving"
    step: Positive = 0.1
    num_envs: Count = 1
    rows_at_once: Natural = 1
    allow_unseeded: bool = False


@dataclass(frozen=True)
class ComposeResult:
    """What was composed.

    Args:
        policy: with the chosen weights.
        weights: name of the parent → its weight.
        fit: how they were found, and what they and every parent achieve on fresh seeds; None where they were given.
        folder: loadable by `load_policy`; None where nothing was written.
    """

    policy: ComposedPolicy
    weights: Mapping[str, float]
    fit: WeightFit | None = None
    folder: Path | None = None


def compose(
    policies: Mapping[str, Any] | Sequence[Any],
    *,
    weights: Sequence[float] | None = None,
    fit_env: EnvSource | None = None,
    output: str | Path | None = None,
    **options: Any,
) -> ComposeResult:
    """Compose trained policies into one (GPC), with weights that are given, equal, or fitted on fresh seeds.

    Args:
        policies: two or more, perhaps by name: policies, folders, checkpoints or package.module:make_policy.
        weights: one per policy, ≥ 0, sum 1; None: equal ones, or those that `fit_env` finds.
        fit_env: fit the weights by rollouts in this environment: an id, package.module:make_fn, or such a function.
        output: folder of the composition; None writes nothing.
        options: fields of `ComposeConfig` and, with fit_env, of `FitConfig`.

    Raises:
        UsageError: policies that cannot be composed, or options that contradict each other; nothing is written.
    """
    table = place(options, {"run": ComposeConfig, "fit": FitConfig})
    table["run"] |= {"weights": tuple(float(w) for w in weights or ())}
    return _composed(table, policies, fit_env, output)


def run(table: Mapping[str, Mapping[str, Any]], start: Start) -> None:
    """Compose, fit the weights where an environment is given, and write the folder; a dry run prints the options.

    Raises:
        Inconclusive: after all is written and printed: on the fresh seeds the fitted weights and the best parent agree.
    """
    config = build(ComposeConfig, table["run"], "run")
    if start.dry_run:
        fit = {"fit": to_table(build(FitConfig, table["fit"], "fit"))} if config.fit_env else {}
        print(dump_toml({"run": to_table(config), **fit}), end="")
        return
    result = _composed(table, config.policies, config.fit_env, config.output)
    if result.fit is not None:
        print(result.fit.table())
    print(f"{result.folder}: " + ", ".join(f"{name} {weight:g}" for name, weight in result.weights.items()))
    if result.fit is not None and result.fit.undecided:
        raise Inconclusive(f"composed − {result.fit.best_parent}: {result.fit.undecided}")


def _composed(
    table: Mapping[str, Mapping[str, Any]],
    policies: Mapping[str, Any] | Sequence[Any],
    fit_env: EnvSource | None,
    output: str | Path | None,
) -> ComposeResult:
    config, fitting = build(ComposeConfig, table["run"], "run"), build(FitConfig, table["fit"], "fit")
    prepare(threads=config.threads)
    target = None if output is None else Path(output)
    if target is not None and target.exists() and (target.is_file() or any(target.iterdir())):
        raise UsageError(f"--output {target} exists; choose another folder.")
    if len(policies) < 2:
        raise UsageError("one policy is not composed with anything; give two or more.")
    if config.weights and fit_env is not None:
        raise UsageError("--weights are given and --fit-env looks for them; give one of the two.")
    if table["fit"] and fit_env is None:
        idle = next(iter(table["fit"])).replace("_", "-")
        raise UsageError(f"--{idle} belongs to the fitting of weights; give --fit-env too.")
    if fit_env is not None and config.operator != "convex":
        raise UsageError(f"--fit-env fits convex weights; the operator '{config.operator}' makes its own.")
    from gencontrol.reports.charts import svg_file
    from gencontrol.reports.evaluation import weights_chart
    from gencontrol.robotics.compose import ComposedPolicy, fit_weights
    from gencontrol.robotics.composition.policy import write_composition
    from gencontrol.robotics.evaluate import named
    from gencontrol.robotics.policies.loading import load_policy

    sources: dict[str, Any] = dict(policies) if isinstance(policies, Mapping) else named(policies)
    weights: Sequence[float] = config.weights or [1.0 / len(sources)] * len(sources)
    options: dict[str, Any] = {"horizons": "overlap" if config.overlap else "equal", "n_action": config.n_action}
    parents: dict[str, Any] = {
        name: load_policy(one) if isinstance(one, (str, Path)) else one for name, one in sources.items()
    }
    policy, fit = ComposedPolicy(parents, weights, operator=config.operator, **options), None
    if fit_env is not None:
        print("fitting weights: every arm meets the same validation seeds", file=sys.stderr, flush=True)
        middle = fitting.seed_start + fitting.validation
        fit = fit_weights(
            policy,
            fit_env,
            validation_seeds=range(fitting.seed_start, middle),
            test_seeds=range(middle, middle + fitting.episodes),
            method=fitting.method,
            step=fitting.step,
            num_envs=fitting.num_envs,
            evaluation={
                "env_kwargs": fitting.env_kwargs,
                "rows_at_once": fitting.rows_at_once,
                "allow_unseeded": fitting.allow_unseeded,
            },
        )
        weights, policy = fit.best, policy.with_weights(fit.best)
    if target is not None:
        facts = {} if fit is None else json.loads(fit.to_json())
        write_composition(target, sources, weights, operator=config.operator, options=options, facts=facts)
        if fit is not None:
            (target / "weights.md").write_text(fit.table(), encoding="utf-8")
            rows = [(arm.weights[0], arm.rate.value, arm.rate.low, arm.rate.high) for arm in fit.arms]
            chart = weights_chart(rows, [arm.weights for arm in fit.arms].index(fit.best), fit.names[0], fit.method)
            (target / "weights.svg").write_text(svg_file([chart]), encoding="utf-8")
    return ComposeResult(policy, dict(zip(sources, weights, strict=True)), fit, target)
