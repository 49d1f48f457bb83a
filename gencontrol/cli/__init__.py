"""The command line: `main` runs one command, prints one line per error and returns the exit code.

Nothing heavy is imported here: `gencontrol --help` loads neither torch, nor a model library, nor a configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `gencontrol` with the given arguments (default: those of the process) and return the exit code."""
    import sys
    from pathlib import Path

    for name in ("pipelines", "rewards", "robotics"):
        if not Path(__file__).parents[1].joinpath(name).is_dir():
            print(
                f"gencontrol: error: gencontrol/{name} should be a link to ../{name} but is not one; run `git config "
                "core.symlinks true && git checkout -- gencontrol`, or install a released wheel.",
                file=sys.stderr,
            )
            return 6
    try:
        import typer  # noqa: F401  # only to say in one line that it is missing
    except ImportError:
        print("gencontrol: error: the command line needs typer; run: pip install typer rich", file=sys.stderr)
        return 6
    from gencontrol.cli.app import explain, group

    words = None if arguments is None else list(arguments)
    try:
        result: Any = group().main(args=words, standalone_mode=False, prog_name="gencontrol")
    except BaseException as error:  # the boundary of the process: every error becomes a line and a code
        return explain(error)
    # typer turns Ctrl-C into the code 130 by itself
    return explain(KeyboardInterrupt()) if result == 130 else result if isinstance(result, int) else 0
