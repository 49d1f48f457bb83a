"""`gencontrol report RUN_DIR`: writes report.html."""

from __future__ import annotations

import webbrowser


def command(run_dir: str, show: bool) -> None:
    """Write the report of a run folder and print its path; `show` opens a browser."""
    from gencontrol.reports.run import write_report

    path = write_report(run_dir)
    print(path)
    if show:
        webbrowser.open(path.resolve().as_uri())
