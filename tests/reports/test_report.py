"""report.html: what it says, that it is one safe file, and that a real browser shows and plays it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from gencontrol import registry
from gencontrol.errors import UsageError
from gencontrol.reports.card import make_card, origin_of_run, write_card, write_measured
from gencontrol.reports.charts import Line, label, line_chart, power_of, running_mean, thin, ticks
from gencontrol.reports.data import about, cut_wav, describe, read_run
from gencontrol.reports.run import write_report
from gencontrol.rewards.audio.clap import ClapReward
from tests.helpers.run_folders import PROMPTS, make_finetune, make_pretrain, tone

CHROMIUM = Path("/usr/bin/chromium")
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced, and collects attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack.pop() == tag, f"</{tag}> does not close what was opened last"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_finetune(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def text(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


# ---------------------------------------------------------------- the page


def test_headline_numbers(text: str) -> None:
    gain = 0.18 * (1 - math.exp(-3))
    assert f"+{gain:.3f}" in text
    assert f"95 %: +{gain - 0.03:.3f} to +{gain + 0.03:.3f}" in text
    assert f"{100 * (0.5 + 0.4 * (1 - math.exp(-3))):.0f} %" in text
    assert "of 120" in text


def test_players_pictures_and_labels(text: str) -> None:
    page = Page(text)
    players, pictures = page.all("audio"), page.all("img")
    assert len(players) == len(pictures) == 2 * len(PROMPTS)
    assert all((p["src"] or "").startswith("data:audio/wav;base64,UklGR") for p in players)  # "RIFF"
    assert all((p["src"] or "").startswith("data:image/png;base64,iVBOR") for p in pictures)
    assert all(p["aria-label"] for p in players) and all(p["alt"] for p in pictures)
    assert [svg["role"] for svg in page.all("svg")] == ["img"] * len(page.all("svg"))
    assert all(svg["aria-label"] for svg in page.all("svg"))
    assert page.all("html")[0]["lang"] == "en"


def test_nothing_is_fetched(text: str) -> None:
    page = Page(text)
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    assert "url(" not in text and "@import" not in text
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")


def test_texts_are_escaped(text: str) -> None:
    assert "&lt;b&gt;loud&lt;/b&gt; &amp; &#34;distorted&#34; bass" in text
    assert "<b>loud" not in text


def test_rewards_stand_beside_the_players(text: str) -> None:
    assert 'reward 0.350 <b class="good">(+0.150)</b>' in text
    assert '<b class="bad">(−0.030)</b>' in text


def test_configuration_command_and_loading(text: str) -> None:
    for part in ("clap:0.7, fad:0.3", "[algorithm]", "gencontrol finetune --reward clap:0.7", "torch", "0123abc"):
        assert part in text
    assert "TextToAudioPipeline.from_pretrained" in text and "load_lora_weights" in text


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    folder = make_finetune(tmp_path / "cut", 20, finished=False)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "loss/to')  # torn by a kill
    page = write_report(folder).read_text(encoding="utf-8")
    assert "not finished: step 20 of 20" in page
    assert "from_pretrained" not in page


def test_pretraining(tmp_path: Path) -> None:
    page = write_report(make_pretrain(tmp_path / "flow")).read_text(encoding="utf-8")
    assert "Pretraining of flow" in page and "Held-out loss" in page and "a happy flute" in page
    assert "Win rate" not in page.split("<footer>")[0]


@pytest.mark.parametrize(
    "damage",
    [
        {"metrics.jsonl": "not json\n\n[1]\n"},
        {"metrics.jsonl": '{"step": 1, "loss/total": null, "reward/mean": NaN}\n'},
        {"run.json": "{"},
        {"config.toml": "", "run.json": "[]"},
    ],
)
def test_damaged_records_do_not_stop_a_report(tmp_path: Path, damage: dict[str, str]) -> None:
    folder = make_finetune(tmp_path / "run", 10)
    for name, content in damage.items():
        (folder / name).write_text(content)
    Page(write_report(folder).read_text(encoding="utf-8"))


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        write_report(tmp_path / "absent")
    with pytest.raises(UsageError, match="no run folder"):
        write_report(tmp_path)


def test_long_sounds_are_cut_to_keep_the_page_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gencontrol.reports.data.BUDGET_BYTES", 10_000)
    monkeypatch.setattr("gencontrol.reports.data.SHORT_S", 0.25)
    run = read_run(make_finetune(tmp_path / "run", 10))
    assert run.cut_s == 0.25
    assert run.pairs[0].base is not None
    assert len(run.pairs[0].base.wav) == 44 + 2 * 4000  # header and a quarter of a second at 16 kHz


def test_cut_wav_leaves_other_files_alone() -> None:
    assert cut_wav(b"RIFFnonsense", 1.0) == b"RIFFnonsense"
    assert cut_wav(tone(440, 0.1), 5.0) == tone(440, 0.1)


def test_model_card(run_dir: Path) -> None:
    path = write_card(run_dir)
    assert path == run_dir / "final" / "README.md"
    card = path.read_text(encoding="utf-8")
    for part in (
        "https://arxiv.org/abs/2504.15217",
        f"| clap | 0.7 | {describe(ClapReward)['title']}",
        "| fad | 0.3 |",
        "the model bundled with gencontrol",
        "algorithm.generations | 2",
        "over-optimisation",
        "from_pretrained",
        "LoRA adapter of rank 16",
        f"| paired gain | {0.18 * (1 - math.exp(-3)):.4g} |",
    ):
        assert part in card, part
    assert card.startswith("---\n") and card.count("\n---\n") == 1


class OutsideMethod:
    """Keeps the best <share> of each group.

    More about it.
    """

    title, paper, summary = "RAFT, best | of <group>", "arXiv:2304.06767", "Keeps the best share of each group."


def test_outside_code_is_shown_with_its_title_and_never_imported(run_dir: Path, tmp_path: Path) -> None:
    """What the job recorded is enough: the folder may be read where that code is not, or come from a stranger."""
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    algorithm, reward = "evil_module_of_a_stranger:Raft", "evil_module_of_a_stranger:Reward"
    text = (folder / "config.toml").read_text().replace('"dragon"', f'"{algorithm}"').replace("clap:0.7", f"{reward}:2")
    (folder / "config.toml").write_text(text)
    (tmp_path / "evil_module_of_a_stranger.py").write_text("raise SystemExit('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        unknown = make_card(read_run(folder)).text
        record = json.loads((folder / "run.json").read_text())
        known = {algorithm: OutsideMethod, reward: OutsideMethod()}
        (folder / "run.json").write_text(json.dumps({**record, "about": about(algorithm, [f"{reward}:2"], known)}))
        card = make_card(read_run(folder))
        page = write_report(folder).read_text(encoding="utf-8")
    finally:
        sys.path.remove(str(tmp_path))
    assert f"{algorithm}. A LoRA" in unknown and f"| {reward} | 2 | user code |" in unknown
    method = "RAFT, best | of <group>, <https://arxiv.org/abs/2304.06767>. Keeps the best share of each group. A LoRA"
    assert method in card.text and card.data.tags == ["gencontrol", algorithm, "reward-fine-tuning"]
    row = f"| {reward} | 2 | RAFT, best \\| of <group> (https://arxiv.org/abs/2304.06767). Keeps the best"
    assert row in card.text
    assert "RAFT, best | of &lt;group&gt; towards" in page and "<group>" not in page
    assert "https://arxiv.org" not in page, "a page loads and links nothing"


def test_cards_name_every_registered_method_and_reward() -> None:
    """No table of names beside the classes: whatever is registered has a title, and a paper where the class has one."""
    for name, path in (registry.ALGORITHMS | registry.TRAIN | registry.REWARDS).items():
        kind = "reward" if registry.REWARDS.get(name) == path else "algorithm"
        found = about(name, ()) if kind == "algorithm" else about("", (name,))
        assert found[kind][name]["title"] not in ("", name), name
        assert re.fullmatch(r"(https://\S+)?", found[kind][name]["paper"]), name
    assert describe(registry.find(registry.ALGORITHMS, "crd", "algorithm"))["paper"].endswith("abs/2603.14128")


def test_card_metadata_is_what_the_hub_reads(run_dir: Path) -> None:
    data = make_card(read_run(run_dir)).data
    assert (data.library_name, data.license, data.pipeline_tag) == ("gencontrol", "apache-2.0", "text-to-audio")
    assert [result.metric_type for result in data.eval_results][0] == "paired gain of the reward"
    assert data.eval_results[0].metric_value == pytest.approx(0.18 * (1 - math.exp(-3)))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": {"architectures": ["ClapModel"]}}, 'load_reward("clap", reward_model='),
        ({"config.json": {"_class_name": "AttributeNet"}}, "AttributeNet.from_pretrained"),
        ({"model_index.json": {"_class_name": "ClassToImagePipeline"}}, "pipe(3, seed=0)"),
        ({"model_index.json": {"_class_name": "StableAudioPipeline"}}, "TextToAudioPipeline.from_pretrained"),
        ({"model_index.json": {"_class_name": "StableDiffusionPipeline"}}, "TextToImagePipeline.from_pretrained"),
        ({"scene_reader/config.json": {}}, "SceneReader.from_pretrained"),
        ({"control/config.json": {}}, "pipe.load_control("),
    ],
)
def test_final_says_how_it_is_loaded(files: dict[str, object], said: str, tmp_path: Path) -> None:
    folder = make_pretrain(tmp_path / "run")
    for name, content in files.items():
        (folder / "final" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "final" / name).write_text(json.dumps(content))
    assert said in make_card(read_run(folder)).text
    assert said.partition("(")[0] in write_report(folder).read_text(encoding="utf-8")


def test_card_of_a_bundled_model(run_dir: Path, tmp_path: Path) -> None:
    """Measured numbers, origin and picture; measured.json is what the card shows."""
    (tmp_path / "model.safetensors").write_bytes(bytes(20_000))
    sections = {"test clips": {"clips": 3, "cosine": 0.123456}, "speed": {"ms": 1.0}}
    texts = {
        "title": "A model",
        "text": "What.",
        "source": "Data: none.",
        "note": "Numbers by us",
        "caption": "A picture",
    }
    origin = origin_of_run(run_dir, "busy")
    write_measured(tmp_path, sections, **texts, origin=origin, picture=("card.svg", b"<svg/>"))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "apache-2.0" and json.loads((tmp_path / "measured.json").read_text()) == sections
    for part in (
        "# A model",
        "Weights: 0.02 MB",
        "Test clips:\n\n| quantity | value |\n|---|---|\n| clips | 3 |\n| cosine | 0.1235 |\n",
        "Speed:\n\n",
        "    gencontrol finetune --reward clap:0.7",
        "120 steps in 300 s of wall time (CPU, 2 cores, busy; gencontrol 0.1.0, torch 2.13.0, transformers 5.0; commit",
        "![A picture](card.svg)",
    ):
        assert part in card.content, part
    assert (tmp_path / "card.svg").read_bytes() == b"<svg/>"


def test_no_card_before_the_end(tmp_path: Path) -> None:
    assert write_card(make_finetune(tmp_path / "run", 5, finished=False)) is None


# ---------------------------------------------------------------- charts


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.21, 0.43), (-3e-5, 8e-5), (0, 20000), (5, 5.0001), (-7, -2)])
def test_ticks_are_round_inside_and_few(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-9 * abs(low) <= t <= high + 1e-9 * abs(high) for t in found)
    step = found[1] - found[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5, 10)


def test_tick_labels() -> None:
    assert [label(v, 0.05) for v in (0.0, 0.05, -0.1)] == ["0.00", "0.05", "−0.10"]
    assert label(20000, 5000) == "20\u2009000"
    assert [power_of(0, v) for v in (0.0, 1.0, 0.02, 2e-4, 3e6)] == [0, 0, 0, -4, 6]


def test_curve_points_lie_where_the_axes_say() -> None:
    """The polyline's ends are at the plot's corners for a rising line over the full range."""
    chart = str(line_chart([Line("a", [0, 10], [0.0, 1.0])], title="t", y_label="u"))
    points = re.findall(r'polyline class="line tuned" points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', chart)[0]
    x0, y0, x1, y1 = map(float, points)
    grid = {t: float(y) for y, t in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', chart)}
    assert abs(y0 - (grid["0.0"] - 4)) < 0.2 and abs(y1 - (grid["1.0"] - 4)) < 0.2  # text sits 4 units lower
    assert x0 < x1


def test_constant_empty_and_single_series() -> None:
    assert "No values yet" in str(line_chart([Line("a", [], [])], title="t", y_label="u"))
    for line in (Line("a", [1, 2, 3], [0.0, 0.0, 0.0]), Line("a", [4], [2.5], low=[2.0], high=[3.0])):
        chart = str(line_chart([line], title="t", y_label="u"))
        assert "nan" not in chart and "inf" not in chart
        Page(chart)


def test_thinning_keeps_the_mean() -> None:
    line = thin(Line("a", list(range(10_000)), [float(v) for v in range(10_000)]), 100)
    assert len(line.x) == 100
    assert sum(line.y) / 100 == pytest.approx(4999.5)


def test_running_mean() -> None:
    assert running_mean([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]


# ---------------------------------------------------------------- a browser

PROBE = """<script>
window.addEventListener("load", async () => {
  const wait = player => new Promise(done =>
    player.readyState >= 1 ? done() : (player.onloadedmetadata = player.onerror = done));
  const players = [...document.querySelectorAll("audio")];
  await Promise.all(players.map(wait));
  const images = [...document.images];
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const [durations, sizes] = [players.map(p => p.duration), images.map(i => i.naturalWidth)];
  document.title = JSON.stringify({durations, images: sizes, wide});
});
</script>"""


def _chromium(*arguments: str, profile: Path) -> subprocess.CompletedProcess[str]:
    if not CHROMIUM.exists():
        reason = f"{CHROMIUM} is missing: apt-get install chromium"
        if os.environ.get("GENCONTROL_REQUIRE_CHROMIUM") == "1":
            pytest.fail(reason)
        print(f"skipped: {reason}")
        pytest.skip(reason)
    switches = (
        "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
        "--disable-sync --no-first-run --hide-scrollbars --enable-logging=stderr --virtual-time-budget=8000"
    ).split()
    return subprocess.run(
        [str(CHROMIUM), *switches, f"--user-data-dir={profile}", *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_browser_plays_every_sound_without_complaint(text: str, tmp_path: Path) -> None:
    """On a telephone's width, where a page that is too wide would show."""
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    done = _chromium("--dump-dom", "--window-size=400,900", page.as_uri(), profile=tmp_path / "profile")
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None, done.stderr[-2000:]
    found = json.loads(title[1].replace("&quot;", '"'))
    assert found["durations"] == pytest.approx([1.0] * 2 * len(PROMPTS), abs=0.02)
    assert all(size > 0 for size in found["images"])
    assert found["wide"] <= 0, "the page scrolls sideways"
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]


def test_browser_draws_the_page(run_dir: Path, text: str, tmp_path: Path) -> None:
    from PIL import Image

    target = tmp_path / "shot.png"
    arguments = (f"--screenshot={target}", "--window-size=1200,2400", (run_dir / "report.html").as_uri())
    done = _chromium(*arguments, profile=tmp_path / "profile")
    assert target.exists(), done.stderr[-2000:]
    with Image.open(target) as image:
        assert image.size == (1200, 2400)
        colours = image.convert("RGB").getcolors(maxcolors=1 << 24) or []
        assert len(colours) > 200
        assert max(count for count, _ in colours) < 0.9 * 1200 * 2400
    shutil.rmtree(tmp_path / "profile", ignore_errors=True)


def test_the_probe_sees_errors(tmp_path: Path) -> None:
    """The absence of CONSOLE lines above means something."""
    page = tmp_path / "bad.html"
    page.write_text("<script>throw new Error('seen')</script>")
    assert "CONSOLE" in _chromium("--dump-dom", page.as_uri(), profile=tmp_path / "profile").stderr
