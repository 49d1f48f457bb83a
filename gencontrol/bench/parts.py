"""What benchmarks of several parts share: which parts were asked for, and one loop that runs, prints and writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gencontrol.bench.base import verdicts, write_result
from gencontrol.config import options
from gencontrol.errors import UsageError, nearest
from gencontrol.reports.charts import curves, svg_file


@options
class PartOptions:
    """Options of a benchmark of several parts.

    Args:
        parts: comma-separated (default: all).
        quick: a smoke test of every part, with few seeds and little work.
        output: folder of the JSON results, tables and curves.
    """

    parts: str = ""
    quick: bool = False
    output: str = "runs/bench"


def chosen_parts(text: str, known: Sequence[str]) -> list[str]:
    """Return the parts of a comma-separated text; all where it is empty.

    Raises:
        UsageError: an unknown part.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if part not in known:
            raise UsageError(f"unknown part '{part}'.{nearest(part, known)} Parts: {', '.join(known)}.")
    return parts or list(known)


def run_parts(parts: Mapping[str, Callable[[], dict[str, Any]]], folder: Path, prefix: str = "") -> None:
    """Run each part, print its table and verdicts, write `<prefix><part>` as JSON, Markdown and curves.

    A part's result holds "table" (text), "checks", perhaps "curves" ({title: (label of x, {curve: {budget: number or
    Estimate}})}, one panel each), and what else the JSON keeps.
    """
    for part, run in parts.items():
        name, began = prefix + part, time.perf_counter()
        result = run()
        seconds = time.perf_counter() - began
        printed = result.pop("table") + "\n" + verdicts(result["checks"])
        panels = [curves(title, *panel) for title, panel in result.get("curves", {}).items() if panel[1]]
        path = write_result(folder, name, result, seconds)
        (folder / f"{name}.md").write_text(printed, encoding="utf-8")
        drawn = ""
        if panels:
            (folder / f"{name}.svg").write_text(svg_file(panels), encoding="utf-8")
            drawn = f", curves {folder / name}.svg"
        print(printed + f"\n{part}: {seconds:.0f} s, written to {path}{drawn}", flush=True)
