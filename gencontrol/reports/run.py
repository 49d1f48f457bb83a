"""report.html of a run folder: one self-contained page of curves, sounds before and after, and the configuration.

Reads files only (metrics.jsonl, config.toml, run.json, samples/), so it works for a run that is still going on, that
was killed, or that came from another machine.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from gencontrol.files import FileLayer
from gencontrol.reports.data import RunData, read_run
from gencontrol.reports.page import page
from gencontrol.reports.parts import tables
from gencontrol.reports.pictures import has_pictures, looking
from gencontrol.reports.sections import curves, headline, listening


def write_report(run_dir: str | Path) -> Path:
    """Write report.html into a run folder and return its path; works for finished and unfinished runs.

    Raises:
        UsageError: the folder is not there or holds no run.
        OSError: it cannot be written.
    """
    run = read_run(run_dir)
    path = run.path / "report.html"
    FileLayer().replace_file(path, render(run).encode())
    return path


def render(run: RunData) -> str:
    """Return the page: of a search, or of a training."""
    if run.record.get("kind") == "search":
        from gencontrol.reports import search as report_search

        head = _heading("gencontrol search report", run, report_search.title(run))
        about = f"{run.path.resolve().name}: {report_search.title(run)}"
        return page(
            about, head, report_search.body(run), f"{_version(run)} This page is one file and loads nothing else."
        )
    body = [headline(run), _state(run), "<h2>Curves</h2>", curves(run)]
    if run.pairs:
        body.insert(2, looking(run) if has_pictures(run.pairs) else listening(run))
    body += [_use(run), tables(run)]
    title = f"{run.path.resolve().name}: {_what(run)}"
    return page(title, _header(run), "\n".join(part for part in body if part), _footer(run))


def _what(run: RunData) -> str:
    """One line about the run."""
    settings = run.config.get("run", {})
    if "reward" in settings:
        rewards = " + ".join(str(spec) for spec in settings["reward"])
        return f"{settings.get('algorithm', '')} towards {rewards}"
    if run.record.get("kind") == "policy":
        return f"{settings.get('algorithm', 'policy')} from {settings.get('dataset', 'demonstrations')}"
    return f"pretraining of {settings['stage']}" if "stage" in settings else "training"


def _header(run: RunData) -> str:
    return _heading("gencontrol run report", run, _what(run))


def _heading(eyebrow: str, run: RunData, what: str) -> str:
    """Name of the run and a line about it."""
    model = run.config.get("run", {}).get("model")
    subject = f" of the model <code>{escape(str(model))}</code>" if model else ""
    return (
        f'<p class="eyebrow">{eyebrow}</p>'
        f"<h1>{escape(run.path.resolve().name)}</h1>"
        f'<p class="lead">{escape(what[:1].upper() + what[1:])}{subject}.</p>'
    )


def _state(run: RunData) -> str:
    """A remark where the numbers above are not the end of a healthy run."""
    remarks = []
    if not run.final:
        remarks.append(f"This run is not finished: step {run.step} of {run.steps}. The same command goes on with it.")
    skipped = run.last("health/skipped")
    if skipped:
        remarks.append(f"{skipped:.0f} updates were skipped because loss or gradient was not finite.")
    valid = run.last("reward/valid_fraction")
    if valid is not None and valid < 1:
        remarks.append(f"In the last step {100 * valid:.0f} % of the samples could be scored.")
    if run.last("eval/reward/gain") is not None:
        remarks.append(
            "A reward is a stand-in for what you want: listen before you trust the number, and watch the distance from "
            "the base model. Intervals are over evaluation samples of this one run, not over seeds of training."
        )
    return f'<div class="warn">{"".join(f"<p>{escape(text)}</p>" for text in remarks)}</div>' if remarks else ""


def _use(run: RunData) -> str:
    """How to load what came out."""
    if not run.final:
        return ""
    from gencontrol.reports.card import loading

    return "<h2>Use the result</h2>" + "".join(f"<pre>{escape(text)}</pre>" for text in loading(run))


def _version(run: RunData) -> str:
    starts = run.record.get("starts") or [{}]
    version = starts[-1].get("versions", {}).get("gencontrol", "") if isinstance(starts[-1], dict) else ""
    return f"Made by gencontrol {escape(str(version))}."


def _footer(run: RunData) -> str:
    return (
        f"{_version(run)} Win rates carry Wilson intervals, gains of item rewards paired "
        "Student t intervals, gains of set rewards bootstrap intervals. This page is one file and loads nothing else."
    )
