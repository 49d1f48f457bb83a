"""`gencontrol convert`: a data set of episodes in another format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from gencontrol.config import POSITIONAL, Count, build, options
from gencontrol.jobs.setup.settings import Start


@options
class ConvertConfig:
    """The [run] section.

    Args:
        source: data set to read, a file or a folder.
        target: file or folder to write.
        format: robomimic, lerobot, minari, zarr or dppo (default: by the target's name).
        source_format: format of the source (default: found).
        keys: observations to keep (default: all).
        rename: observation in the source → its name in the target.
        split: robomimic mask or LeRobot split to read (default: all episodes).
        limit: at most so many episodes (default: all).
        images: how lerobot stores pictures: png keeps them exactly, video is small and loses detail.
        overwrite: replace what is at the target.
    """

    source: Annotated[str, POSITIONAL]
    target: Annotated[str, POSITIONAL]
    format: str | None = None
    source_format: str | None = None
    keys: tuple[str, ...] = ()
    rename: Mapping[str, str] | None = None
    split: str | None = None
    limit: Count | None = None
    images: Literal["png", "video"] = "png"
    overwrite: bool = False


def run(table: Mapping[str, Mapping[str, Any]], start: Start) -> None:
    """Convert and print what was written."""
    config = build(ConvertConfig, table["run"], "run")
    from gencontrol.robotics.datasets.convert import format_for, read_episodes, write_episodes

    episodes = read_episodes(
        config.source,
        format=config.source_format,
        keys=config.keys or None,
        rename=config.rename,
        split=config.split,
        limit=config.limit,
    )
    place = write_episodes(
        episodes, config.target, format=config.format, images=config.images, overwrite=config.overwrite
    )
    print(f"{len(episodes)} episodes, {episodes.frames} frames → '{place}' ({format_for(place, config.format)})")
