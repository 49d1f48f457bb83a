"""The page of an evaluation, made from report.json alone: numbers, hostile names, broken folders; charts in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gencontrol.cli import main
from gencontrol.errors import UsageError
from gencontrol.reports.charts import curves, heatmap, intervals, svg_file
from gencontrol.reports.evaluation import write_evaluation
from gencontrol.reports.run import write_report
from gencontrol.stats import Estimate
from tests.reports.test_report import Page

HOSTILE = '<script>alert("x")</script>'


def _summary(successes: int) -> dict[str, Any]:
    return {
        "n": 5,
        "valid": 4,
        "successes": successes,
        "rate": successes / 4,
        "interval95": [0.1, 0.9],
        "success_any": successes,
        "success_end": successes,
        "rate_if_invalid_failed": successes / 5,
        "invalid": {f"crash {HOSTILE}": 1},
        "return": {"value": 1.5, "low": 1.0, "high": None},
        "mean_length": 12.0,
        "clipped_numbers": 3,
        "actions": 48,
        "latency_s": {"p50": 0.002, "p95": None},
    }


def _policy(name: str, compared: dict[str, Any] | None = None) -> dict[str, Any]:
    episodes = [
        {
            "seed": seed,
            "env_id": HOSTILE,
            "success": seed > 2,
            "success_any": seed > 2,
            "success_end": False,
            "total_reward": 1.5,
            "max_reward": 1.0,
            "length": 12,
            "terminated": False,
            "truncated": True,
            "clipped": 0,
            "invalid": f"crash {HOSTILE}" if seed == 0 else None,
            "latency_s": 0.002,
            "video": "../secret.mp4" if seed == 1 else f"videos/{seed}.mp4" if seed > 1 else None,
        }
        for seed in range(5)
    ]
    return {
        "policy": {"id": name, "class": HOSTILE},
        "overall": _summary(2),
        "per_task": [{"env_id": HOSTILE, **_summary(1)}, {"env_id": "b", **_summary(1)}],
        "comparison": compared,
        "notes": [f"note {HOSTILE}"],
        "episodes": episodes,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An evaluation of two policies whose names, tasks, notes and reasons are hostile."""
    estimate = {"value": 0.25, "low": 0.1, "high": 0.4}
    counts = {"pairs": 4, "both": 1, "only_first": 1, "only_second": 2, "neither": 0, "mcnemar_p": 0.5}
    tests = {"difference": estimate, "difference_newcombe": estimate, "return_difference": estimate}
    seeds = {"discordant": [[3, HOSTILE, HOSTILE]], "dropped": {f"invalid {HOSTILE}": 1}}
    compared = {"first": HOSTILE, "second": "b & c", **counts, **tests, **seeds}
    table = {
        "schema_version": 2,
        "gencontrol": "0.1.0",
        "protocol": {"seeds": [0, 1, 2, 3, 4], "success": {HOSTILE: "flag"}},
        "environments": [{"env_id": HOSTILE, "versions": {"simulator": HOSTILE}}, {"env_id": "b", "versions": {}}],
        "policies": [_policy(HOSTILE), _policy("b & c", compared)],
    }
    run = tmp_path / "evaluation"
    (run / "videos").mkdir(parents=True)
    for seed in (2, 3):
        (run / "videos" / f"{seed}.mp4").write_bytes(b"film")
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (run / "report.json").write_text(json.dumps(table))
    return run


def test_hostile_names_stay_text(folder: Path) -> None:
    text = write_evaluation(folder).read_text(encoding="utf-8")
    page = Page(text)
    assert "<script>alert" not in text and text.count("&lt;script&gt;alert") > 20
    assert len(page.all("script")) == 1, "the page's own"
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)


