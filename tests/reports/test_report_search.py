"""The page of a search: the drawn tree says what the tree is, histograms count, and a real browser shows it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from gencontrol.jobs.search.results import drawn, summarise
from gencontrol.models.exact import GaussianMixture
from gencontrol.process import GaussianProcess, Linear
from gencontrol.reports.charts import SHADES, Node, TreeData, bins, histogram, shade, tree_figure
from gencontrol.reports.data import read_run
from gencontrol.reports.run import write_report
from gencontrol.sampling.tree.tree import DiffusionTree
from tests.helpers.run_folders import picture, tone
from tests.reports.test_report import PROBE, Page, _chromium


@pytest.fixture(scope="module")
def tree() -> DiffusionTree:
    """A tree of a few hundred nodes over a mixture in the plane, towards its right-hand side."""
    process = GaussianProcess(Linear())
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    model = GaussianMixture(means, 0.1 * torch.eye(2).expand(2, 2, 2), torch.tensor([0.5, 0.5]), process)
    options = {"steps": 8, "branch": 4, "widening": "small", "leaf_batch": 4, "generator": 0}
    tree = DiffusionTree(model, lambda x: x[:, 0], (2, 2), select="boltzmann", **options)
    for _ in tree.build(nfe=800):
        pass
    return tree


# ---------------------------------------------------------------- what is drawn


def test_drawn_nodes_are_the_tree_where_it_fits(tree: DiffusionTree) -> None:
    leaf = int(tree.best(1, root=1).nodes[0])
    found = drawn(tree, 1, leaf, most=10_000)
    own = np.flatnonzero(tree.nodes.root_of(np.arange(tree.nodes.size)) == 1)
    assert found["total"] == len(own) == len(found["nodes"])
    assert all(row[4] == 0 for row in found["nodes"])
    for place, (parent, level, value, visits, _) in enumerate(found["nodes"]):
        assert parent < place and (parent == -1) == (level == 0)
        if level < 4:
            below = [row for row in found["nodes"] if row[0] == place]
            assert visits >= 1 and len(below) <= visits
            mean = math.log(sum(math.exp(row[2]) for row in below) / len(below))  # equal weights, temperature 1
            assert value == pytest.approx(mean)
    assert found["nodes"][found["path"][-1]][2] == pytest.approx(float(tree.best(1, root=1).rewards[0]))
    assert [found["nodes"][place][1] for place in found["path"]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("most", [12, 40, 100])
def test_a_large_tree_is_cut_to_its_most_visited_nodes(tree: DiffusionTree, most: int) -> None:
    leaf = int(tree.best(1).nodes[0])
    found = drawn(tree, 0, leaf, most=most)
    rows = found["nodes"]
    assert len(rows) <= most < found["total"]
    assert len(rows) + sum(row[4] for row in rows) <= found["total"]  # hidden children may have children of their own
    assert len(found["path"]) == 5
    top = [row[3] for row in rows if row[1] == 1 and row[0] == 0]
    everyone = sorted(tree.nodes["visits"][tree.nodes.children(np.array([0])).ids].tolist(), reverse=True)
    assert sorted(top, reverse=True)[: len(top) - 1] == everyone[: len(top) - 1]  # one place may be the path's
    assert rows[0][4] == len(everyone) - len(top)


def test_summary_numbers(tree: DiffusionTree) -> None:
    found = summarise(tree, 0, int(tree.best(1).nodes[0]))
    json.dumps(found, allow_nan=False)
    best = float(tree.best(1).rewards[0])
    assert found["curve"][-1][1] == best == max([*found["base_rewards"], *found["grown_rewards"]])
    assert found["curve"][-1][0] == tree.counts["nfe"][0]
    assert found["base_curve"][-1] == [8.0 * len(found["base_rewards"]), max(found["base_rewards"])]
    assert len(found["base_rewards"]) + len(found["grown_rewards"]) == found["stats"]["leaves"]
    rises = [value for _, value in found["curve"][:-1]]
    assert rises == sorted(rises)


# ---------------------------------------------------------------- the drawing


def _circles(text: str) -> list[tuple[str, float, float, float]]:
    found = re.findall(r'circle class="node ([^"]+)" cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)"', text)
    return [(style, float(x), float(y), float(r)) for style, x, y, r in found]


def test_places_sizes_and_colours() -> None:
    """Levels from left to right, larger values above and darker, more visits larger, the path marked."""
    nodes = [
        Node(-1, 0, 0.5, 9, 2),
        Node(0, 1, 0.2, 3, 0),
        Node(0, 1, 0.9, 6, 0),
        Node(1, 2, 0.2, 1, 0),
        Node(2, 2, 0.9, 1, 0),
        Node(2, 2, None, 1, 0),
    ]
    text = str(tree_figure(TreeData((1.0, 0.5, 0.0), nodes, (0, 2, 4), 8), value_label="reward"))
    Page(text)
    circles = _circles(text)
    x = [place[1] for place in circles]
    y = [place[2] for place in circles]
    assert x[0] < x[1] == x[2] < x[3] == x[4] == x[5]
    assert y[4] < y[5] < y[3] and y[2] < y[1]
    assert y[2] == pytest.approx((y[4] + y[5]) / 2, abs=0.1) and y[0] == pytest.approx((y[1] + y[2]) / 2, abs=0.1)
    assert circles[2][3] > circles[1][3] > circles[3][3]
    assert [style for style, *_ in circles] == ["v4 best", "v0", "v9 best", "v0", "v9 best", "none"]
    assert text.count('class="edge best"') == 2 and text.count('class="edge"') == 3
    assert "6 most visited of 8 nodes; 2 are left out" in text
    assert "2 children not drawn" in text and "not scored" in text and ">0.900</text>" in text


def test_shades_cover_the_range() -> None:
    assert [shade(v, 0.0, 1.0) for v in (0.0, 0.05, 0.1, 0.55, 1.0)] == [0, 0, 1, 5, SHADES - 1]
    assert shade(0.3, 0.3, 0.3) == SHADES - 1


@pytest.mark.parametrize(
    "damage",
    [{}, {"nodes": []}, {"nodes": [[5, 0, 1.0, 1, 0]]}, {"nodes": [[-1, 9, 1.0, 1, 0]]}, {"path": [7]}, {"times": "x"}],
)
def test_a_damaged_tree_is_not_drawn(damage: dict[str, object]) -> None:
    whole = {"times": [1.0, 0.0], "nodes": [[-1, 0, 1.0, 1, 0]], "path": [0], "total": 1}
    assert TreeData.read(whole) is not None
    assert TreeData.read(whole | damage if damage else {}) is None


def test_a_deep_tree_is_laid_out_without_recursion() -> None:
    nodes = [Node(place - 1, place, 1.0, 2, 0) for place in range(3000)]
    text = str(tree_figure(TreeData([1 - t / 2999 for t in range(3000)], nodes, (), 3000), value_label="v"))
    assert len(_circles(text)) == 3000


# ---------------------------------------------------------------- histograms


def test_histogram_shares_are_of_each_group() -> None:
    text = str(histogram([("a", "base", [0.0, 0.0, 1.0, 1.0]), ("b", "tuned", [1.0])], title="t", x_label="r"))
    Page(text)
    assert re.findall(r"<title>(a|b): (\d+) %", text) == [("a", "50"), ("a", "50"), ("b", "100")]
    assert "No values" in str(histogram([("a", "base", [])], title="t", x_label="r"))
    Page(str(histogram([("a", "base", [2.0])], title="t", x_label="r")))


@pytest.mark.parametrize("values", [[0.1, 0.9], [-5.0, -4.0, -4.5], [1e-6, 2e-6], [3.0, 3.0], [0.0]])
def test_bins_hold_all_values_at_round_edges(values: list[float]) -> None:
    edges = bins(values)
    assert edges[0] <= min(values) + 1e-12 and edges[-1] >= max(values) - 1e-12 and 2 <= len(edges) <= 26


def test_far_outliers_do_not_hide_the_rest() -> None:
    edges = bins([i / 100 for i in range(100)] * 3 + [-1000.0])
    assert edges[0] >= -0.5


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def run_dir(tree: DiffusionTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as a search leaves it: one prompt with sounds, one with pictures."""
    folder = tmp_path_factory.mktemp("search") / "run"
    (folder / "samples").mkdir(parents=True)
    search = '[search]\nsampler = "dts"\nnfe = 800\n'
    (folder / "config.toml").write_text(f'[run]\nmodel = "bundled"\nreward = ["clap"]\n\n{search}')
    (folder / "run.json").write_text(json.dumps({"kind": "search", "starts": [{"command": "gencontrol search"}]}))
    prompts = []
    for root, prompt in enumerate(("a bell", "<b>loud</b> & bright")):
        files = []
        for name in ("base", "01", "02"):
            stem = f"samples/{root:03d}_{name}"
            (folder / f"{stem}.png").write_bytes(picture(40))
            files.append([f"{stem}.png"])
            if root == 0:
                (folder / f"{stem}.wav").write_bytes(tone(440))
                files[-1].insert(0, f"{stem}.wav")
        summary = summarise(tree, root, int(tree.best(1, root=root).nodes[0]))
        summary["stats"]["excluded"] = 1
        samples = [{"files": names, "reward": 0.9 - 0.1 * i} for i, names in enumerate(files[1:])]
        base = {"files": files[0], "reward": 0.25}
        prompts.append({"prompt": prompt, "nfe": 800, **summary, "base": base, "samples": samples})
    prompts[0]["warnings"] = ["the estimates of log Z disagree"]
    found = {"finished": True, "sampler": "dts", "nfe": 800, "count": 2, "steps": 8, "seconds": 2.5}
    (folder / "search.json").write_text(json.dumps({**found, "excluded": {"broken <judge>": 2}, "prompts": prompts}))
    return folder


