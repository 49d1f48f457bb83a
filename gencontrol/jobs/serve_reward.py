"""`gencontrol serve-reward`: a reward as a service for runs on other machines, or in other environments."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from gencontrol.config import Count, Natural, build, dump_toml, options
from gencontrol.errors import UsageError
from gencontrol.jobs.setup.checks import check_reference, check_rewards, check_source, download_hint
from gencontrol.jobs.setup.environment import choose_device, prepare
from gencontrol.jobs.setup.settings import Start, describe

_LOCAL = ("127.0.0.1", "localhost", "::1")


@options
class ServeConfig:
    """The [run] section: the reward, and where it is served.

    Args:
        reward: clap, clip:0.3, package.module:Name; several are summed with their weights.
        reward_model: folder or hub id of the reward's network; the bundled one if not given.
        reference: folder of sound, or a text file of captions, for rewards that compare with a reference law.
        host: address to listen at; others than 127.0.0.1 need a token.
        port: 0 takes a free one.
        name: path of the URL; the reward's name if not given.
        max_mb: largest request in MiB.
        merge: score waiting requests together, up to so many samples; 0 never.
        device: where it runs.
        threads: CPU threads; 0 leaves it to the library.
        online: allow downloads from the hub.
    """

    reward: tuple[str, ...] = ()
    reward_model: str | None = None
    reference: str | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Ge(0), Le(65535)] = 8000
    name: str | None = None
    max_mb: Count = 64
    merge: Natural = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Natural = 0
    online: bool = False


def run(table: Mapping[str, Mapping[str, Any]], start: Start) -> None:
    """Check the options (dry run: print them), load the reward, serve until a signal comes.

    Raises:
        Preempted: SIGTERM (exit code 143) or Ctrl-C (130); requests under way were answered first.
    """
    config = build(ServeConfig, table["run"], "run")
    prepare(threads=config.threads, online=config.online)
    name, token = check(config)
    device = choose_device(config.device)
    if start.dry_run:
        print(dump_toml(describe([("run", config)])), end="")
        return
    from gencontrol.rewards import load_rewards
    from gencontrol.rewards.remote.server import Limits, RewardServer
    from gencontrol.train.signals import SignalGuard

    print(f"loading {' + '.join(config.reward)} …", file=sys.stderr, flush=True)
    made_from = {"reward": list(config.reward), "reward_model": config.reward_model, "reference": config.reference}
    with download_hint(config.reward_model, online=config.online):
        reward = load_rewards(
            config.reward, reward_model=config.reward_model, reference=config.reference, device=device
        )
    with SignalGuard("answering what is under way") as signals:
        server = RewardServer(
            reward,
            name,
            (config.host, config.port),
            limits=Limits(max_bytes=config.max_mb * 2**20, merge=config.merge),
            token=token,
            made_from=made_from,
            poll=signals.poll,
        )
        guarded = "token needed" if token else "no token needed"
        print(f"serving {reward.name} at {server.url} on {device} ({guarded}); Ctrl-C stops", flush=True)
        server.serve()


def check(config: ServeConfig) -> tuple[str, str | None]:
    """Check the options; return the name under which the reward is served, and the token.

    Raises:
        UsageError: what cannot work, and what to do.
    """
    from gencontrol.rewards.loading import is_url, parse_spec
    from gencontrol.rewards.remote.wire import TOKEN_VARIABLE, token_from_environment

    specs = list(config.reward)
    if not specs:
        raise UsageError("no reward is given; name it, e.g. --reward clip --reward-model FOLDER.")
    if any(is_url(spec) for spec in specs):
        raise UsageError("a URL is a reward that is served already; give the run --reward URL itself.")
    check_rewards(specs)
    for spec in specs:
        _check_kind(parse_spec(spec)[0])
    if config.reward_model:
        check_source(config.reward_model, "--reward-model")
    if config.reference:
        check_reference(config.reference)
    token = token_from_environment()
    if config.host not in _LOCAL and token is None:
        raise UsageError(
            f"--host {config.host} can be reached from other machines; set {TOKEN_VARIABLE} to a secret here "
            "and where the runs are, or serve at 127.0.0.1."
        )
    name = config.name or (parse_spec(specs[0])[0].rpartition(":")[2] if len(specs) == 1 else "reward")
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name) or name in ("health", ".", ".."):
        raise UsageError(f"--name {name}: letters, digits, dash, dot and underscore only, and not 'health'.")
    return name, token


def _check_kind(name: str) -> None:
    """Refuse a set reward of ours before its networks are loaded; the server looks at user code."""
    from gencontrol.registry import REWARDS, find

    if name in REWARDS and find(REWARDS, name, "reward").kind == "set":
        raise UsageError(f"reward '{name}' scores whole sets; serve a reward of single samples (fad for fad-set).")
