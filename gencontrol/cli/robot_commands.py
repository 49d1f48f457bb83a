"""The commands for robots with their options; each only hands what was given to the module that does the work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from gencontrol.cli.commands import RUN, WHAT, Many, Number, Text, Threads, _option

FLAWS = "Flaws of a scripted expert"


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
    from gencontrol.cli.collect import Request, command

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


#: command name → (function, panel of the help)
TABLE: dict[str, tuple[Callable[..., Any], str]] = {"collect": (collect, "Robots")}
