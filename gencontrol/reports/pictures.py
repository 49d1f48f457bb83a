"""The pictures of a run as one grid: prompts from left to right, the base model in the first row, then the training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from gencontrol.reports.data import Pair, RunData, is_number
from gencontrol.reports.parts import data_uri, number

#: rows of the tuned model at most; the last evaluation is always among them
_ROWS = 5


def has_pictures(pairs: Sequence[Pair]) -> bool:
    """Whether the samples are pictures without sound."""
    return any(side is not None and side.wav is None for pair in pairs for side in (pair.base, pair.tuned))


def looking(run: RunData) -> str:
    """The grid of the fixed prompts: base, and the tuned model at evaluations spread over the run, all of one noise."""
    steps = _steps(run.path / "samples")
    rows = _row("Base", "base", steps[-1], "base") + "".join(
        _row(f"Step {int(folder.name.removeprefix('step_'))}", "tuned", folder, "tuned") for folder in steps
    )
    prompts = "".join(f'<th scope="col">{escape(pair.prompt)}</th>' for pair in run.pairs)
    return (
        "<h2>Before and after</h2>"
        '<p class="lead">The same prompts and the same noise in every row: the base model above, then the tuned one '
        'during training. Under a picture its reward, where it was scored alone.</p><div class="scroll">'
        f'<table class="grid"><thead><tr><td></td>{prompts}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _steps(folder: Path) -> list[Path]:
    """Evaluations with pictures, at most `_ROWS`, evenly spread; not the first, whose tuned model is the base."""
    found = sorted(path for path in folder.glob("step_*") if any(path.glob("tuned_*.png")))
    found = found[1:] or found
    if len(found) <= _ROWS:
        return found
    return [found[round(i * (len(found) - 1) / (_ROWS - 1))] for i in range(_ROWS)]


def _row(name: str, css: str, folder: Path, side: str) -> str:
    cells = "".join(
        _cell(folder / f"{side}_{index:02d}.png", name, entry, entry.get(f"{side}_reward"))
        for index, entry in enumerate(_prompts(folder))
    )
    return f'<tr class="{css}"><th scope="row">{escape(name)}</th>{cells}</tr>'


def _prompts(folder: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _cell(file: Path, name: str, entry: dict[str, Any], reward: Any) -> str:
    if not file.is_file():
        return "<td>no picture</td>"
    about = escape(f"{name}: {entry.get('prompt', '')}")
    below = f"<span>{number(float(reward))}</span>" if is_number(reward) else ""
    return f'<td><img alt="{about}" src="{data_uri(file.read_bytes(), "image/png")}">{below}</td>'
