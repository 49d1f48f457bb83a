"""The Python face: `gencontrol.finetune` and `gencontrol.sample` with names and with objects of the caller."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gencontrol
from gencontrol.config import load_toml
from gencontrol.errors import UsageError
from gencontrol.types import RewardContext, RewardOut

SMALL: dict[str, Any] = {
    "steps": 1, "lora_rank": 2, "prompts_per_round": 2, "micro_batch": 4, "eval_every": 0, "threads": 1,
    "demo_steps": 2, "eval_steps": 2, "updates_per_round": 1, "eval_samples": 1,
}  # fmt: skip
PROMPTS = ["a bell", "two drums", "rain"]


class Red:
    """Item reward: mean of the first colour."""

    name, kind, differentiable = "red", "item", True

    def __call__(self, samples: Any, context: RewardContext) -> RewardOut:
        values = samples[:, 0].mean((1, 2))
        return RewardOut(values, torch.isfinite(values))


def loud(samples: Any, context: RewardContext) -> torch.Tensor:
    values: torch.Tensor = samples.square().flatten(1).mean(1)
    return values


@pytest.fixture
def diffusion() -> Any:
    """A pipeline of diffusers with random weights."""
    from tests.helpers.fixtures_images import tiny_sd

    return tiny_sd()


def _weights(pipeline: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in pipeline.unet.state_dict().items()}


def test_a_loaded_diffusers_pipeline_and_an_object_as_reward(
    diffusion: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run folder, card and report as by the command line; the same call with the same objects goes on."""
    before = _weights(diffusion)
    call = {"algorithm": "rwr", "prompts": PROMPTS, "output": tmp_path / "run", **SMALL}
    result = gencontrol.finetune(diffusion, Red(), **call)
    after = _weights(diffusion)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert result.folder == tmp_path / "run" and result.metrics["step"] == 1
    config = load_toml(result.folder / "config.toml")["run"]
    assert config["model"] == "a loaded StableDiffusionPipeline" and config["reward"] == [f"a loaded {Red.__name__}"]
    assert config["prompts"] == "3 texts" and config["algorithm"] == "rwr"
    for name in ("report.html", "run.json", "final/README.md", "final/lora/pytorch_lora_weights.safetensors"):
        assert (result.folder / name).exists(), name
    tuned = result.pipeline
    assert type(tuned).__name__ == "TextToImagePipeline"
    moved = tuned.network.state_dict()
    assert any(not torch.equal(before[name], moved[name]) for name in before)

    again = gencontrol.finetune(diffusion, Red(), **call | {"steps": 2})
    assert "resumed from step 1" in capsys.readouterr().err
    assert again.metrics["step"] == 2
    with pytest.raises(UsageError, match="run.prompts_hash"):
        gencontrol.finetune(diffusion, Red(), **call | {"steps": 2, "prompts": ["other", "two texts", "three"]})
    with pytest.raises(UsageError, match=r"run.reward was \['a loaded Red'\], now \["):
        gencontrol.finetune(diffusion, loud, **call | {"steps": 2})


def test_names_functions_and_weights_are_summed(tiny_model: Path, tmp_path: Path) -> None:
    """A folder as model; a registered reward with a weight beside a function."""
    rewards = ["spectral-centroid:0.5", loud]
    result = gencontrol.finetune(
        str(tiny_model), rewards, algorithm="rwr", prompts=PROMPTS, output=tmp_path / "run", **SMALL
    )
    assert load_toml(result.folder / "config.toml")["run"]["reward"] == ["spectral-centroid:0.5", f"{__name__}:loud"]
    assert {"reward/mean", "loss/total"} <= result.metrics.keys()


