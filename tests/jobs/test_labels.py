"""From labelled files to steered samples on the command line: pretrain classifier, finetune ctrl, sample --y."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gencontrol.cli import main
from gencontrol.config import load_toml
from gencontrol.data.images import to_pil
from gencontrol.models.readers.image_classifier import ImageClassifier
from gencontrol.rewards import load_rewards
from tests.helpers.fixtures_scenes import tiny_text_to_image

Said = Callable[..., str]


def write_labels(folder: Path, counts: dict[str, int], *, side: int = 8) -> Path:
    """Plain images: "dark" or "bright" pixels, and all of size "small" or "large" in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, generator = [], torch.Generator().manual_seed(0)
    for tone, count in counts.items():
        for i in range(count):
            level = {"dark": 0.2, "bright": 0.8}.get(tone, 0.5)
            name = f"{tone}{i}.png"
            to_pil(level + 0.1 * torch.randn(3, side, side, generator=generator)).save(folder / name)
            labels = {"tone": tone} | ({"size": "large" if i % 2 else "small"} if tone != "bright" else {})
            lines.append(json.dumps({"file": name, "labels": labels}))
    path = folder / "labels.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Run a command that fails by the user; returns its one line."""

    def run(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("gencontrol: error: ") and not any("Traceback" in line for line in lines)
        return lines[-1]

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three commands, up to the finished run; runs/labels and run/ lie in the folder."""
    folder = tmp_path_factory.mktemp("labels")
    tiny_text_to_image(folder / "model")
    data = write_labels(folder / "data", {"dark": 6, "bright": 6}, side=16)
    size = ["--set", "run.size=8", "--set", "run.folds=2", "--steps", "5", "--threads", "1"]
    assert main(["pretrain", "classifier", "--data", str(data), "--output", str(folder / "labels"), *size]) == 0
    command = ["finetune", "--algorithm", "ctrl", "--model", str(folder / "model"), "--reward", "classifier"]
    command += ["--reward-model", str(folder / "labels"), "--output", str(folder / "run"), "--steps", "2"]
    command += ["--batch", "2", "--micro-batch", "4", "--lora-rank", "2", "--threads", "1", "algorithm.steps=3"]
    command += ["algorithm.bound_samples=2", "run.prompt_count=4", "run.eval_count=1"]
    assert main([*command, "--set", "run.attribute_weights={size=2}"]) == 0
    return folder


def test_classifiers_are_written_one_per_attribute(run: Path) -> None:
    table = json.loads((run / "labels" / "labels.json").read_text())
    assert table["tone"]["images"] == {"bright": 6, "dark": 6} and table["size"]["images"] == {"large": 3, "small": 3}
    tone = ImageClassifier.from_pretrained(run / "labels" / "tone")
    assert tone.config.classes == ("bright", "dark") and tone.config.size == 8


def test_card_says_how_to_use_the_control(run: Path) -> None:
    card = (run / "run" / "final" / "README.md").read_text()
    assert "pipe.load_control(" in card and "pipe.control_labels" in card
    assert (
        "A new condition was trained, and a LoRA adapter of rank 2 beside it" in card and "holds it merged" not in card
    )


def test_weights_of_attributes_reach_the_reward(run: Path) -> None:
    assert load_toml(run / "run" / "config.toml")["run"]["attribute_weights"] == {"size": 2}
    loaded = load_rewards(["classifier"], reward_model=run / "labels", weights={"size": 2.0}, device="cpu")
    assert loaded.weights == {"size": 2.0, "tone": 1.0}  # type: ignore[attr-defined]


def test_sample_with_labels(run: Path, tmp_path: Path) -> None:
    call = ["sample", "--model", str(run / "run" / "final"), "--prompt", "a red circle", "--num", "1"]
    more = ["--y", "tone=dark", "--y", "size=large", "--y-scale", "2"]
    score = ["--reward", "classifier", "--reward-model", str(run / "labels")]
    assert main([*call, *more, *score, "--guidance-scale", "3", "--output", str(tmp_path / "a")]) == 0
    table = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert table["y"] == {"tone": "dark", "size": "large"} and table["y_scale"] == 2.0
    assert table["samples"][0]["reward"] <= 0
    # without --y: the base, byte for byte
    base = ["sample", "--model", str(run / "model"), "--prompt", "a red circle", "--num", "1"]
    assert main([*call, "--output", str(tmp_path / "b")]) == 0
    assert main([*base, "--output", str(tmp_path / "c")]) == 0
    assert (tmp_path / "b" / "000_00.png").read_bytes() == (tmp_path / "c" / "000_00.png").read_bytes()
    control = ["--control", str(run / "run")]
    assert main([*base, *control, *more, "--guidance-scale", "3", "--output", str(tmp_path / "d")]) == 0
    assert (tmp_path / "d" / "000_00.png").read_bytes() == (tmp_path / "a" / "000_00.png").read_bytes()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--y", "shape=round"], "no attribute 'shape'. Attributes: size, tone"),
        (["--y", "tone=darkk"], "no label 'darkk'. Did you mean 'dark'? Labels: bright, dark"),
        (["--y", "dark"], "this control has the attributes size, tone"),
        (["--y", "tone=dark", "--y", "tone=bright"], "is given twice"),
        (["--y-scale", "2"], "--y-scale without --y"),
        (["--y", "tone=dark", "--steps", "9"], "9 steps instead of 3"),
        (["--y", "tone=dark", "--control", "."], "holds no control"),
    ],
)
def test_refusals_of_sample(run: Path, said: Said, tmp_path: Path, options: list[str], text: str) -> None:
    call = ["sample", "--model", str(run / "run" / "final"), "--prompt", "a", "--output", str(tmp_path / "s")]
    assert text in said(*call, *options)
    assert not (tmp_path / "s" / "samples.json").exists()


def test_a_class_without_examples_is_one_line(said: Said, tmp_path: Path) -> None:
    data = str(write_labels(tmp_path / "few", {"dark": 6, "bright": 6, "grey": 1}))
    call = ["pretrain", "classifier", "--data", data, "--output", str(tmp_path / "out"), "--set", "run.folds=2"]
    assert "'tone': too few labelled images of grey (1): each class needs at least 2" in said(*call)
    none = said(*call, "--set", 'run.classes={tone=["dark", "bright", "grey", "white"]}')
    assert "grey (1), white (0)" in none and "label more, or leave the class out" in none
    unknown = said(*call, "--set", 'run.classes={tone=["dark", "bright"]}')
    assert "line 13: 'grey' is no class of 'tone'" in unknown
    assert not (tmp_path / "out" / "tone").exists()


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"file": "dark0.png", "labels": {}}', "expected an object of texts"),
        ('{"file": "dark0.png"}', "field 'labels' is missing"),
        ('{"file": "absent.png", "labels": {"tone": "dark"}}', "does not exist"),
        ('{"file": "dark0.png", "labels": {"to=ne": "dark"}}', "contains one of"),
        ('{"file": "dark0.png", "labels": {"a/b": "x"}}', "cannot name a folder"),
    ],
)
def test_faults_of_the_manifest(said: Said, tmp_path: Path, line: str, text: str) -> None:
    data = write_labels(tmp_path / "data", {"dark": 2, "bright": 2})
    data.write_text(data.read_text() + "\n" + line)
    assert text in said("pretrain", "classifier", "--data", str(data), "--output", str(tmp_path / "out"))


def test_options_without_effect_are_refused(said: Said, tmp_path: Path) -> None:
    data = str(write_labels(tmp_path / "data", {"dark": 2, "bright": 2}))
    call = ["pretrain", "classifier", "--data", data, "--output", str(tmp_path / "out")]
    assert "no option --warmup" in said(*call, "--warmup", "3")
    assert "does not use train.warmup" in said(*call, "train.warmup=3")
    assert "name the manifest" in said("pretrain", "classifier")
    weights = ["finetune", "--reward", "classifier", "--output", str(tmp_path / "run"), "--dry-run"]
    assert "attribute_weights.size = 0; expected a number above 0" in said(
        *weights, "--set", "run.attribute_weights={size=0}"
    )
