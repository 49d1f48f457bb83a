"""`gencontrol serve-reward`: a reward as a service for runs on other machines, or in other environments."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from gencontrol.errors import UsageError
from gencontrol.jobs.setup.checks import check_reference, check_rewards, check_source, download_hint
from gencontrol.jobs.setup.environment import choose_device, prepare

_LOCAL = ("127.0.0.1", "localhost", "::1")
_GRACE_S = 5.0


def command(parameters: Mapping[str, Any]) -> None:
    """Check the options, load the reward, serve until a signal comes.

    Raises:
        Preempted: SIGTERM (exit code 143) or Ctrl-C (130); requests under way were answered first.
    """
    prepare(threads=parameters["threads"] or 0, online=bool(parameters["online"]))
    name, token = check(parameters)
    device = choose_device(parameters["device"] or "auto")
    from gencontrol.rewards.remote.queue import Limits
    from gencontrol.rewards.remote.server import RewardServer
    from gencontrol.train.signals import SignalGuard

    reward = _load(parameters, device)
    with SignalGuard("answering what is under way") as signals:
        server = RewardServer(
            reward,
            name,
            (parameters["host"], parameters["port"]),
            limits=Limits(max_bytes=parameters["max_mb"] * 2**20, merge=parameters["merge"]),
            token=token,
            made_from={key: parameters[key] for key in ("reward", "reward_model", "reference")},
            poll=signals.poll,
        )
        with server:
            guarded = "token needed" if token else "no token needed"
            print(f"serving {reward.name} at {server.url} on {device} ({guarded}); Ctrl-C stops", flush=True)
            try:
                server.serve_forever()
            finally:
                server.socket.close()  # no further connections; those that are open may finish
                server.drain(_GRACE_S)


def check(parameters: Mapping[str, Any]) -> tuple[str, str | None]:
    """Check the options; return the name under which the reward is served, and the token.

    Raises:
        UsageError: what cannot work, and what to do.
    """
    from gencontrol.rewards.loading import is_url, parse_spec
    from gencontrol.rewards.remote.wire import TOKEN_VARIABLE, token_from_environment

    specs = list(parameters["reward"] or [])
    if not specs:
        raise UsageError("no reward is given; name it, e.g. --reward clip --reward-model FOLDER.")
    if any(is_url(spec) for spec in specs):
        raise UsageError("a URL is a reward that is served already; give the run --reward URL itself.")
    check_rewards(specs)
    for spec in specs:
        _check_kind(parse_spec(spec)[0])
    if parameters["reward_model"]:
        check_source(parameters["reward_model"], "--reward-model")
    if parameters["reference"]:
        check_reference(parameters["reference"])
    token = token_from_environment()
    if parameters["host"] not in _LOCAL and token is None:
        raise UsageError(
            f"--host {parameters['host']} can be reached from other machines; set {TOKEN_VARIABLE} to a secret here "
            "and where the runs are, or serve at 127.0.0.1."
        )
    name = parameters["name"] or (parse_spec(specs[0])[0].rpartition(":")[2] if len(specs) == 1 else "reward")
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name) or name in ("health", ".", ".."):
        raise UsageError(f"--name {name}: letters, digits, dash, dot and underscore only, and not 'health'.")
    return name, token


def _check_kind(name: str) -> None:
    """Refuse a set reward of ours before its networks are loaded; the server looks at user code."""
    from gencontrol.registry import REWARDS, find

    if name in REWARDS and find(REWARDS, name, "reward").kind == "set":
        raise UsageError(f"reward '{name}' scores whole sets; serve a reward of single samples (fad for fad-set).")


def _load(parameters: Mapping[str, Any], device: str) -> Any:
    from gencontrol.rewards import load_rewards

    print(f"loading {' + '.join(parameters['reward'])} …", file=sys.stderr, flush=True)
    with download_hint(parameters["reward_model"], online=bool(parameters["online"])):
        return load_rewards(
            list(parameters["reward"]),
            reward_model=parameters["reward_model"],
            reference=parameters["reference"],
            device=device,
        )
