"""`gencontrol bench NAME`: hands the arguments to a benchmark of the registry."""

from __future__ import annotations

from collections.abc import Sequence

from gencontrol.jobs.setup.environment import prepare


def command(name: str, arguments: Sequence[str]) -> int:
    """Run one benchmark and return its exit code (None counts as 0)."""
    from gencontrol.registry import BENCHES, find

    prepare()
    return int(find(BENCHES, name, "benchmark")(list(arguments)) or 0)
