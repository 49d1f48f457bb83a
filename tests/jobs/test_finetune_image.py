"""`finetune` and `sample` on a text-to-image model: the pipeline is chosen by the folder, pictures reach the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gencontrol.cli import main
from gencontrol.config import load_toml
from gencontrol.errors import UsageError
from gencontrol.jobs.setup.models import medium_of
from tests.helpers.fixtures_scenes import tiny_text_to_image

JUDGE = '''
import torch


def red(samples, context):
    """Item reward: mean of the red channel."""
    return samples[:, 0].mean((1, 2))


def full(samples, context):
    if len(samples) > 2:  # more than the evaluation asks for
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    return samples[:, 0].mean((1, 2))


def huge(samples, context):
    return torch.empty(10**15)
'''
SMALL = [
    *("--batch", "2", "--micro-batch", "4", "--lr", "1e-2", "--threads", "1", "--eval-every", "2", "--steps", "2"),
    *("--lora-rank", "2", "algorithm.demo_steps=2", "algorithm.eval_steps=2", "algorithm.updates_per_round=1"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text_to_image(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of user rewards in an importable module."""
    module = f"judge_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return module


def command(model: Path, judge: str, output: Path, *more: str) -> list[str]:
    names = ["--model", str(model), "--reward", f"{judge}:red", "--algorithm", "rwr", "--output", str(output)]
    return ["finetune", *names, *SMALL, *more]


def test_finetune_writes_pictures_report_card_and_a_model(model: Path, judge: str, tmp_path: Path) -> None:
    from gencontrol.pipelines import TextToImagePipeline

    run = tmp_path / "run"
    assert main(command(model, judge, run, "--gradient-checkpointing", "run.eval_count=3")) == 0
    config = load_toml(run / "config.toml")
    assert config["run"]["gradient_checkpointing"] is True
    samples = run / "samples" / "step_00000002"
    rows = json.loads((samples / "prompts.json").read_text())
    assert [row["place"] for row in rows] == ["", "", "", "best", "median", "worst"]
    gains = [row["tuned_reward"] - row["base_reward"] for row in rows]
    assert gains[3:] == sorted(gains[:3], reverse=True)
    assert all((samples / f"{side}_{i:02d}.png").is_file() for i in range(6) for side in ("base", "tuned"))
    # the base's row is the same at every step: same prompts, same noise
    first = run / "samples" / "step_00000000"
    assert all(
        (first / f"base_{i:02d}.png").read_bytes() == (samples / f"base_{i:02d}.png").read_bytes() for i in range(3)
    )
    page = (run / "report.html").read_text()
    assert page.count("data:image/png") >= 6 and 'class="grid"' in page and "Pictures show time" not in page
    card = (run / "final" / "README.md").read_text()
    assert "text-to-image" in card and "TextToImagePipeline" in card and "sound" not in card
    pipe = TextToImagePipeline.from_pretrained(run / "final")
    base = TextToImagePipeline.from_pretrained(model)
    base.load_lora_weights(run / "final" / "lora")
    ours, theirs = (p("a red circle", seed=0, output_type="np").images for p in (pipe, base))
    assert abs(ours - theirs).max() < 1e-4  # merged in fp32


def test_sample_writes_png_and_scores(model: Path, judge: str, tmp_path: Path) -> None:
    call = ["sample", "--model", str(model), "--prompt", "a red circle", "--num", "2", "--output", str(tmp_path / "s")]
    assert main([*call, "--reward", f"{judge}:red"]) == 0
    table = json.loads((tmp_path / "s" / "samples.json").read_text())
    assert [row["files"] for row in table["samples"]] == [["000_00.png"], ["000_01.png"]]
    assert all(0 <= row["reward"] <= 1 for row in table["samples"]) and "sampling_rate" not in table


def test_default_prompts_are_scenes(
    model: Path, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gencontrol.recipes.scenes.data.grammar import parse

    assert main(command(model, judge, tmp_path / "run", "--dry-run")) == 0
    assert "network" in capsys.readouterr().out
    from gencontrol.jobs.setup.prompts import bundled_prompts

    train, test = bundled_prompts("train", 40, "image"), bundled_prompts("test", 40, "image")
    assert [parse(text) for text in (*train, *test)] and not set(train) & set(test)


def test_what_a_model_makes_is_read_from_its_folder(model: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert medium_of(str(model), "auto") == "image" and medium_of(str(tiny_model), "auto") == "audio"
    assert medium_of("owner/name", "auto") is None and medium_of("owner/name", "image") == "image"
    with pytest.raises(UsageError, match="--task audio, but --model .* makes images"):
        medium_of(str(model), "audio")
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    with pytest.raises(UsageError, match="is a DDPMPipeline; this takes"):
        medium_of(str(tmp_path), "auto")


def test_refusals_are_one_line(model: Path, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        assert main(list(arguments)) != 0
        return capsys.readouterr().err.strip().splitlines()[-1]

    hub = said("finetune", "--model", "owner/name", "--reward", f"{judge}:red", "--output", str(tmp_path / "a"))
    assert "give --prompts FILE, or --task image or audio" in hub
    groups = said(*command(model, judge, tmp_path / "b", "algorithm.generations=0"))
    assert "generations = 0; expected at least 1" in groups


@pytest.mark.parametrize("kind", ["full", "huge"])
def test_out_of_memory_in_a_reward_is_that_of_training(
    kind: str, model: Path, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 6 and what to lower, on an accelerator's error and on a real one of the CPU; the reward is named."""
    words = command(model, judge, tmp_path / "c", "run.eval_count=2")
    assert main([word.replace(":red", f":{kind}") for word in words]) == 6
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"out of memory in reward '{judge}:{kind}'" in line
    assert "--micro-batch" in line and "--gradient-checkpointing" in line


def test_lora_of_another_base_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gencontrol.models.roles import LoraConfig, Roles
    from gencontrol.pipelines import TextToImagePipeline
    from tests.helpers.fixtures_images import tiny_sd3

    other = TextToImagePipeline(tiny_sd3())
    Roles(other.denoiser.network, ("policy", "ref"), LoraConfig(2)).save_lora(tmp_path / "lora")
    call = ["sample", "--model", str(model), "--prompt", "a", "--output", str(tmp_path / "s")]
    assert main([*call, "--lora", str(tmp_path / "lora")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "does not fit this PatchTransformer" in line and "use the model it was trained for" in line
