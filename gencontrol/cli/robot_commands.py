"""The commands for robots with their options; each only hands what was given to the module that does the work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeAlias

import typer

RUN, WHAT = "Run", "What"


def _option(flag: str, text: str, panel: str, metavar: str | None = None) -> Any:
    return typer.Option(flag, help=text, rich_help_panel=panel, metavar=metavar, show_default=False)


Text: TypeAlias = str | None
Number: TypeAlias = int | None
Real: TypeAlias = float | None
Many: TypeAlias = list[str] | None
Device = Annotated[Text, _option("--device", "Where it runs.", RUN, "auto|cpu|cuda")]
Threads = Annotated[Number, _option("--threads", "CPU threads; 0 leaves it to the library.", RUN)]
FLAWS, FIT = "Flaws of a scripted expert", "Fitting of weights"


def collect(
    env: Annotated[str, typer.Option("--env", help="Gymnasium id, or package.module:make_fn.", rich_help_panel=WHAT)],
    policy: Annotated[
        str,
        typer.Option("--policy", help="expert, a policy folder, or package.module:make_policy.", rich_help_panel=WHAT),
    ] = "expert",
    episodes: Annotated[int, typer.Option("--episodes", help="Episodes to keep.", rich_help_panel=WHAT, min=1)] = 100,
    env_kwargs: Annotated[
        Many, _option("--env-kwarg", "An argument of the environment; may be repeated.", WHAT, "KEY=VALUE")
    ] = None,
    time_limit: Annotated[Number, _option("--time-limit", "Steps of an episode.", WHAT)] = None,
    noise: Annotated[
        float, typer.Option("--noise", help="Standard deviation of action noise.", rich_help_panel=FLAWS, min=0.0)
    ] = 0.1,
    delay: Annotated[
        int, typer.Option("--delay", help="Steps by which it sees late.", rich_help_panel=FLAWS, min=0)
    ] = 0,
    bias: Annotated[
        float,
        typer.Option("--bias", help="Metres of error of its target, one per episode.", rich_help_panel=FLAWS, min=0.0),
    ] = 0.0,
    keep_failures: Annotated[
        bool, typer.Option("--keep-failures", help="Keep episodes without success too.", rich_help_panel=RUN)
    ] = False,
    attempts: Annotated[Number, _option("--attempts", "Most seeds tried (default: three per episode).", RUN)] = None,
    seed_start: Annotated[
        int, typer.Option("--seed-start", help="First seed; the others follow.", rich_help_panel=RUN, min=0)
    ] = 0,
    num_envs: Annotated[
        int, typer.Option("--num-envs", help="Environments side by side.", rich_help_panel=RUN, min=1)
    ] = 1,
    isolation: Annotated[str, typer.Option("--isolation", help="process|inline", rich_help_panel=RUN)] = "inline",
    output: Annotated[
        str, typer.Option("--output", help="FILE.hdf5, a folder, or FOLDER.zarr.", rich_help_panel=RUN)
    ] = "demonstrations",
    format_: Annotated[
        Text,
        _option("--format", "Default: by the output's name, else lerobot.", RUN, "lerobot|robomimic|minari|zarr|dppo"),
    ] = None,
    threads: Threads = None,
) -> None:
    """Record episodes of a scripted expert or a policy as a data set; seeds and counts lie beside it.

    Example: gencontrol collect --env FetchPickAndPlace-v4 --episodes 100 --output data/fetch
    """
    from gencontrol.jobs.collect import Request, command

    command(
        Request(
            env=env,
            policy=policy,
            episodes=episodes,
            env_kwargs=tuple(env_kwargs or ()),
            time_limit=time_limit,
            flaws=(noise, delay, bias),
            keep_failures=keep_failures,
            attempts=attempts,
            seed_start=seed_start,
            num_envs=num_envs,
            isolation=isolation,
            output=output,
            format=format_,
            threads=threads or 0,
        )
    )


def evaluate(
    policies: Annotated[
        list[str],
        typer.Argument(metavar="POLICY…", help="A policy folder, package.module:make_policy, expert, random or zero."),
    ],
    env: Annotated[
        list[str],
        typer.Option("--env", help="An id, or package.module:make_fn; may be repeated.", rich_help_panel=WHAT),
    ],
    episodes: Annotated[int, typer.Option("--episodes", help="Per policy and task.", rich_help_panel=WHAT, min=1)] = 50,
    seed_start: Annotated[
        int, typer.Option("--seed-start", help="First seed; the others follow.", rich_help_panel=WHAT, min=0)
    ] = 100_000,
    paired: Annotated[
        bool, typer.Option("--paired", help="Compare the other policies with the first one, seed by seed.")
    ] = False,
    env_kwargs: Annotated[
        Many, _option("--env-kwarg", "An argument of the environment; may be repeated.", WHAT, "KEY=VALUE")
    ] = None,
    time_limit: Annotated[Number, _option("--time-limit", "Steps (default: the environment's own).", WHAT)] = None,
    success: Annotated[
        str,
        typer.Option("--success", help="auto, info:KEY, terminated or reward>=NUMBER.", rich_help_panel=WHAT),
    ] = "auto",
    success_at: Annotated[
        Text, _option("--success-at", "Which steps count (default: as usual for the environment).", WHAT, "any|end")
    ] = None,
    num_envs: Annotated[
        int,
        typer.Option("--num-envs", help="Environments side by side; changes no result.", rich_help_panel=RUN, min=1),
    ] = 1,
    videos: Annotated[
        int, typer.Option("--videos", help="Most per policy and task, failures first.", rich_help_panel=RUN, min=0)
    ] = 4,
    isolation: Annotated[
        str, typer.Option("--isolation", help="process survives crashes and hangs; or inline.", rich_help_panel=RUN)
    ] = "process",
    step_timeout: Annotated[
        float, typer.Option("--step-timeout", help="Seconds after which a step hangs.", rich_help_panel=RUN)
    ] = 60.0,
    rows_at_once: Annotated[
        int,
        typer.Option(
            "--rows-at-once",
            help="Rows in one network call; 1 is exact for any --num-envs, 0 takes all.",
            rich_help_panel=RUN,
            min=0,
        ),
    ] = 1,
    output: Annotated[
        str, typer.Option("--output", help="Folder; the same command goes on.", rich_help_panel=RUN)
    ] = "evaluation",
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Measure how often policies succeed, with intervals, videos of failures first, and a report page.

    Example: gencontrol evaluate runs/a runs/b --paired --env FetchPickAndPlace-v4 --episodes 200 --output evaluation
    """
    from gencontrol.jobs.evaluate import Request, command

    command(
        Request(
            policies=tuple(policies),
            envs=tuple(env),
            episodes=episodes,
            seed_start=seed_start,
            num_envs=num_envs,
            paired=paired,
            output=output,
            env_kwargs=tuple(env_kwargs or ()),
            time_limit=time_limit,
            success=success,
            success_at=success_at,
            isolation=isolation,
            step_timeout=step_timeout,
            rows_at_once=rows_at_once,
            videos=videos,
            device=device or "auto",
            threads=threads or 0,
        )
    )


