"""The page of a search: for each prompt base and best sample, the tree, what the budget bought, and the numbers.

Reads search.json, samples/ and metrics.jsonl; a search that is not finished shows its curve alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gencontrol.reports.charts import WIDE, Drawing, Line, TreeData, histogram, line_chart, tree_figure
from gencontrol.reports.data import BUDGET_BYTES, RunData, Sound, is_number, read_json
from gencontrol.reports.page import Tile, duration, grouped, number, percent, signed
from gencontrol.sampling.samplers import SAMPLERS


def title(run: RunData) -> str:
    """One line about the search."""
    sampler = str(run.config.get("search", {}).get("sampler", ""))
    return f"{SAMPLERS[sampler].title if sampler in SAMPLERS else sampler} towards {' + '.join(run.rewards)}"


def context(run: RunData) -> dict[str, Any]:
    """What the template shows."""
    found = read_json(run.path / "search.json", {})
    prompts = [row for row in found.get("prompts", []) if isinstance(row, dict)]
    if not prompts:
        rows = [row for row in run.rows if is_number(row.get("nfe")) and is_number(row.get("reward/best"))]
        line = Line("", [float(row["nfe"]) for row in rows], [float(row["reward/best"]) for row in rows], marked=False)
        chart = line_chart([line], title="Best reward so far", y_label=run.unit, x_label="model calls", size=WIDE)
        return {"unfinished": chart}
    media = _Media(run.path)
    return {
        "unfinished": None,
        "tiles": _tiles(found, prompts),
        "remarks": _remarks(run, found, prompts),
        "prompts": [_prompt(run.unit, row, media) for row in prompts],
    }


class _Media:
    """Reads samples until the page would become too large; what is left out is counted."""

    def __init__(self, path: Path) -> None:
        self._path, self._room, self.left_out = path, BUDGET_BYTES, 0

    def read(self, row: Any) -> Sound | None:
        """The sample of a row of search.json, or None."""
        if not isinstance(row, Mapping):
            return None
        content = {Path(name).suffix: self._bytes(name) for name in map(str, row.get("files", []))}
        wav, png = content.get(".wav"), content.get(".png")
        size = len(wav or b"") + len(png or b"")
        if wav is None and png is None:
            return None
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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _plain(row: Mapping[str, Any]) -> tuple[float, int, int] | None:
    """Best reward of the plain samples inside a search, their number, and the model calls that they took."""
    curve = row.get("base_curve") or ()
    count = int(row.get("plain") or len(row.get("base_rewards", [])))
    return (max(value for _, value in curve), count, int(curve[-1][0])) if curve else None


def compared(found: Mapping[str, Any]) -> list[str]:
    """Say in a line for each prompt of search.json what plain samples reached, at equal calls where it has a peer."""
    said = []
    for row in found.get("prompts", []):
        best, peer, plain = row.get("stats", {}).get("best"), row.get("peer"), _plain(row)
        if peer and is_number(best) and is_number(peer.get("best")):
            said.append(
                f"“{row.get('prompt')}”: search {best:.4f} after {row['nfe']} model calls, best of {peer['count']} "
                f"plain samples {peer['best']:.4f} after {peer['nfe']} ({best - peer['best']:+.4f})"
            )
        elif plain is not None and is_number(best):
            said.append(
                f"“{row.get('prompt')}”: search {best:.4f} after {row['nfe']} model calls; best of its {plain[1]} "
                f"plain samples {plain[0]:.4f} after {plain[2]} (--peer compares at equal calls)"
            )
    return said


def unbranched(found: Mapping[str, Any]) -> list[str]:
    """Say, in a sentence for each prompt of search.json, which trees never branched: they hold plain samples alone."""
    said = []
    for row in found.get("prompts", []):
        if isinstance(row.get("tree"), Mapping) and not row.get("grown_rewards"):
            count = len(row.get("base_rewards", []))
            said.append(
                f"The tree of “{row.get('prompt')}” never branched: its {count} scored samples are plain ones, so this "
                "is best of n and no search; give more --nfe or fewer --steps."
            )
    return said


def _tiles(found: Mapping[str, Any], prompts: Sequence[Mapping[str, Any]]) -> list[Tile]:
    """Best reward against the model's own samples, and what it cost."""
    best = [row["stats"]["best"] for row in prompts if is_number(row.get("stats", {}).get("best"))]
    peers = [row["peer"] for row in prompts if row.get("peer") and is_number(row["peer"].get("best"))]
    inside = [one for row in prompts if (one := _plain(row)) is not None]
    tiles = []
    if best:
        detail = f"mean over {len(best)} prompts" if len(prompts) > 1 else "of all samples found"
        tiles.append(Tile("Best reward", number(_mean(best)), detail))
    if peers and len(peers) == len(best):
        plain = _mean([peer["best"] for peer in peers])
        gain, drawn, calls = _mean(best) - plain, peers[0]["count"], peers[0]["nfe"]
        detail = f"{number(plain)} is the best of {drawn} plain samples, {grouped(calls)} model calls"
        detail += ", per prompt on average" if len(peers) > 1 else ""
        kind = "good" if gain > 0 else "bad" if gain < 0 else ""
        tiles.append(Tile("Above best of n at equal calls", signed(gain), detail, kind))
    elif inside:
        plain, drawn, calls = (_mean([one[i] for one in inside]) for i in range(3))
        detail = f"of {drawn:.0f} in this search, {grouped(calls)} of its calls; --peer compares at equal calls"
        tiles.append(Tile("Best plain sample", number(plain), detail))
    calls = sum(int(row.get("nfe", 0)) for row in prompts)
    scored = sum(int(row.get("reward_calls", 0)) for row in prompts)
    tiles.append(Tile("Model calls", grouped(calls), f"{scored} reward calls"))
    if is_number(found.get("seconds")):
        rate = calls / max(found["seconds"], 1e-9)
        tiles.append(Tile("Time", duration(found["seconds"]), f"{grouped(rate)} model calls per second"))
    return tiles


