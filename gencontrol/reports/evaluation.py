"""report.html of an evaluation: rates with intervals, paired comparison, videos (failures first), every episode.

Everything is read from report.json, which the evaluation wrote, so the page can be made again at any time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gencontrol.errors import UsageError
from gencontrol.reports.charts import Drawing, Line, Size, intervals, line_chart
from gencontrol.reports.page import Tile, number, percent, render, signed, write

RESULTS = "report.json"
#: of report.json, as robotics/evaluation/report.py writes it
_SCHEMA = 2
#: bytes of video inside the page; further ones are linked
EMBEDDED = 24 << 20
_WEIGHTS = Size(560, 340)


def write_evaluation(folder: str | Path) -> Path:
    """Write report.html of an evaluation into its folder and return its path.

    Raises:
        UsageError: the folder has no report.json, or a damaged one.
        DiskError: it cannot be written.
    """
    file = Path(folder) / RESULTS
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        text = _page(file.parent, table)
    except OSError as error:
        raise UsageError(f"'{file}' cannot be read ({error.strerror or error}); check the path.") from error
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UsageError(
            f"'{file}' is damaged ({type(error).__name__}: {error}); evaluate into this folder again."
        ) from error
    return write(file.with_name("report.html"), text)


def _page(folder: Path, table: Mapping[str, Any]) -> str:
    if table.get("schema_version") != _SCHEMA:
        raise UsageError(
            f"'{folder / RESULTS}' is of another version of gencontrol; run the same `gencontrol evaluate` again "
            "(finished episodes are kept)."
        )
    policies, budget = table["policies"], [EMBEDDED]
    names = ", ".join(entry["policy"]["id"] for entry in policies)
    ids = ", ".join(spec["env_id"] for spec in table["environments"])
    seeds = table["protocol"]["seeds"]
    protocol = {"seeds": f"{len(seeds)} from {min(seeds)} to {max(seeds)}"}
    protocol |= {key: str(v) for key, v in table["protocol"].items() if key not in ("seeds", "timeouts")}
    return render(
        "evaluation.html.j2",
        title=f"{folder.resolve().name}: {names}",
        eyebrow="evaluation report",
        name=folder.resolve().name,
        lead=f"{policies[0]['overall']['n']} episodes each of {names} in {ids}",
        model=None,
        version=table["gencontrol"],
        chart=_rates(policies),
        policies=[_policy(folder, entry, budget) for entry in policies],
        comparisons=[_comparison(entry["comparison"]) for entry in policies if entry["comparison"]],
        protocol=protocol,
        versions={"gencontrol": table["gencontrol"], **table["environments"][0]["versions"]},
    )


def _rates(policies: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """All rates under each other, where there are several."""
    rows: list[tuple[str, float, float, float]] = []
    for entry in policies:
        name, tasks = str(entry["policy"]["id"]), entry["per_task"]
        parts = [(name, entry["overall"])]
        parts += [(f"{name}: {task['env_id']}", task) for task in tasks] if len(tasks) > 1 else []
        for label, part in parts:
            low, high = map(_float, part["interval95"])
            rows.append((label, _float(part["rate"]), low, high))
    if len(rows) < 2:
        return None
    return intervals(rows, title="Success", x_label="episodes that succeeded, %, with 95 % intervals")


def _policy(folder: Path, entry: Mapping[str, Any], budget: list[int]) -> dict[str, Any]:
    overall, latency, returns = entry["overall"], entry["overall"]["latency_s"], entry["overall"]["return"]
    valid = overall["valid"]
    steps = f"of {valid}; {number(overall['mean_length'], 1)} steps on average"
    half, most = _milliseconds(latency["p50"]), _milliseconds(latency["p95"])
    remarks = [] if valid else ["None of the episodes is valid, so there is no rate."]
    remarks += [f"{count} invalid: {reason}." for reason, count in overall["invalid"].items()]
    if overall["invalid"] and valid:
        share = percent(overall["rate_if_invalid_failed"], 1)
        remarks.append(f"Invalid episodes are in no rate; counted as failures they would make it {share}.")
    if clipped := overall["clipped_numbers"]:
        remarks.append(f"{clipped} numbers in {overall['actions']} actions lay outside the bounds (clipped).")
    ordered = sorted(entry["episodes"], key=lambda row: (row["invalid"] is None, row["success"]))
    return {
        "name": entry["policy"]["id"],
        "tiles": [
            Tile("Success", percent(overall["rate"], 1), f"{overall['successes']} of {valid}, 95 % {_ends(overall)}"),
            Tile("At any step / at the end", f"{overall['success_any']} / {overall['success_end']}", steps),
            Tile("Return", number(returns["value"], 2), _range(returns)),
            Tile("Latency of an action", half, f"median, mostly of a queued one; 95 % below {most}"),
        ],
        "tasks": [
            (
                task["env_id"],
                f"{task['successes']} of {task['valid']}",
                f"{percent(task['rate'], 1)} ({_ends(task)})",
                number(task["return"]["value"], 2),
            )
            for task in (entry["per_task"] if len(entry["per_task"]) > 1 else ())
        ],
        "remarks": [*remarks, *map(str, entry["notes"])],
        "filmed": _filmed(ordered),
        "videos": [_video(folder, row, budget) for row in ordered if row.get("video")],
        "episodes": [_episode(row) for row in ordered],
        "facts": {key: str(value) for key, value in entry["policy"].items() if key != "id"},
    }


def _filmed(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which episodes the videos show."""
    parts = []
    for success, one, several in ((False, "failure", "failures"), (True, "success", "successes")):
        if kind := [row for row in rows if row["invalid"] is None and row["success"] == success]:
            shown = sum(bool(row.get("video")) for row in kind)
            parts.append(f"{shown} of {len(kind)} {one if len(kind) == 1 else several}")
    rule = " in proportion, one of each at least where there is room;" if len(parts) > 1 else ""
    return f"{' and '.join(parts)}:{rule} the first seeds."


