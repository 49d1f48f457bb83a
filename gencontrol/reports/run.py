"""report.html of a run folder: one self-contained page of curves, samples before and after, and the configuration.

Reads files only (metrics.jsonl, config.toml, run.json, samples/), so it works for a run that is still going on, that
was killed, or that came from another machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gencontrol.reports import evaluation, search
from gencontrol.reports.card import loading
from gencontrol.reports.charts import WIDE, Drawing, Line, line_chart, running_mean
from gencontrol.reports.data import RunData, is_number, read_json, read_run
from gencontrol.reports.page import Tile, duration, number, percent, render, signed, write

#: metric → (title, name and unit of the vertical axis), in the order of the page
KNOWN = {
    "eval/win_rate": ("Win rate against the base model", "share of wins"),
    "eval/distance_to_base": ("Distance from the base model", "mean squared difference"),
    "loss/total": ("Training loss", "loss per item"),
    "eval/loss": ("Held-out loss", "loss per item"),
    "eval/action_mse": ("Error of actions on held-out episodes", "mean square, normalised units"),
    "reward/valid_fraction": ("Samples that could be scored", "share of samples"),
    "sets/swap_acceptance": ("Accepted exchanges", "share of proposals"),
    "grad_norm": ("Gradient norm before clipping", "2-norm"),
    "lr": ("Learning rate", "step size"),
}
#: metrics that have a place of their own, or say nothing as a curve
_ELSEWHERE = ("step", "updates", "items", "time/wall", "reward/mean", "reward/model")
_MEAN_WINDOW = 20
#: rows of the tuned model in the grid of pictures at most; the last evaluation is always among them
_ROWS = 5


def write_report(run_dir: str | Path) -> Path:
    """Write report.html into the folder of a run or an evaluation and return its path; unfinished runs work as well.

    Raises:
        UsageError: the folder is not there or holds no run.
        DiskError: it cannot be written.
    """
    path = Path(run_dir)
    if (path / evaluation.RESULTS).is_file():
        return evaluation.write_evaluation(path)
    run = read_run(path)
    common = {"run": run, "name": run.name, "model": run.settings.get("model"), "version": run.version}
    if run.record.get("kind") == "search":
        what = search.title(run)
        common |= {"lead": what, "title": f"{run.name}: {what}", "eyebrow": "search report"}
        text = render("search.html.j2", **common, **search.context(run))
    else:
        what = _what(run)
        common |= {"lead": what, "title": f"{run.name}: {what}", "eyebrow": "run report"}
        text = render("run.html.j2", **common, **_context(run))
    return write(run.path / "report.html", text)


def _what(run: RunData) -> str:
    """One line about the run."""
    if "reward" in run.settings:
        return f"{_algorithm(run)} towards {' + '.join(run.rewards)}"
    if run.record.get("kind") == "policy":
        return f"{_algorithm(run) or 'policy'} from {run.settings.get('dataset', 'demonstrations')}"
    return f"pretraining of {run.settings['stage']}" if "stage" in run.settings else "training"


def _algorithm(run: RunData) -> str:
    """Name of the algorithm; user code by its title."""
    name = str(run.settings.get("algorithm", ""))
    return run.about("algorithm", name).title if ":" in name else name


def _context(run: RunData) -> dict[str, Any]:
    """What the template shows."""
    compared = any(pair.base is not None for pair in run.pairs)
    intro = "Samples of fixed held-out captions from fixed noise."
    if compared:
        seen = "prompts" in run.settings and run.settings.get("eval_prompts") in (None, run.settings["prompts"])
        unseen = "" if seen else "; training never used these prompts"
        intro = f"The same prompts and the same noise through the base model and through the tuned one{unseen}."
        if run.pairs[0].place:
            gain, count = run.last("eval/reward/gain"), run.last("eval/items") or 0
            intro += f" Of {count:.0f} evaluation samples, sorted by how much the reward gained, these are the "
            intro += f"{_listed([pair.place for pair in run.pairs])}; the mean gain of all is {signed(gain or 0.0)}."
        elif any(pair.tuned is not None and pair.tuned.reward is None for pair in run.pairs):
            intro += " These are the first ones: the reward scores whole sets and no single sample."
    pictures = any(side is not None and side.wav is None for pair in run.pairs for side in (pair.base, pair.tuned))
    main, charts, others = _charts(run)
    return {
        "tiles": _tiles(run),
        "remarks": _remarks(run),
        "grid": _grid(run) if pictures else None,
        "compared": compared,
        "intro": intro,
        "main_chart": main,
        "charts": charts,
        "others": others,
        "use": loading(run) if run.final else (),
    }


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _tiles(run: RunData) -> list[Tile]:
    """The numbers that answer "did it work": gain and win rate with their intervals."""
    tiles = []

    def interval(name: str, write: Callable[[float], str]) -> tuple[str, float]:
        """The interval as text, and on which side of 0 it lies."""
        low, high = run.last(f"{name}_low"), run.last(f"{name}_high")
        if low is None or high is None:
            few = (run.last("eval/items") or 0) < 4
            return "no interval: " + ("too few samples" if few else "random halves of the set overlap"), 0
        return f"95 %: {write(low)} to {write(high)}", (low > 0) - (high < 0)

    if (gain := run.last("eval/reward/gain")) is not None:
        text, side = interval("eval/reward/gain", signed)
        kind = "good" if side > 0 else "bad" if side < 0 else ""
        tiles.append(Tile("Reward gain over the base", signed(gain), text, kind))
    if (wins := run.last("eval/win_rate")) is not None:
        tiles.append(Tile("Win rate against the base", percent(wins), interval("eval/win_rate", percent)[0]))
    if (mean := run.last("eval/reward/mean")) is not None:
        items = run.last("eval/items")
        detail = f"base {number(run.last('eval/reward/base_mean'))}" + (f", {items:.0f} samples" if items else "")
        tiles.append(Tile("Reward on evaluation prompts", number(mean), detail))
    elif values := run.series("eval/loss")[1]:
        detail = f"first {number(values[0])}, best {number(min(values))}"
        tiles.append(Tile("Held-out loss", number(values[-1]), detail))
    elif values := run.series("loss/total")[1]:
        tiles.append(Tile("Training loss", number(values[-1]), f"first {number(values[0])}"))
    seconds = run.last("time/wall")
    spent = "no time logged" if seconds is None else f"{duration(seconds)} of training"
    return [*tiles, Tile("Training steps", str(run.step), f"of {run.steps}, {spent}")]


def _remarks(run: RunData) -> list[str]:
    """Where the numbers above are not the end of a healthy run."""
    remarks = []
    if not run.final:
        remarks.append(f"This run is not finished: step {run.step} of {run.steps}. The same command goes on with it.")
    if skipped := run.last("health/skipped"):
        remarks.append(f"{skipped:.0f} updates were skipped because loss or gradient was not finite.")
    if (valid := run.last("reward/valid_fraction")) is not None and valid < 1:
        remarks.append(f"In the last step {percent(valid)} of the samples could be scored.")
    if run.last("eval/reward/gain") is not None:
        remarks.append(
            "A reward is a stand-in for what you want: listen before you trust the number, and watch the distance from "
            "the base model. Intervals are over evaluation samples of this one run, not over seeds of training."
        )
    return remarks


def _grid(run: RunData) -> list[tuple[str, str, list[tuple[str, bytes | None, float | None]]]]:
    """Rows (name, style, cells) of the first prompts: the base, and the tuned model at evaluations over the run."""
    found = sorted(path for path in (run.path / "samples").glob("step_*") if any(path.glob("tuned_*.png")))
    steps = found[1:] or found  # at the first evaluation the tuned model is the base
    if len(steps) > _ROWS:
        steps = [steps[round(i * (len(steps) - 1) / (_ROWS - 1))] for i in range(_ROWS)]
    shown = [("Base", "base", folder) for folder in steps[-1:]]
    shown += [(f"Step {int(folder.name.removeprefix('step_'))}", "tuned", folder) for folder in steps]
    rows = []
    for name, side, folder in shown:
        cells: list[tuple[str, bytes | None, float | None]] = []
        for index, entry in enumerate(row for row in read_json(folder / "prompts.json", []) if isinstance(row, dict)):
            if entry.get("place"):
                continue
            file, reward = folder / f"{side}_{index:02d}.png", entry.get(f"{side}_reward")
            picture = file.read_bytes() if file.is_file() else None
            cells.append((str(entry.get("prompt", "")), picture, float(reward) if is_number(reward) else None))
        rows.append((name, side, cells))
    return rows


def _charts(run: RunData) -> tuple[Drawing | None, list[Drawing], list[Drawing]]:
    """The reward's curve in full width, then the known metrics, then everything else, which is folded away."""
    names = run.names()
    main = _reward_chart(run)
    shown = [name for name in KNOWN if name in names and len(set(run.series(name)[1])) > 1]
    taken = {name for name in names if name.endswith(("_low", "_high"))} | set(_ELSEWHERE) | set(shown)
    taken |= {name for name in names if name.startswith("eval/reward/")} if main else set()
    others = [name for name in names if name not in taken and len(run.series(name)[0]) > 1]
    return main, [_chart(run, name) for name in shown], [_chart(run, name) for name in others]