def _remarks(run: RunData, found: Mapping[str, Any], prompts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What limits the numbers above."""
    remarks = []
    asked = run.config.get("search", {}).get("nfe")
    if is_number(asked) and is_number(found.get("nfe")) and asked > found["nfe"]:
        remarks.append(f"A larger budget of {asked} calls is under way; this page shows {found['nfe']}.")
    for row in prompts:
        name = f"“{row.get('prompt')}”: " if len(prompts) > 1 else ""
        remarks += [f"{name}{text[:1].upper()}{text[1:]}" for text in map(str, row.get("warnings", []))]
    remarks += unbranched(found)
    if not found.get("peer") and not any(map(_plain, prompts)) and found.get("sampler") != "best-of-n":
        remarks.append(
            "The plain sample beside the best one is a single draw and no measure of what the search brought; --peer "
            "compares with best of n at equal model calls."
        )
    for reason, count in dict(found.get("excluded", {})).items():
        remarks.append(f"{count} samples could not be scored and were left out: {reason}")
    return [*remarks, "A reward is a stand-in for what you want: listen or look before you trust the number."]


def _prompt(unit: str, row: Mapping[str, Any], media: _Media) -> dict[str, Any]:
    """The section of one prompt."""
    base = media.read(row.get("base"))
    samples = [(rank, media.read(sample)) for rank, sample in enumerate(row.get("samples", []), 1)]
    shown = [(rank, sample) for rank, sample in samples if sample is not None]
    best = row.get("stats", {}).get("best")
    # a sampler draws from a law; the best that it met may not be among its draws
    exceeded = shown and is_number(best) and shown[0][1].reward is not None and best > shown[0][1].reward
    tree = TreeData.read(row["tree"]) if isinstance(row.get("tree"), Mapping) else None
    stats = {key: value if is_number(value) else None for key, value in dict(row.get("stats", {})).items()}
    left_out, media.left_out = media.left_out, 0
    return {
        "prompt": str(row.get("prompt", "")),
        "base": base,
        "plain": "A plain sample" if (inside := _plain(row)) is None else f"Best of its {inside[1]} plain samples",
        "shown": shown,
        "best": "Best of the draws" if exceeded else "Best found",
        "before": base.reward if base is not None else None,
        "tree": None if tree is None else tree_figure(tree, value_label=f"value, {unit}"),
        "charts": _charts(row, unit, tree="tree_ess" in stats),
        "left_out": left_out,
        "tables": _statistics(row, stats),
        "dashes": tree is not None and any(stats.get(name) is None for name in ("log_z_tree", "log_z_iw")),
    }


def _charts(row: Mapping[str, Any], unit: str, *, tree: bool) -> list[Drawing]:
    """Best reward against model calls, of the search and of its plain samples alone; and all rewards."""
    lines = []
    for name, key, style in (
        ("all samples of the search", "curve", "tuned"),
        ("plain samples alone, at their own cost", "base_curve", "base"),
    ):
        x: list[float] = []
        y: list[float] = []
        for calls, value in row.get(key) or ():  # a running maximum: level until it rises
            x += [float(calls)] * (2 if y else 1)
            y += [*y[-1:], float(value)]
        if x:
            lines.append(Line(name, x, y, style, marked=False))
    base, grown = ([v for v in row.get(f"{side}_rewards", []) if is_number(v)] for side in ("base", "grown"))
    groups = [("plain samples", "base", base), ("grown inside the tree", "tuned", grown)]
    drawn = histogram(groups if tree else [("particles", "tuned", grown)], title="Rewards of the samples", x_label=unit)
    if not lines:
        return [drawn]
    x_label = "model calls of this prompt"
    return [line_chart(lines, title="Best reward so far", y_label=unit, x_label=x_label), drawn]


def _statistics(row: Mapping[str, Any], stats: Mapping[str, float | None]) -> dict[str, dict[str, str]]:
    """Sizes, effective sizes, and the estimates of log Z."""
    tree = "tree_ess" in stats
    effort = {
        "model calls": str(row.get("nfe", "–")),
        "reward calls": str(row.get("reward_calls", "–")),
        "rollouts" if tree else "particles": number(stats.get("rollouts"), 0),
        "distinct valid samples": number(stats.get("leaves"), 0),
        "excluded samples": number(stats.get("excluded"), 0),
    }
    if not tree:
        law = {"effective sample size": number(stats.get("ess"), 2), "log Z": number(stats.get("log_z"))}
        return {"Effort": effort, "Law": law}
    share = stats.get("base_ess_share")
    beside = "" if share is None else f" ({percent(share)} of {len(row.get('base_rewards', []))})"
    return {
        "Effort": effort,
        "Effective number of samples": {
            "plain samples, weighted": number(stats.get("base_ess"), 2) + beside,
            "law of the tree": number(stats.get("tree_ess"), 2),
            "rollouts, weighted": number(stats.get("iw_ess"), 2),
        },
        "log Z, three estimates": {
            "tree (biased down)": number(stats.get("log_z_tree")),
            "weighted rollouts": number(stats.get("log_z_iw")),
            "plain samples": number(stats.get("log_z_base")),
        },
    }
