"""The page of a search: for each prompt base and best sample, the tree, what the budget bought, and the numbers.

Reads search.json, samples/ and metrics.jsonl; a search that is not finished shows its curve alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from gencontrol.reports.charts import WIDE, Line, line_chart
from gencontrol.reports.data import BUDGET_BYTES, RunData, Sound, is_number
from gencontrol.reports.histogram import histogram
from gencontrol.reports.parts import duration, number, side, signed, table, tables, tile
from gencontrol.reports.tree import TreeData, tree_figure
from gencontrol.sampling.samplers import SAMPLERS, TREES

#: Prompts that are shown open; the others are folded.
_OPEN = 6


def title(run: RunData) -> str:
    """One line about the search."""
    rewards = " + ".join(str(spec) for spec in run.config.get("run", {}).get("reward", []))
    sampler = str(run.config.get("search", {}).get("sampler", ""))
    return f"{SAMPLERS[sampler].title if sampler in SAMPLERS else sampler} towards {rewards}"


def body(run: RunData) -> str:
    """The sections of the page."""
    found = _read(run.path / "search.json")
    prompts = [row for row in found.get("prompts", []) if isinstance(row, dict)]
    if not prompts:
        return _unfinished(run) + tables(run)
    media = _Media(run.path)
    parts = [_headline(run, found, prompts), _remarks(run, found, prompts)]
    for index, row in enumerate(prompts):
        section = "".join(_prompt(run, row, media))
        heading = f"“{escape(str(row.get('prompt', '')))}”"
        if index < _OPEN:
            parts.append(f"<h2>{heading}</h2>{section}")
        else:
            parts.append(f"<details><summary>{heading}</summary>{section}</details>")
    return "\n".join([*parts, tables(run)])


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class _Media:
    """Reads samples until the page would become too large; what is left out is counted."""

    def __init__(self, path: Path) -> None:
        self._path, self._room, self.left_out = path, BUDGET_BYTES, 0

    def read(self, row: Any) -> Sound | None:
        """The sample of a row of search.json, or None."""
        if not isinstance(row, Mapping):
            return None
        content = {Path(name).suffix: self._bytes(str(name)) for name in row.get("files", [])}
        wav, png = content.get(".wav"), content.get(".png")
        if wav is None and png is None:
            return None
        size = len(wav or b"") + len(png or b"")
        if size > self._room:
            self.left_out += 1
            return None
        self._room -= size
        return Sound(wav, png, row["reward"] if is_number(row.get("reward")) else None)

    def _bytes(self, name: str) -> bytes | None:
        """Content of a file of the run folder; names that lead elsewhere are not followed."""
        file = self._path / name
        inside = Path(name).parts[:1] == ("samples",) and ".." not in Path(name).parts
        return file.read_bytes() if inside and file.is_file() else None


def _headline(run: RunData, found: Mapping[str, Any], prompts: Sequence[Mapping[str, Any]]) -> str:
    """Best reward against the model's own samples, and what it cost."""
    best = [row["stats"]["best"] for row in prompts if is_number(row.get("stats", {}).get("best"))]
    base = [_mean(row.get("base_rewards", [])) for row in prompts if row.get("base_rewards")]
    many = len(prompts) > 1
    tiles = []
    if best:
        mean = sum(best) / len(best)
        detail = f"mean over {len(best)} prompts" if many else "of all samples found"
        tiles.append(tile("Best reward", number(mean), detail))
        if base:
            gain = mean - sum(base) / len(base)
            drawn = sum(len(row.get("base_rewards", [])) for row in prompts)
            detail = f"they have {number(sum(base) / len(base))} on average ({drawn} sample{'s' if drawn > 1 else ''})"
            tiles.append(tile("Above plain samples", signed(gain), detail, "good" if gain > 0 else "bad"))
    calls = sum(int(row.get("nfe", 0)) for row in prompts)
    scored = sum(int(row.get("reward_calls", 0)) for row in prompts)
    tiles.append(tile("Model calls", f"{calls:,}".replace(",", "\u2009"), f"{scored} reward calls"))
    if is_number(found.get("seconds")):
        rate = calls / max(found["seconds"], 1e-9)
        tiles.append(
            tile("Time", duration(found["seconds"]), f"{rate:,.0f} model calls per second".replace(",", "\u2009"))
        )
    return f'<dl class="numbers">{"".join(tiles)}</dl>'


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _remarks(run: RunData, found: Mapping[str, Any], prompts: Sequence[Mapping[str, Any]]) -> str:
    """What limits the numbers above."""
    remarks = []
    asked = run.config.get("search", {}).get("nfe")
    if is_number(asked) and is_number(found.get("nfe")) and asked > found["nfe"]:
        remarks.append(f"A larger budget of {asked} calls is under way; this page shows {found['nfe']}.")
    for row in prompts:
        name = f"“{row.get('prompt')}”: " if len(prompts) > 1 else ""
        remarks += [f"{name}{text[:1].upper()}{text[1:]}" for text in map(str, row.get("warnings", []))]
    for reason, count in dict(found.get("excluded", {})).items():
        remarks.append(f"{count} samples could not be scored and were left out: {reason}")
    remarks.append("A reward is a stand-in for what you want: listen or look before you trust the number.")
    return f'<div class="warn">{"".join(f"<p>{escape(text)}</p>" for text in remarks)}</div>'