def _comparison(pairs: Mapping[str, Any]) -> dict[str, Any]:
    first, second = pairs["first"], pairs["second"]
    change = pairs["difference"]
    low, high = change["low"], change["high"]
    ends = "no interval" if low is None or high is None else f"95 % {signed(100 * low, 1)} to {_points(high)}"
    discordant = f"{pairs['only_second']} : {pairs['only_first']}"
    returns = pairs["return_difference"]
    if not pairs["pairs"]:
        verdict = "No pair of episodes is left to compare."
    elif pairs["only_first"] or pairs["only_second"]:
        verdict = ""
    else:
        verdict = "No pair is discordant: nothing here tells the two apart. Try harder or more episodes."
    return {
        "verdict": verdict,
        "first": first,
        "second": second,
        "count": pairs["pairs"],
        "dropped": "; ".join(f"{count} left out: {reason}" for reason, count in pairs["dropped"].items()),
        "tiles": [
            Tile("Difference of the rates", _points(change["value"]), ends),
            Tile("Exact McNemar test", f"p = {_float(pairs['mcnemar_p']):.3g}", "that both succeed equally often"),
            Tile("Discordant pairs", discordant, f"{second} alone : {first} alone"),
            Tile("Difference of the returns", signed(returns["value"], 2), _range(returns)),
        ],
        "table": [
            (f"{first} succeeded", pairs["both"], pairs["only_first"]),
            (f"{first} failed", pairs["only_second"], pairs["neither"]),
        ],
        "discordant": pairs["discordant"],
    }


def _video(folder: Path, row: Mapping[str, Any], budget: list[int]) -> dict[str, Any]:
    """A player's content; beyond the budget a link, and a line where the file cannot be read."""
    path, content, error = str(row["video"]), None, ""
    try:
        if ".." in Path(path).parts or Path(path).is_absolute():  # a folder from a stranger reads no other files
            raise OSError(f"{path} is outside the folder")
        if (size := (folder / path).stat().st_size) <= budget[0]:
            budget[0] -= size
            content = (folder / path).read_bytes()
    except OSError as problem:
        error = str(problem)
    return {
        "success": row["success"],
        "about": f"{row['env_id']}, seed {row['seed']}",
        "facts": f"{row['length']} steps, return {number(row['total_reward'], 2)}",
        "path": path,
        "content": content,
        "error": error,
    }


def _episode(row: Mapping[str, Any]) -> tuple[Any, ...]:
    end = "terminated" if row["terminated"] else "truncated"
    late = " (not at the end)" if row["success_any"] and not row["success_end"] else ""
    outcome = f"{'success' if row['success'] else 'failure'}, {end}{late}"
    if row["invalid"] is not None:
        outcome = f"invalid: {row['invalid']}"
    numbers = (number(row["total_reward"], 2), number(row["max_reward"], 2), row["length"], row["clipped"])
    return outcome, row["seed"], row["env_id"], *numbers, _milliseconds(row.get("latency_s")), row["video"] or ""


def weights_chart(rows: Sequence[tuple[float, float, float, float]], best: int, parent: str, method: str) -> Drawing:
    """Draw success on validation seeds over a parent's weight; the chosen row stands out.

    Args:
        rows: (weight, share of successes, ends of its interval), all in [0, 1].
        best: place of the chosen row.
        parent: name of the parent.
        method: how weights were dropped.
    """
    lines = []
    for label, style in (("tried", "tuned"), ("chosen", "c1")):
        if shown := sorted(row for place, row in enumerate(rows) if (place == best) == (label == "chosen")):
            x, y, low, high = map(list, zip(*shown, strict=True))
            lines.append(Line(label, x, y, style, low, high, joined=False))
    title = f"Success on validation seeds, 95 % ({method})"
    return line_chart(lines, title=title, y_label="share of successes", x_label=f"weight of {parent}", size=_WEIGHTS)


def _float(value: float | None) -> float:
    """JSON has no NaN; null stands for it."""
    return math.nan if value is None else float(value)


def _ends(part: Mapping[str, Any]) -> str:
    low, high = part["interval95"]
    return f"{percent(low, 1)} to {percent(high, 1)}"


def _range(estimate: Mapping[str, float | None]) -> str:
    if estimate["low"] is None and estimate["high"] is None:
        return "no interval: all are equal, or only one"
    return f"95 % {number(estimate['low'], 2)} to {number(estimate['high'], 2)}"


def _points(share: float | None) -> str:
    return "–" if share is None else f"{signed(100 * share, 1)} points"


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.3g} ms"
