"""The sections of report.html, each a function from the run's data to HTML."""

from __future__ import annotations

from html import escape
from typing import Any

from gencontrol.reports.charts import WIDE, Line, line_chart, running_mean
from gencontrol.reports.data import Pair, RunData
from gencontrol.reports.parts import duration, number, side, signed, tile

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


def headline(run: RunData) -> str:
    """The numbers that answer "did it work": gain and win rate with their intervals."""
    tiles = []
    gain = run.last("eval/reward/gain")
    if gain is not None:
        low, high = run.last("eval/reward/gain_low"), run.last("eval/reward/gain_high")
        clear = "" if low is None or high is None else "good" if low > 0 else "bad" if high < 0 else ""
        tiles.append(tile("Reward gain over the base", signed(gain), _interval(low, high, signed), clear))
    wins = run.last("eval/win_rate")
    if wins is not None:
        low, high = run.last("eval/win_rate_low"), run.last("eval/win_rate_high")
        tiles.append(tile("Win rate against the base", _percent(wins), _interval(low, high, _percent)))
    mean, base = run.last("eval/reward/mean"), run.last("eval/reward/base_mean")
    if mean is not None:
        items = run.last("eval/items")
        detail = f"base {number(base)}" + (f", {items:.0f} samples" if items else "")
        tiles.append(tile("Reward on evaluation prompts", number(mean), detail))
    elif run.series("eval/loss")[1]:
        values = run.series("eval/loss")[1]
        tiles.append(
            tile("Held-out loss", number(values[-1]), f"first {number(values[0])}, best {number(min(values))}")
        )
    elif run.series("loss/total")[1]:
        values = run.series("loss/total")[1]
        tiles.append(tile("Training loss", number(values[-1]), f"first {number(values[0])}"))
    tiles.append(tile("Training steps", f"{run.step}", f"of {run.steps}, {_training_time(run)}"))
    return f'<dl class="numbers">{"".join(tiles)}</dl>'


def _interval(low: float | None, high: float | None, write: Any) -> str:
    return "no interval: too few samples" if low is None or high is None else f"95 %: {write(low)} to {write(high)}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _training_time(run: RunData) -> str:
    seconds = run.last("time/wall")
    return "no time logged" if seconds is None else f"{duration(seconds)} of training"


def curves(run: RunData) -> str:
    """The reward's curve in full width, then the known metrics, then everything else folded away."""
    names = run.names()
    main = _reward_chart(run)
    shown = [name for name in KNOWN if name in names and len(set(run.series(name)[1])) > 1]
    small = "".join(_chart(run, name) for name in shown)
    folded = {name for name in names if name.endswith(("_low", "_high"))} | set(_ELSEWHERE) | set(shown)
    folded |= {name for name in names if name.startswith("eval/reward/")} if main else set()
    others = [name for name in names if name not in folded and len(run.series(name)[0]) > 1]
    rest = "".join(_chart(run, name) for name in others)
    return (
        (f'<div class="wide">{main}</div>' if main else "")
        + f'<div class="charts">{small}</div>'
        + (
            f'<details><summary>{len(others)} more curves</summary><div class="charts">{rest}</div></details>'
            if others
            else ""
        )
    )


def _reward_chart(run: RunData) -> str:
    """Evaluation reward with the interval of its gain around the base's, and the reward while training."""
    rows = [row for row in run.rows if isinstance(row.get("eval/reward/mean"), float)]
    x, y = run.series("reward/mean")
    lines = []
    if x:
        smooth = len(x) > 2 * _MEAN_WINDOW
        lines.append(Line("training samples", x, y, "faint" if smooth else "train"))
        if smooth:
            lines.append(Line(f"their mean over {_MEAN_WINDOW} steps", x, running_mean(y, _MEAN_WINDOW), "train"))
    if rows:
        steps = [float(row["step"]) for row in rows]
        base = [float(row.get("eval/reward/base_mean") or "nan") for row in rows]
        if all(value == value for value in base):
            lines.append(Line("base model, evaluation prompts", steps, base, "base"))
        bounds = {
            side: [b + _float(row.get(f"eval/reward/gain_{side}")) for b, row in zip(base, rows, strict=True)]
            for side in ("low", "high")
        }
        tuned = [float(row["eval/reward/mean"]) for row in rows]
        label = "tuned model, evaluation prompts (95 % interval of the paired gain)"
        lines.append(Line(label, steps, tuned, "tuned", bounds["low"], bounds["high"]))
    return line_chart(lines, title="Reward", y_label=_reward_unit(run), size=WIDE) if lines else ""


def _float(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _reward_unit(run: RunData) -> str:
    specs = run.config.get("run", {}).get("reward", [])
    units = {"clap": "CLAP cosine", "fad": "minus FAD", "fad-set": "minus FAD", "vendi": "Vendi score"}
    if len(specs) == 1:
        return units.get(str(specs[0]).partition(":")[0], str(specs[0]))
    return "weighted reward" if specs else "reward"


def _chart(run: RunData, name: str) -> str:
    x, y = run.series(name)
    title, unit = KNOWN.get(name, (name, name.rpartition("/")[2].replace("_", " ")))
    if name.startswith("time/"):
        title, unit = f"Time: {name.removeprefix('time/')}", "seconds"
    low, high = run.series(f"{name}_low")[1], run.series(f"{name}_high")[1]
    if len(low) == len(high) == len(x) and x:
        return line_chart([Line("95 % interval", x, y, "tuned", low, high)], title=title, y_label=unit)
    if len(x) > 3 * _MEAN_WINDOW:
        mean = Line(f"mean over {_MEAN_WINDOW} steps", x, running_mean(y, _MEAN_WINDOW), "tuned")
        return line_chart([Line("", x, y, "faint"), mean], title=title, y_label=unit)
    return line_chart([Line("", x, y, "tuned")], title=title, y_label=unit)


def listening(run: RunData) -> str:
    """Players and pictures for the fixed prompts: base and tuned side by side."""
    compared = any(pair.base is not None for pair in run.pairs)
    cut = f" Sounds are cut to their first {run.cut_s:g} s to keep this page small." if run.cut_s else ""
    intro = "Samples of fixed held-out captions from fixed noise."
    if compared:
        settings = run.config.get("run", {})
        unseen = "prompts" not in settings or settings.get("eval_prompts") not in (None, settings["prompts"])
        intro = (
            "The same prompts and the same noise through the base model and through the tuned one"
            f"{'; training never used these prompts' if unseen else ''}."
        )
    cards = "".join(_card(pair, compared=compared) for pair in run.pairs)
    return (
        f"<h2>{'Before and after' if compared else 'Listen'}</h2>"
        f'<p class="lead">{intro} Step {run.pairs_step}.{cut} Pictures show time to the right, pitch upwards and '
        f"level as brightness, 80 dB from black to white.</p>{cards}"
    )


def _card(pair: Pair, *, compared: bool) -> str:
    sides = [
        side(name, css, sound, pair.prompt, _base_reward(css, pair))
        for name, css, sound in (("Base", "base", pair.base), ("Tuned" if compared else "Sample", "tuned", pair.tuned))
        if sound is not None
    ]
    return f'<article class="pair"><h3>“{escape(pair.prompt)}”</h3><div class="sides">{"".join(sides)}</div></article>'


def _base_reward(css: str, pair: Pair) -> float | None:
    """What a tuned sound's reward is compared with."""
    return pair.base.reward if css == "tuned" and pair.base is not None else None