def test_the_command_line_and_the_function_are_one_job(
    tiny_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal settings, equal metrics, and a folder that either goes on with."""
    from gencontrol.cli import main

    words = [word for key, value in SMALL.items() for word in (f"--{key}", str(value)) if key != "eval_steps"]
    words += [
        "algorithm.eval_steps=2",
        "--algorithm",
        "rwr",
        "--prompts",
        str(prompts),
        "--reward",
        "spectral-centroid",
    ]
    assert main(["finetune", "--model", str(tiny_model), "--output", str(tmp_path / "a"), *words]) == 0
    call: dict[str, Any] = {"algorithm": "rwr", "prompts": prompts, **SMALL}
    result = gencontrol.finetune(tiny_model, "spectral-centroid", output=tmp_path / "b", **call)
    rows = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in "ab"]
    for name in ("loss/total", "reward/mean", "grad_norm", "lr"):
        assert rows[0][name] == rows[1][name], name
    assert result.metrics == rows[1]
    assert load_toml(tmp_path / "a/config.toml")["train"] == load_toml(tmp_path / "b/config.toml")["train"]
    gone_on = gencontrol.finetune(tiny_model, "spectral-centroid", output=tmp_path / "a", **call | {"steps": 2})
    assert gone_on.metrics["step"] == 2


OUTSIDE = '''
from gencontrol.algorithms.matching.rwr import RewardWeightedRegression


class Mine(RewardWeightedRegression):
    """Keep all of rwr, under a name of its own."""

    name = title = "mine"
'''


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module with an algorithm."""
    module = f"outside_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return module


def test_an_algorithm_from_outside(
    outside: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its class and by its dotted name: one run, which either goes on with."""
    import importlib

    from gencontrol.cli import main

    kind = importlib.import_module(outside).Mine
    call: dict[str, Any] = {"prompts": PROMPTS, "output": tmp_path / "run", **SMALL}
    result = gencontrol.finetune(tiny_model, "spectral-centroid", algorithm=kind, **call)
    assert load_toml(result.folder / "config.toml")["run"]["algorithm"] == f"{outside}:Mine"
    gencontrol.finetune(tiny_model, "spectral-centroid", algorithm=f"{outside}:Mine", **call | {"steps": 2})
    assert "resumed from step 1" in capsys.readouterr().err
    assert main(["finetune", "--algorithm", f"{outside}:Mine", "--reward", "spectral-centroid", "--dry-run"]) == 0
    assert f"plan: {outside}:Mine" in capsys.readouterr().out
    assert main(["finetune", "--algorithm", f"{outside}:Mine", "--help"]) == 0
    assert "--demo-steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: gencontrol.finetune("bundled", "clap", algorithm=dict), "'builtins:dict' has no Config"),
        (lambda: gencontrol.finetune("bundled", "clap", algorithm="collections:OrderedDict"), "has no Config"),
        (lambda: gencontrol.finetune("bundled", "clap", algorithm="dragom"), "Did you mean 'dragon'"),
        (lambda: gencontrol.finetune("bundled", "clap", stepz=3), "no option 'stepz'. Did you mean 'steps'"),
        (lambda: gencontrol.finetune("bundled", "clap", steps=0), r"\[train\] steps = 0; expected at least 1"),
        (lambda: gencontrol.finetune("bundled", 3), "reward 'int' is a int"),
        (lambda: gencontrol.finetune(3, "clap"), "a int; this takes"),
        (lambda: gencontrol.sample("a", nmu=3), "Did you mean 'num'"),
        (lambda: gencontrol.sample(" "), "no prompt"),
        (lambda: gencontrol.pretrain("flov"), "Did you mean 'flow'"),
    ],
)
def test_refusals_are_one_line(
    call: Callable[[], Any], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_option_of_two_sections_is_named_by_its_section() -> None:
    with pytest.raises(UsageError, match="write train__steps or algorithm__steps"):
        gencontrol.finetune("bundled-image", "ocr", algorithm="ctrl", steps=3)


def test_sample_draws_from_a_loaded_pipeline(diffusion: Any, tmp_path: Path) -> None:
    result = gencontrol.sample(["a", "b"], diffusion, reward=Red(), num=1, steps=2, output=tmp_path / "out")
    assert [row["prompt"] for row in result.items] == ["a", "b"] and len(result.samples) == 2
    assert all(row["reward"] == pytest.approx(float(s[0].mean())) for row, s in zip(result.items, result.samples))
    assert json.loads((tmp_path / "out/samples.json").read_text())["model"] == "a loaded StableDiffusionPipeline"


def test_the_package_says_its_functions() -> None:
    assert {"finetune", "sample", "pretrain"} <= set(gencontrol.__all__)
    assert all(callable(getattr(gencontrol, name)) for name in gencontrol.__all__ if name != "__version__")
    with pytest.raises(AttributeError):
        gencontrol.finetun  # type: ignore[attr-defined]  # noqa: B018


DEPTH = '''
import sys
from pathlib import Path

import gencontrol
from gencontrol.algorithms.matching.rwr import RewardWeightedRegression

HOME = Path(gencontrol.__file__).parent
SEEN = []


class Deep(RewardWeightedRegression):
    """Notes who stands between `main` and the loss."""

    def loss(self, micro, ctx):
        frame, found = sys._getframe(), []
        while frame is not None and frame.f_code.co_name != "test_eight_frames_of_ours_lead_to_the_loss":
            if HOME in Path(frame.f_code.co_filename).parents or frame.f_code is type(self).loss.__code__:
                found.append(frame.f_code.co_name)
            frame = frame.f_back
        SEEN.append(found[::-1])
        return super().loss(micro, ctx)
'''


def test_eight_frames_of_ours_lead_to_the_loss(
    tiny_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    from gencontrol.cli import main

    (tmp_path / "deep_algorithm.py").write_text(DEPTH)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["--algorithm", "deep_algorithm:Deep", "--model", str(tiny_model), "--prompts", str(prompts)]
    words += ["--reward", "spectral-centroid", "--output", str(tmp_path / "run"), "--eval-every", "0"]
    words += ["--steps", "1", "--prompts-per-round", "2", "--demo-steps", "2", "--threads", "1"]
    assert main(["finetune", *words]) == 0
    seen = importlib.import_module("deep_algorithm").SEEN
    assert seen and all(frames[0] == "main" and frames[-1] == "loss" and len(frames) <= 8 for frames in seen), seen[0]


def test_raft_of_the_examples_appears_in_card_and_report(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method of forty lines outside the package: its class attributes are all that card and report know of it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    result = gencontrol.finetune(
        tiny_model, "spectral-centroid", algorithm="raft:Raft", prompts=PROMPTS, output=tmp_path / "run", **SMALL
    )
    card = (result.folder / "final" / "README.md").read_text(encoding="utf-8")
    report = (result.folder / "report.html").read_text(encoding="utf-8")
    for text in (card, report):
        assert "RAFT, reward-ranked fine-tuning" in text
    assert "2304.06767" in card
