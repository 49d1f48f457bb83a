"""`gencontrol report RUN_DIR`: writes report.html."""

from __future__ import annotations

import webbrowser
from collections.abc import Mapping
from typing import Annotated, Any

from gencontrol.config import POSITIONAL, build, options
from gencontrol.jobs.setup.settings import Start


@options
class ReportConfig:
    """The [run] section.

    Args:
        run_dir: the run folder.
        open: show it in a browser.
    """

    run_dir: Annotated[str, POSITIONAL]
    open: bool = False


def run(table: Mapping[str, Mapping[str, Any]], start: Start) -> None:
    """Write the report of a run folder and print its path."""
    config = build(ReportConfig, table["run"], "run")
    from gencontrol.reports.run import write_report

    path = write_report(config.run_dir)
    print(path)
    if config.open:
        webbrowser.open(path.resolve().as_uri())
