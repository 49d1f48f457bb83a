"""`gencontrol bench NAME`: a benchmark of the registry; its module has `Options`, and its `main` takes them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from gencontrol.config import build
from gencontrol.jobs.setup.environment import prepare
from gencontrol.jobs.setup.settings import Start


def variants(name: str | None) -> dict[str, type]:
    """Return the options of a benchmark.

    Raises:
        UsageError: there is none of that name.
    """
    from gencontrol.registry import BENCHES, find

    return {} if name is None else {"bench": sys.modules[find(BENCHES, name, "benchmark").__module__].Options}


def run(table: Mapping[str, Mapping[str, Any]], start: Start) -> int:
    """Run one benchmark and return its exit code (None counts as 0)."""
    from gencontrol.registry import BENCHES, find

    prepare()
    options: Any = build(variants(start.what)["bench"], table["bench"], "bench")
    return int(find(BENCHES, start.what, "benchmark")(options) or 0)
