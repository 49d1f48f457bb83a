"""Where the networks and statistics lie that come with the package."""

from __future__ import annotations

from pathlib import Path

from gencontrol.errors import EnvironmentMissing


def bundled_path(name: str, what: str, remedy: str) -> Path:
    """Path of a file below gencontrol/bundled.

    Args:
        name: of the file, e.g. "clap/config.json".
        what: what it is, for the message.
        remedy: what to do without it, for the message.

    Raises:
        EnvironmentMissing: this installation does not hold it.
    """
    import gencontrol

    path = Path(str(gencontrol.__file__)).resolve().parent / "bundled" / name
    if not path.is_file():
        raise EnvironmentMissing(f"there is no {what} at {path}; {remedy}.")
    return path
