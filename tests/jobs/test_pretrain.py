"""`pretrain`: wiring of the flow stage on a hand-made data folder, and what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from gencontrol.cli import main
from gencontrol.config import load_toml


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of noise with real captions, as `build_sound_dataset` lays it out."""
    from gencontrol.recipes.sound.data.grammar import caption, spec_of_item

    folder = tmp_path_factory.mktemp("sound")
    (folder / "recipe.json").write_text("{}")
    for split, size in (("train", 6), ("val", 3)):
        noise = np.random.default_rng(0).integers(-3000, 3000, (size, 32768), dtype=np.int16)
        np.save(folder / f"{split}.npy", noise)
        lines = []
        for index in range(size):
            spec, rng = spec_of_item(split, index, 0)
            lines.append(json.dumps({"captions": [caption(spec, rng) for _ in range(3)], **asdict(spec)}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def clap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder with its tokenizer in one folder, as the text half of a CLAP."""
    from tests.helpers.fixtures_models import clap_text_encoder, roberta_tokenizer

    folder = tmp_path_factory.mktemp("clap")
    clap_text_encoder().save_pretrained(folder)
    roberta_tokenizer().save_pretrained(folder)
    return folder


def test_flow_makes_a_loadable_pipeline(data: Path, clap: Path, tmp_path: Path) -> None:
    from gencontrol.pipelines import TextToAudioPipeline

    run = tmp_path / "run"
    sizes = ["model.dim=16", "model.depth=1", "model.heads=2", f"run.clap={clap}"]
    evaluation = ["algorithm.eval_items=2", "algorithm.eval_samples=1", "algorithm.eval_steps=1"]
    command = ["pretrain", "flow", "--data", str(data), "--output", str(run), "--threads", "1"]
    command += ["--batch", "4", "--micro_batch", "4", "--steps", "2", "--eval_every", "2", "process.shift=2.0"]
    assert main([*command, *sizes, *evaluation]) == 0
    pipe = TextToAudioPipeline.from_pretrained(run / "final")
    assert pipe.network.config.dim == 16
    assert pipe.denoiser.process.schedule.shift == 2.0
    assert (run / "samples" / "step_00000002" / "sample_00.wav").exists()
    page = (run / "report.html").read_text()
    assert "Pretraining of flow" in page and "<audio" in page
    assert load_toml(run / "config.toml")["model"]["dim"] == 16
    assert "gencontrol pretrain flow" in (run / "final" / "README.md").read_text()


def test_dry_run_writes_nothing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["pretrain", "clap", "--data", str(data), "--output", str(tmp_path / "run"), "--dry-run"]
    assert main(command) == 0
    assert 'stage = "clap"' in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["flow", "process.schedule=linaer"], "linear"),
        (["flow", "process.predicton=eps"], "predicton"),
        (["flow", "model.widht=3"], "Options:"),
        (["clap", "model.dim=3"], "only flow"),
        (["clap", "run.clapp=x"], "Did you mean 'clap'?"),
        (["attributes", "algorithm.batch=0"], "batch"),
        (["digits"], "no option --data"),
        (["sound-data", "--lr", "1.0"], "no option --lr"),
        (["sound-data", "train.lr=1.0"], "does not use train.lr"),
        (["sound-data", "run.train=0"], "at least 1"),
    ],
)
def test_refusals(options: list[str], text: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", *options, "--data", str(data), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


def test_digits_make_a_loadable_pipeline(tmp_path: Path) -> None:
    from gencontrol.pipelines import ClassToImagePipeline

    run = tmp_path / "run"
    sizes = ["model.dim=16", "model.depth=1", "model.heads=2", "model.patch=4", "process.steps=2"]
    evaluation = ["algorithm.eval_items=2", "algorithm.eval_samples=10", "algorithm.eval_steps=1"]
    command = ["pretrain", "digits", "--output", str(run), "--threads", "1", "--steps", "2", "--batch", "4"]
    assert main([*command, "algorithm.teach=2", *sizes, *evaluation]) == 0
    pipe = ClassToImagePipeline.from_pretrained(run / "final")
    assert pipe.transformer.config.patch == 4 and pipe.spec.steps == 2
    assert len(pipe([3, None], seed=0).images) == 2
    assert (run / "samples" / "step_00000002" / "samples.png").exists()
    assert "ClassToImagePipeline" in (run / "final" / "README.md").read_text()
    table = load_toml(run / "config.toml")
    assert table["train"]["lr_schedule"] == "cosine" and table["model"]["dim"] == 16


def test_digits_refuse_sizes_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, text in (("model.patch=3", "divide"), ("model.heads=5", "2·heads")):
        assert main(["pretrain", "digits", "--output", str(tmp_path / "run"), option]) == 2
        assert text in capsys.readouterr().err


def test_sound_data_goes_to_the_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def build(folder: str, **options: object) -> Path:
        seen.update(folder=folder, **options)
        return Path(folder)

    monkeypatch.setattr("gencontrol.recipes.sound.data.dataset.build_sound_dataset", build)
    command = ["pretrain", "sound-data", "--data", str(tmp_path / "d"), "--seed", "4", "run.train=7", "run.workers=1"]
    assert main(command) == 0
    assert seen == {"folder": str(tmp_path / "d"), "train": 7, "val": 500, "test": 1000, "seed": 4, "workers": 1}