def compose(
    policies: Annotated[
        list[str], typer.Argument(metavar="POLICY…", help="Policy folders, checkpoints or package.module:make_policy.")
    ],
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", help="One per policy, in order, sum 1.", rich_help_panel=WHAT, show_default="equal"),
    ] = None,
    operator: Annotated[
        str, typer.Option("--operator", help="convex, or (experimental) and, or.", rich_help_panel=WHAT)
    ] = "convex",
    overlap: Annotated[
        bool, typer.Option("--overlap", help="Align chunks of different horizons at now.", rich_help_panel=WHAT)
    ] = False,
    n_action: Annotated[Number, _option("--n-action", "Actions executed per chunk (default: theirs).", WHAT)] = None,
    fit_env: Annotated[
        Text, _option("--fit-env", "Fit the weights by rollouts in this environment.", FIT, "ID|package.module:make_fn")
    ] = None,
    env_kwargs: Annotated[
        Many, _option("--env-kwarg", "An argument of the environment; may be repeated.", FIT, "KEY=VALUE")
    ] = None,
    validation: Annotated[Number, _option("--validation", "Seeds that choose the weights (100).", FIT)] = None,
    episodes: Annotated[Number, _option("--episodes", "Fresh seeds that measure them (200).", FIT)] = None,
    seed_start: Annotated[Number, _option("--seed-start", "First seed (200000).", FIT)] = None,
    method: Annotated[Text, _option("--method", "How they are searched for.", FIT, "halving|grid|bandit")] = None,
    step: Annotated[Real, _option("--step", "Of the grid of weights (0.1).", FIT)] = None,
    num_envs: Annotated[Number, _option("--num-envs", "Environments side by side (1).", FIT)] = None,
    rows_at_once: Annotated[
        Number, _option("--rows-at-once", "Rows in one network call, see evaluate (1).", FIT)
    ] = None,
    output: Annotated[
        str, typer.Option("--output", help="Folder of the composition, a policy like others.", rich_help_panel=RUN)
    ] = "composition",
    threads: Threads = None,
) -> None:
    """Compose trained policies into one (GPC); weights are given, equal, or fitted and measured on fresh seeds.

    Example: gencontrol compose runs/a runs/b --fit-env FetchPickAndPlace-v4 --output runs/ab
    """
    from gencontrol.jobs.compose import Request, command

    command(
        Request(
            policies=tuple(policies),
            weights=tuple(weight or ()),
            operator=operator,
            overlap=overlap,
            n_action=n_action,
            fit_env=fit_env,
            fitting={
                "env_kwarg": env_kwargs,
                "validation": validation,
                "episodes": episodes,
                "seed_start": seed_start,
                "method": method,
                "step": step,
                "num_envs": num_envs,
                "rows_at_once": rows_at_once,
            },
            output=output,
            threads=threads or 0,
        )
    )


#: command name → (function, panel of the help)
TABLE: dict[str, tuple[Callable[..., Any], str]] = {
    "collect": (collect, "Robots"),
    "compose": (compose, "Robots"),
    "evaluate": (evaluate, "Robots"),
}
