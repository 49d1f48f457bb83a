"""Checks of what a run names — model, rewards, reference, prompts — that need no weights and take milliseconds."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gencontrol.errors import EnvironmentMissing, UsageError, nearest
from gencontrol.jobs.setup.prompts import read_prompts

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def check_rewards(specs: Sequence[str]) -> None:
    """Raise UsageError for an unknown reward (nearest one named), a wrong URL, or user code that cannot be imported."""
    from gencontrol.registry import REWARDS, resolve_dotted
    from gencontrol.rewards.loading import is_url, parse_spec
    from gencontrol.rewards.remote.wire import check_url

    for spec in specs:
        name, _ = parse_spec(spec)
        if is_url(name):
            check_url(name)
        elif ":" in name:
            beside_the_run()
            resolve_dotted(name, "reward")
        elif name not in REWARDS:
            raise UsageError(
                f"unknown reward '{name}'.{nearest(name, REWARDS)} Known: {', '.join(sorted(REWARDS))}, or "
                "package.module:Name of your own."
            )


def beside_the_run() -> None:
    """Let user code in the present folder be imported, as `python -m` does."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def check_medium(specs: Sequence[str], model: str, medium: str | None) -> None:
    """Raise UsageError for a reward that declares another medium than the model's; undeclared user code passes."""
    from gencontrol.registry import REWARDS, find
    from gencontrol.rewards.loading import is_url, parse_spec

    if medium is None:
        return
    for spec in specs:
        name, _ = parse_spec(spec)
        scores = "any" if is_url(name) else getattr(find(REWARDS, name, "reward"), "medium", "any")
        if scores not in ("any", medium):
            known = [other for other in REWARDS if find(REWARDS, other, "reward").medium == medium]
            raise UsageError(
                f"--reward {name} does not score {medium}s, and --model {model} makes {medium}s; choose one of "
                f"{', '.join(known)}, or package.module:Name of your own."
            )


def check_model(source: str) -> None:
    """Raise UsageError or EnvironmentMissing unless the source is "bundled", a pipeline folder or a hub id."""
    from gencontrol.pipelines.hub.hub import BUNDLED_NAMES, bundled_folder, read_index

    if source in BUNDLED_NAMES:
        bundled_folder(BUNDLED_NAMES[source])
    elif Path(source).expanduser().is_dir():
        read_index(Path(source).expanduser())
    else:
        check_source(source, "--model")


def check_source(source: str, option: str) -> None:
    """Raise UsageError unless the source is "bundled", an existing path, or looks like a hub id."""
    path = Path(source).expanduser()
    if source == "bundled" or path.exists():
        if path.is_file() and option == "--model":
            raise UsageError(f"{option} {source} is a file; give the folder of the model.")
        return
    if not _is_hub_id(source):
        from gencontrol.pipelines.hub.hub import BUNDLED_NAMES

        names = list(BUNDLED_NAMES) if option == "--model" else ["bundled"]
        known = " or ".join(f"'{name}'" for name in names)
        raise UsageError(
            f"{option} {source} does not exist.{nearest(source, names)} Give a folder, a hub id (owner/name), {known}."
        )


def _is_hub_id(source: str) -> bool:
    return bool(_HUB_ID.fullmatch(source)) and not source.startswith(".") and not Path(source).exists()


@contextmanager
def download_hint(source: str | None, *, online: bool) -> Iterator[None]:
    """Inside the block, an error about a hub id looked for offline ends with the flag for downloads."""
    try:
        yield
    except (UsageError, EnvironmentMissing) as error:
        if online or source is None or not _is_hub_id(source):
            raise
        raise type(error)(f"{error} To allow a download, add --online.") from error


def check_reference(reference: str) -> None:
    """Raise UsageError unless it is "bundled", a folder with sound, a caption file, or saved statistics."""
    from gencontrol.data.audio import AUDIO_SUFFIXES, list_audio

    path = Path(reference).expanduser()
    if reference == "bundled":
        return
    if path.is_dir():
        if not list_audio(path):
            raise UsageError(
                f"--reference {reference} holds no sound; put {', '.join(AUDIO_SUFFIXES)} files there or name another."
            )
        return
    if not path.is_file():
        raise UsageError(f"--reference {reference} does not exist; give a folder of sound or a .txt file of captions.")
    if path.suffix == ".txt":
        if len(set(read_prompts(path))) < 2:
            raise UsageError(f"--reference {reference} holds fewer than 2 different captions; add some, one per line.")
    elif path.suffix != ".safetensors":
        raise UsageError(
            f"--reference {reference}: give a folder of sound, a .txt of captions or .safetensors statistics."
        )
