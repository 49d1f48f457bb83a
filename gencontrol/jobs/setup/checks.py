"""Checks of what a run names — model, rewards, reference, prompts — that need no weights and take milliseconds."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gencontrol.errors import EnvironmentMissing, UsageError, nearest
from gencontrol.jobs.setup.prompts import bundled_prompts, read_prompts
from gencontrol.jobs.setup.settings import RunConfig

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def check_names(run: RunConfig) -> None:
    """Check everything that the [run] section names; see the functions below for what they raise."""
    check_rewards(run.reward)
    check_model(run.model)
    check_medium(run.reward, run.model, run.task)
    if run.reference is not None:
        check_reference(run.reference)
    if run.reward_model is not None:
        check_source(run.reward_model, "--reward-model")


def check_rewards(specs: Sequence[str]) -> None:
    """Raise UsageError for an unknown reward (nearest one named), a wrong URL, or user code that cannot be imported."""
    from gencontrol.registry import REWARDS, resolve_dotted
    from gencontrol.rewards.loading import is_url, parse_spec
    from gencontrol.rewards.remote.http import check_url

    for spec in specs:
        name, _ = parse_spec(spec)
        if is_url(name):
            check_url(name)
        elif ":" in name:
            if os.getcwd() not in sys.path:
                sys.path.append(os.getcwd())  # as `python -m` does: user code beside the run
            resolve_dotted(name, "reward")
        elif name not in REWARDS:
            raise UsageError(
                f"unknown reward '{name}'.{nearest(name, REWARDS)} Known: {', '.join(sorted(REWARDS))}, or "
                "package.module:Name of your own."
            )


def check_medium(specs: Sequence[str], model: str, task: str) -> None:
    """Raise UsageError for a reward of sound on a model that makes images, or the other way round."""
    from gencontrol.jobs.setup.models import medium_of
    from gencontrol.registry import REWARDS_OF
    from gencontrol.rewards.loading import parse_spec

    medium = medium_of(model, task)
    if medium is None:
        return
    for spec in specs:
        name, _ = parse_spec(spec)
        if any(name in names for other, names in REWARDS_OF.items() if other != medium):
            raise UsageError(
                f"--reward {name} does not score {medium}s, and --model {model} makes {medium}s; choose one of "
                f"{', '.join(REWARDS_OF[medium])}, or package.module:Name of your own."
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


def load_prompts(run: RunConfig) -> tuple[list[str], list[str]]:
    """Return training prompts and fixed evaluation prompts.

    Raises:
        UsageError: a prompt file that cannot be used; see `read_prompts`.
    """
    from gencontrol.jobs.setup.models import medium_of

    medium = medium_of(run.model, run.task)
    if run.prompts is None and medium is None:
        raise UsageError(f"--model {run.model}: give --prompts FILE, or --task image or audio for the bundled prompts.")
    kind = medium or "audio"
    if run.prompts is None:
        train = bundled_prompts("train", run.prompt_count, kind)
    else:
        train = read_prompts(run.prompts)
    if run.eval_prompts is not None:
        return train, read_prompts(run.eval_prompts)
    if run.prompts is None:
        return train, bundled_prompts("test", run.eval_count, kind)
    return train, list(dict.fromkeys(train))[: run.eval_count]