def _prompt(run: RunData, row: Mapping[str, Any], media: _Media) -> Iterator[str]:
    """The section of one prompt."""
    prompt, unit = str(row.get("prompt", "")), _unit(run)
    base = media.read(row.get("base"))
    samples = [(rank, media.read(sample)) for rank, sample in enumerate(row.get("samples", []), 1)]
    shown = [(rank, sample) for rank, sample in samples if sample is not None]
    before = base.reward if base is not None else None
    sides = [side("First plain sample", "base", base, prompt)] if base is not None else []
    if shown:
        best = row.get("stats", {}).get("best")
        # a sampler draws from a law; the best that it met may not be among its draws
        exceeded = is_number(best) and shown[0][1].reward is not None and best > shown[0][1].reward
        sides.append(side("Best of the draws" if exceeded else "Best found", "tuned", shown[0][1], prompt, before))
    if sides:
        yield f'<article class="pair"><div class="sides">{"".join(sides)}</div></article>'
    tree = TreeData.read(row["tree"]) if isinstance(row.get("tree"), Mapping) else None
    if tree is not None:
        yield f'<div class="wide">{tree_figure(tree, value_label=f"value, {unit}")}</div>'
    yield f'<div class="charts">{_curves(row, unit)}{_rewards(run, row, unit)}</div>'
    if len(shown) > 1:
        cards = "".join(side(f"Rank {rank}", "tuned", sample, prompt, before) for rank, sample in shown)
        yield f'<h3 class="gap">Samples written</h3><article class="pair"><div class="sides">{cards}</div></article>'
    if media.left_out:
        yield f'<p class="note">{media.left_out} samples are not in this page, to keep it small; see samples/.</p>'
        media.left_out = 0
    yield f'<div class="tables">{"".join(_statistics(row))}</div>'
    if tree is not None and any(row["stats"].get(name) is None for name in ("log_z_tree", "log_z_iw")):
        yield (
            '<p class="note">A dash: not defined. Rollouts chosen by UCT have no probability, and a maximum that is '
            "backed up is no log Z.</p>"
        )


def _unit(run: RunData) -> str:
    """Name of the reward for axes."""
    specs = [str(spec) for spec in run.config.get("run", {}).get("reward", [])]
    names = {"clap": "CLAP cosine", "fad": "minus FAD", "digit-class": "log-probability of the class"}
    return names.get(specs[0].partition(":")[0], specs[0]) if len(specs) == 1 else "weighted reward"


def _curves(row: Mapping[str, Any], unit: str) -> str:
    """Best reward against model calls, of the search and of its plain samples alone."""
    lines = []
    if curve := row.get("curve"):
        lines.append(_stairs("all samples of the search", curve, "tuned"))
    if plain := row.get("base_curve"):
        lines.append(_stairs("plain samples alone, at their own cost", plain, "base"))
    if not lines:
        return ""
    return line_chart(lines, title="Best reward so far", y_label=unit, x_label="model calls of this prompt")


def _stairs(name: str, points: Sequence[Sequence[float]], style: str) -> Line:
    """A running maximum: level until it rises."""
    x: list[float] = []
    y: list[float] = []
    for calls, value in points:
        if y:
            x.append(float(calls))
            y.append(y[-1])
        x.append(float(calls))
        y.append(float(value))
    return Line(name, x, y, style, marked=False)


def _rewards(run: RunData, row: Mapping[str, Any], unit: str) -> str:
    """Rewards of plain samples and of those that the search made."""
    base = [value for value in row.get("base_rewards", []) if is_number(value)]
    grown = [value for value in row.get("grown_rewards", []) if is_number(value)]
    tree = run.config.get("search", {}).get("sampler") in TREES
    names = ("plain samples", "grown inside the tree") if tree else ("", "particles")
    groups = [(names[0], "base", base if tree else []), (names[1], "tuned", grown)]
    return histogram(groups, title="Rewards of the samples", x_label=unit)


def _statistics(row: Mapping[str, Any]) -> Iterator[str]:
    """Sizes, effective sizes, and the estimates of log Z."""
    stats = {key: value if is_number(value) else None for key, value in dict(row.get("stats", {})).items()}

    def whole(name: str) -> str:
        value = stats.get(name)
        return "–" if value is None else f"{value:.0f}"

    cost = {"model calls": str(row.get("nfe", "–")), "reward calls": str(row.get("reward_calls", "–"))}
    cost |= {"rollouts" if "tree_ess" in stats else "particles": whole("rollouts")}
    cost |= {"distinct valid samples": whole("leaves"), "excluded samples": whole("excluded")}
    yield table("Effort", cost)
    if "tree_ess" not in stats:
        found = {"effective sample size": number(stats.get("ess"), 2), "log Z": number(stats.get("log_z"), 3)}
        yield table("Law", found)
        return
    share = stats.get("base_ess_share")
    percent = "" if share is None else f" ({100 * share:.0f} % of {len(row.get('base_rewards', []))})"
    yield table(
        "Effective number of samples",
        {
            "plain samples, weighted": number(stats.get("base_ess"), 2) + percent,
            "law of the tree": number(stats.get("tree_ess"), 2),
            "rollouts, weighted": number(stats.get("iw_ess"), 2),
        },
    )
    yield table(
        "log Z, three estimates",
        {
            "tree (biased down)": number(stats.get("log_z_tree")),
            "weighted rollouts": number(stats.get("log_z_iw")),
            "plain samples": number(stats.get("log_z_base")),
        },
    )


def _unfinished(run: RunData) -> str:
    """What is known before the first results."""
    rows = [row for row in run.rows if is_number(row.get("nfe")) and is_number(row.get("reward/best"))]
    line = Line("", [float(row["nfe"]) for row in rows], [float(row["reward/best"]) for row in rows], marked=False)
    chart = line_chart([line], title="Best reward so far", y_label=_unit(run), x_label="model calls", size=WIDE)
    note = "This search is not finished. The same command goes on with it, and writes the samples."
    return f'<div class="warn"><p>{note}</p></div><div class="wide">{chart}</div>'