def _reward_chart(run: RunData) -> Drawing | None:
    """Evaluation reward with the interval of its gain around the base's, and the reward while training."""
    lines = []
    x, y = run.series("reward/mean")
    if x:
        smooth = len(x) > 2 * _MEAN_WINDOW
        lines.append(Line("training samples", x, y, "faint" if smooth else "train"))
        if smooth:
            lines.append(Line(f"their mean over {_MEAN_WINDOW} steps", x, running_mean(y, _MEAN_WINDOW), "train"))
    if rows := [row for row in run.rows if is_number(row.get("eval/reward/mean"))]:

        def column(name: str) -> list[float]:
            found = (row.get(f"eval/reward/{name}") for row in rows)
            return [float(value) if is_number(value) else math.nan for value in found]

        steps, base = [float(row["step"]) for row in rows], column("base_mean")
        if not any(map(math.isnan, base)):
            lines.append(Line("base model, evaluation prompts", steps, base, "base"))
        low, high = ([b + end for b, end in zip(base, column(side), strict=True)] for side in ("gain_low", "gain_high"))
        label = "tuned model, evaluation prompts (95 % interval of the paired gain)"
        lines.append(Line(label, steps, column("mean"), "tuned", low, high))
    return line_chart(lines, title="Reward", y_label=run.unit, size=WIDE) if lines else None


def _chart(run: RunData, name: str) -> Drawing:
    x, y = run.series(name)
    title, unit = KNOWN.get(name, (name, name.rpartition("/")[2].replace("_", " ")))
    if name.startswith("time/"):
        title, unit = f"Time: {name.removeprefix('time/')}", "seconds"
    low, high = run.series(f"{name}_low")[1], run.series(f"{name}_high")[1]
    lines = [Line("", x, y)]
    if len(low) == len(high) == len(x) and x:
        lines = [Line("95 % interval", x, y, "tuned", low, high)]
    elif len(x) > 3 * _MEAN_WINDOW:
        mean = Line(f"mean over {_MEAN_WINDOW} steps", x, running_mean(y, _MEAN_WINDOW))
        lines = [Line("", x, y, "faint"), mean]
    return line_chart(lines, title=title, y_label=unit)