def test_the_page_holds_everything_and_fetches_nothing(run_dir: Path, tree: DiffusionTree) -> None:
    text = write_report(run_dir).read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("audio")) == 4  # base, best, two ranks
    assert len(page.all("img")) == 8 and text.count('class="chart tree"') == 2
    assert "&lt;b&gt;loud&lt;/b&gt; &amp; bright" in text and "<b>loud" not in text
    for part in (
        "+0.650",
        "broken &lt;judge&gt;",
        "The estimates of log Z disagree",
        "gencontrol search",
        f"value, {read_run(run_dir).unit}",
    ):
        assert part in text, part
    stats = tree.stats(0)
    assert f"{stats['log_z_iw']:.3f}".replace("-", "−") in text
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"prompts": [3]}', '{"prompts": [{"prompt": "a"}]}'])
def test_damaged_summaries_do_not_stop_a_report(content: str, run_dir: Path, tmp_path: Path) -> None:
    for name in ("config.toml", "run.json"):
        (tmp_path / name).write_text((run_dir / name).read_text())
    (tmp_path / "search.json").write_text(content)
    Page(write_report(tmp_path).read_text(encoding="utf-8"))


def test_samples_outside_the_folder_are_not_read(run_dir: Path, tmp_path: Path) -> None:
    """A summary from elsewhere cannot put files of this machine into the page."""
    for name in ("config.toml", "run.json", "search.json"):
        (tmp_path / name).write_text((run_dir / name).read_text())
    (tmp_path / "secret.png").write_bytes(picture(10))
    found = json.loads((tmp_path / "search.json").read_text())
    for row in found["prompts"]:
        row["base"]["files"] = ["secret.png", "samples/../secret.png", str(tmp_path / "secret.png")]
        row["samples"] = []
    (tmp_path / "search.json").write_text(json.dumps(found))
    assert not Page(write_report(tmp_path).read_text(encoding="utf-8")).all("img")


def test_a_browser_shows_it_without_complaint(run_dir: Path, tmp_path: Path) -> None:
    """On a telephone's width, where a page that is too wide would show."""
    text = write_report(run_dir).read_text(encoding="utf-8")
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    done = _chromium("--dump-dom", "--window-size=400,900", page.as_uri(), profile=tmp_path / "profile")
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None, done.stderr[-2000:]
    found = json.loads(title[1].replace("&quot;", '"'))
    assert found["durations"] == pytest.approx([1.0] * 4, abs=0.02)
    assert all(size > 0 for size in found["images"])
    assert found["wide"] <= 0, "the page scrolls sideways"
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
