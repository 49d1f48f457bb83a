"""report.html of an evaluation: rates with intervals, paired comparison, videos of failures first, every episode."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from gencontrol._version import __version__
from gencontrol.reports.page import data_uri, number, page, signed, table, tile
from gencontrol.robotics.evaluation.files import EvaluationFolder
from gencontrol.robotics.evaluation.report import (
    SCHEMA_VERSION,
    Comparison,
    EpisodeResult,
    EvaluationReport,
    percentiles,
)
from gencontrol.robotics.evaluation.videos import safe
from gencontrol.stats import Estimate

#: bytes of video inside the page; further ones are linked
EMBEDDED = 24 << 20


def write_results(folder: EvaluationFolder, reports: Sequence[EvaluationReport]) -> Path:
    """Write report.json, eval_info.json (several policies: one folder each) and report.html; return the page's path.

    Raises:
        DiskError: a file cannot be written.
    """
    first = reports[0]
    folder.write(
        "report.json",
        {
            "schema_version": SCHEMA_VERSION,
            "gencontrol": __version__,
            "protocol": first.protocol,
            "environments": [_environment(report_spec) for report_spec in first.specs],
            "policies": [report.to_json() for report in reports],
        },
    )
    for report in reports:
        name = "eval_info.json" if len(reports) == 1 else f"{safe(report.policy)}/eval_info.json"
        folder.write(name, report.eval_info())
    return folder.write("report.html", render(folder.path, reports))


def _environment(spec: Any) -> dict[str, Any]:
    from gencontrol.robotics.envs.worker import spec_to_json

    return spec_to_json(spec)


def render(folder: Path, reports: Sequence[EvaluationReport]) -> str:
    """Return the page."""
    names = ", ".join(report.policy for report in reports)
    ids = ", ".join(spec.env_id for spec in reports[0].specs)
    lead = f"{len(reports[0].episodes)} episodes each of {names} in {ids}"
    head = (
        '<p class="eyebrow">gencontrol evaluation report</p>'
        f'<h1>{escape(folder.resolve().name)}</h1><p class="lead">{escape(lead)}.</p>'
    )
    body = [_headline(report) for report in reports]
    body += [_comparison(report.compared) for report in reports if report.compared is not None]
    budget = [EMBEDDED]
    body += [_videos(folder, report, budget) for report in reports]
    body += [_episodes(report) for report in reports]
    body.append(_protocol(reports[0]))
    footer = (
        f"Made by gencontrol {escape(__version__)}. Rates carry 95 % Wilson intervals over episodes, means "
        "of returns percentile bootstrap intervals. Intervals are over episodes of these policies, not over trainings."
    )
    return page(f"{folder.resolve().name}: {names}", head, "\n".join(part for part in body if part), footer)


def _headline(report: EvaluationReport) -> str:
    facts, half = report.summary(), percentiles(report.episodes)
    valid, share = facts["valid"], facts["rate_if_invalid_failed"]
    steps = f"of {valid}; {number(facts['mean_length'], 1)} steps on average"
    tiles = [
        tile("Success", _percent(report.rate), f"{report.successes} of {valid}, 95 % {_range(report.estimate)}"),
        tile("At any step / at the end", f"{facts['success_any']} / {facts['success_end']}", steps),
        tile("Return", number(report.returns.value, 2), f"95 % {_plain_range(report.returns)}"),
        tile("Latency of an action", _milliseconds(half[0]), f"median; 95 % below {_milliseconds(half[1])}"),
    ]
    notes = [f"{count} invalid: {reason}." for reason, count in report.invalid.items()]
    if notes:
        notes.append(f"Invalid episodes are in no rate; counted as failures they would make it {_percent(share)}.")
    if facts["clipped_numbers"]:
        notes.append(
            f"{facts['clipped_numbers']} numbers in {facts['actions']} actions lay outside the bounds (clipped)."
        )
    told = "".join(f"<p>{escape(note)}</p>" for note in [*notes, *report.notes])
    return (
        f'<h2>{escape(report.policy)}</h2><dl class="numbers">{"".join(tiles)}</dl>'
        + (_tasks(report) if len(report.specs) > 1 else "")
        + (f'<div class="warn">{told}</div>' if told else "")
    )


def _tasks(report: EvaluationReport) -> str:
    rows = []
    for spec in report.specs:
        part = report.of(spec.env_id)
        rate = f"{_percent(part.rate)} ({_range(part.estimate)})"
        rows.append([spec.env_id, f"{part.successes} of {len(part.valid)}", rate, number(part.returns.value, 2)])
    return _grid("By task", ["task", "successes", "rate, 95 %", "return"], rows)


def _comparison(compared: Comparison) -> str:
    pairs = compared.pairs
    rows = [
        [f"{compared.first} succeeded", str(pairs.both), str(pairs.first)],
        [f"{compared.first} failed", str(pairs.second), str(pairs.neither)],
    ]
    ends = f"95 % {_points(pairs.difference.low)} to {_points(pairs.difference.high)} (bootstrap over pairs)"
    score = f"{_points(pairs.score.low)} to {_points(pairs.score.high)} (Newcombe)"
    tiles = [
        tile("Difference of the rates", _points(pairs.difference.value), f"{ends}; {score}"),
        tile("Exact McNemar test", f"p = {pairs.p:.3g}", "that both succeed equally often"),
        tile(
            "Discordant pairs",
            f"{pairs.second} : {pairs.first}",
            f"{compared.second} alone : {compared.first} alone",
        ),
        tile("Difference of the returns", signed(pairs.returns.value, 2), f"95 % {_plain_range(pairs.returns)}"),
    ]
    dropped = "; ".join(f"{count} left out: {reason}" for reason, count in compared.dropped.items())
    seeds = [[str(seed), env_id, winner] for seed, env_id, winner in compared.discordant]
    return (
        f"<h2>{escape(compared.second)} against {escape(compared.first)}</h2>"
        f'<p class="note">{pairs.count} pairs on equal seeds. {escape(dropped)}</p><dl class="numbers">{"".join(tiles)}'
        f"</dl>{_grid('Pairs', ['', f'{compared.second} succeeded', f'{compared.second} failed'], rows)}"
        + (_folded(f"{len(seeds)} discordant pairs", _grid("", ["seed", "task", "succeeded"], seeds)) if seeds else "")
    )


def _videos(folder: Path, report: EvaluationReport, budget: list[int]) -> str:
    """Players, failures first; those beyond the budget as links."""
    outcome = {(episode.seed, episode.env_id): episode for episode in report.episodes}
    shown = []
    for key, path in sorted(report.videos.items(), key=lambda item: outcome[item[0]].success):
        episode = outcome[key]
        word, kind = ("success", "good") if episode.success else ("failure", "bad")
        about = f"{escape(episode.env_id)}, seed {episode.seed}"
        try:
            size = (folder / path).stat().st_size
            if size <= budget[0]:
                budget[0] -= size
                source = data_uri((folder / path).read_bytes(), "video/mp4")
                player = f'<video controls muted loop preload="metadata" aria-label="{about}" src="{source}"></video>'
            else:
                player = f'<a href="{escape(path)}">{escape(path)}</a>'
        except OSError as error:
            player = f"<p>{escape(str(error))}</p>"
        shown.append(
            f'<div class="side"><div class="head"><b class="{kind}">{word}</b><span>{about}, {episode.length} steps, '
            f"return {number(episode.total_reward, 2)}</span></div>{player}</div>"
        )
    if not shown:
        return ""
    return f'<h2>{escape(report.policy)}: videos</h2><div class="pair"><div class="sides">{"".join(shown)}</div></div>'


def _episodes(report: EvaluationReport) -> str:
    """Every episode: invalid ones and failures first."""
    ordered = sorted(report.episodes, key=lambda episode: (episode.valid, episode.success))
    rows = [[_outcome(episode), *_cells(episode, report)] for episode in ordered]
    names = ["outcome", "seed", "task", "return", "best reward", "steps", "clipped", "latency", "video"]
    return _folded(f"{report.policy}: {len(rows)} episodes", _grid("", names, rows))


def _outcome(episode: EpisodeResult) -> str:
    if episode.invalid is not None:
        return f"invalid: {episode.invalid}"
    end = "terminated" if episode.terminated else "truncated"
    late = " (not at the end)" if episode.success_any and not episode.success_end else ""
    return f"{'success' if episode.success else 'failure'}, {end}{late}"


def _cells(episode: EpisodeResult, report: EvaluationReport) -> list[str]:
    (middle,) = percentiles([episode], (0.5,))
    return [
        str(episode.seed),
        episode.env_id,
        number(episode.total_reward, 2),
        number(episode.max_reward, 2),
        str(episode.length),
        str(episode.clipped),
        _milliseconds(middle),
        report.videos.get((episode.seed, episode.env_id), ""),
    ]


def _protocol(report: EvaluationReport) -> str:
    seeds = report.protocol["seeds"]
    span = f"{len(seeds)} from {min(seeds)} to {max(seeds)}"
    shown = {key: value for key, value in report.protocol.items() if key not in ("seeds", "timeouts")}
    tables = table("Protocol", {"seeds": span, **{key: str(value) for key, value in shown.items()}})
    versions = table("Versions", {"gencontrol": __version__, **dict(report.specs[0].versions)})
    facts = table(report.policy, {key: str(value) for key, value in report.facts.items()})
    return f'<h2>How it was measured</h2><div class="tables">{tables}{facts}{versions}</div>'


def _grid(caption: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    table_head = f"{title}<thead><tr>{head}</tr></thead>"
    return f'<div class="scroll"><table class="rows">{table_head}<tbody>{body}</tbody></table></div>'


def _folded(title: str, content: str) -> str:
    return f"<details open><summary>{escape(title)}</summary>{content}</details>"


def _percent(share: float | None) -> str:
    return "–" if share is None or share != share else f"{100 * share:.1f} %"


def _range(estimate: Estimate) -> str:
    return f"{_percent(estimate.low)} to {_percent(estimate.high)}"


def _plain_range(estimate: Estimate) -> str:
    return f"{_or_dash(estimate.low)} to {_or_dash(estimate.high)}"


def _or_dash(value: float) -> str:
    return "–" if value != value else number(value, 2)


def _points(share: float) -> str:
    return "–" if share != share else f"{signed(100 * share, 1)} points"


def _milliseconds(seconds: float) -> str:
    return "–" if seconds != seconds else f"{1e3 * seconds:.3g} ms"
