"""Data sets of demonstrations: episodes in memory, and readers and writers of the formats of other projects."""

from typing import TYPE_CHECKING

from gencontrol.registry import lazily

if TYPE_CHECKING:
    from gencontrol.robotics.datasets.convert import read_episodes, write_episodes
    from gencontrol.robotics.datasets.episodes import Episode, Episodes

__all__ = [
    "Episode",
    "Episodes",
    "read_episodes",
    "write_episodes",
]

__getattr__ = lazily(
    __name__,
    {
        "Episode": "episodes",
        "Episodes": "episodes",
        "read_episodes": "convert",
        "write_episodes": "convert",
    },
)