def test_the_numbers_are_there(folder: Path) -> None:
    text = write_report(folder).read_text(encoding="utf-8")  # `gencontrol report` knows the folder by its file
    for part in (
        "50.0 %",
        "2 of 4, 95 % 10.0 % to 90.0 %",
        "would make it 40.0 %",
        "3 numbers in 48 actions",
        "95 % 1.00 to –",
        "2 ms",
        "95 % below –",
        "+25.0 points",
        "p = 0.5",
        "2 : 1",
        "4 pairs on equal seeds",
        "5 from 0 to 4",
        "failure, truncated",
    ):
        assert part in text, part
    players = [video["src"] for video in Page(text).all("video")]
    assert players == ["data:video/mp4;base64,ZmlsbQ=="] * 4, "two of each policy"
    assert "c2VjcmV0" not in text and "outside the folder" in text, "files of other folders are not read"
    assert "No such file" in text, "a video that is gone is said to be"
    for section in text.split("<h2>"):
        if "videos</h2>" in section:
            assert "failure</b>" not in section[section.index("success</b>") :], "failures first"


def test_videos_beyond_the_budget_are_linked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gencontrol.reports.evaluation.EMBEDDED", 5)
    text = write_evaluation(folder).read_text(encoding="utf-8")
    assert text.count("<video") == 1 and '<a href="videos/3.mp4">' in text


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"policies": []}', '{"policies": [{"policy": 3}]}', "\x00"])
def test_a_damaged_evaluation_is_one_line(content: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "report.json").write_text(content)
    with pytest.raises(UsageError, match="damaged"):
        write_evaluation(folder)
    assert main(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gencontrol: error:") and error.count("\n") == 1 and "report.json" in error


def test_the_command_says_in_one_line_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.toml").write_text("[run\n")
    for path, said in ((tmp_path / "absent", "does not exist"), (tmp_path, "config.toml")):
        assert main(["report", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("gencontrol: error:") and error.count("\n") == 1 and said in error
    with pytest.raises(UsageError, match="check the path"):
        write_evaluation(tmp_path)


# ---------------------------------------------------------------- charts in files of their own


def test_curves_lie_where_the_logarithm_says() -> None:
    """Equal factors are equal distances; a band is drawn for estimates alone; names are escaped."""
    falling = {10.0: 1.0, 100.0: 0.1, 1000.0: Estimate(0.01, 0.005, 0.02)}
    drawing = curves("gap", "model calls", {"<DTS>": falling, "flat": {10.0: 0.5, 1000.0: 0.5}})
    text = svg_file([drawing, drawing])
    page = Page(text)
    first = page.all("polyline")[0]["points"] or ""
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in first.split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y1 - y0 == pytest.approx(y2 - y1, abs=0.2) and y1 > y0
    assert len(page.all("polyline")) == 4 and "&lt;DTS&gt;" in text and "var(" not in text
    assert "nan" not in text and "No values" not in text


def test_linear_axes_where_numbers_are_not_positive() -> None:
    text = svg_file([curves("t", "round", {"a": {0.0: -1.0, 1.0: 1.0, 2.0: 3.0}})])
    points = (Page(text).all("polyline")[0]["points"] or "").split()
    x = [float(point.split(",")[0]) for point in points]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)


def test_intervals_are_drawn_to_scale() -> None:
    rows = [("a", 0.5, 0.25, 0.75), ("b", 1.0, 0.5, 1.0), ("none", float("nan"), float("nan"), float("nan"))]
    page = Page(str(intervals(rows, title="Success", x_label="%")))
    bars = [
        (float(line["x1"] or 0), float(line["x2"] or 0)) for line in page.all("line") if line["class"] == "bar tuned"
    ]
    dots = [float(dot["cx"] or 0) for dot in page.all("circle")]
    assert len(bars) == len(dots) == 2
    assert dots[0] == pytest.approx(sum(bars[0]) / 2, abs=0.2) and dots[0] == pytest.approx(bars[1][0], abs=0.2)
    assert dots[1] == pytest.approx(bars[1][1], abs=0.2)


def test_heat_maps_shade_by_value() -> None:
    text = svg_file([heatmap([[0.0, 5.0], [10.0, 2.5]], ["<a>", "b"], ["x", "y"], title="t")])
    cells = [cell for cell in Page(text).all("rect") if cell["class"] == "heat tuned"]
    assert [float(cell["fill-opacity"] or -1) for cell in cells] == [0.0, 0.5, 1.0, 0.25]
    assert cells[0]["y"] == cells[1]["y"] and cells[0]["x"] == cells[2]["x"] and "&lt;a&gt;, x: 0" in text
