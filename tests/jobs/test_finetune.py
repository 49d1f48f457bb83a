"""`finetune` from command to loadable model, with a tiny real pipeline; what is refused before anything loads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from gencontrol.cli import main
from gencontrol.config import load_toml
from gencontrol.errors import UsageError

REWARD = '''
import pathlib
import signal

import torch


class Loud:
    """Item reward: mean square of the sound."""

    name, kind, differentiable = "loud", "item", True

    def __call__(self, samples, context):
        from gencontrol.types import RewardOut

        values = samples.square().mean(-1)
        return RewardOut(values, torch.isfinite(values))


def broken(samples, context):
    raise RuntimeError("no judge today")


calls = 0


def interrupted(samples, context):
    """Press Ctrl-C in the second round, once."""
    global calls
    calls += 1
    flag = pathlib.Path(__file__).parent / "interrupt"
    if calls == 2 and flag.exists():
        flag.unlink()
        signal.raise_signal(signal.SIGINT)
    return samples.square().mean(-1)
'''

SMALL = [
    *("--batch", "4", "--micro-batch", "8", "--lr", "1e-3", "--save-every", "1", "--threads", "1", "--eval-every", "2"),
    *("algorithm.demo_steps=2", "algorithm.eval_steps=2", "algorithm.updates_per_round=2"),
]


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a user reward in an importable module."""
    module = f"judge_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    return module


def _command(model: Path, prompts: Path, judge: str, output: Path, steps: int = 2) -> list[str]:
    names = ["--model", str(model), "--prompts", str(prompts), "--reward", f"{judge}:Loud", "--output", str(output)]
    return ["finetune", *names, "--steps", str(steps), "--lora-rank", "2", *SMALL]


def test_finetune_writes_everything_and_resumes(
    tiny_model: Path, prompts: Path, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gencontrol.pipelines import TextToAudioPipeline

    run = tmp_path / "run"
    assert main(_command(tiny_model, prompts, judge, run)) == 0
    first = capsys.readouterr()
    assert str(run / "report.html") in first.out
    config = load_toml(run / "config.toml")
    assert config["run"]["lora_rank"] == 2
    assert config["algorithm"]["demo_steps"] == 2
    assert (run / "samples" / "step_00000000" / "base_00.wav").exists()
    assert (run / "samples" / "step_00000002" / "tuned_03.wav").exists()
    assert "Reward gain over the base" in (run / "report.html").read_text()
    assert "How to load" in (run / "final" / "README.md").read_text()
    assert (run / "final" / "lora" / "pytorch_lora_weights.safetensors").exists()

    tuned = TextToAudioPipeline.from_pretrained(run / "final")
    base = TextToAudioPipeline.from_pretrained(tiny_model)
    latents = [pipe("a bell", seed=0, output_type="latent").audios for pipe in (base, tuned)]
    assert not torch.equal(*latents), "training changed nothing"
    base.load_lora_weights(run / "final" / "lora")
    # the adapter and the merged weights are the same function up to the rounding of one matrix sum (fp32)
    assert torch.allclose(base("a bell", seed=0, output_type="latent").audios, latents[1], atol=1e-4)

    assert main(_command(tiny_model, prompts, judge, run)) == 0
    assert "finished" in capsys.readouterr().err
    assert main(_command(tiny_model, prompts, judge, run, steps=3)) == 0
    assert "resumed from step 2" in capsys.readouterr().err
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]
    assert len(json.loads((run / "run.json").read_text())["starts"]) == 3


def test_bundled_model_and_clap_with_the_default_rank(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """The README's first command, in two tiny steps: all choices but the sizes of the rounds are the defaults."""
    from safetensors.torch import load_file

    from gencontrol.pipelines import TextToAudioPipeline

    run = tmp_path / "run"
    sizes = ["--steps", "2", "--batch", "2", "--eval-every", "0", "--threads", "1"]
    rounds = ["algorithm.demo_steps=2", "algorithm.eval_steps=2", "algorithm.updates_per_round=1"]
    assert main(["finetune", "--reward", "clap", "--output", str(run), *sizes, *rounds]) == 0
    assert not [str(w.message) for w in recwarn if "peft" in str(w.message)]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(row["reward/valid_fraction"] == 1.0 for row in rows)
    weights = load_file(run / "final" / "lora" / "pytorch_lora_weights.safetensors")
    down = {name: value for name, value in weights.items() if name.endswith("lora_A.weight")}
    assert down and all(value.shape[0] == 16 for value in down.values())
    assert all(bool(value.any()) for name, value in weights.items() if name.endswith("lora_B.weight"))
    tuned, base = (
        TextToAudioPipeline.from_pretrained(source).network.state_dict() for source in (run / "final", "bundled")
    )
    changed = {name for name in base if not torch.equal(tuned[name], base[name])}
    assert changed == {name.removeprefix("transformer.").replace("lora_A.", "") for name in down}


def test_the_saved_configuration_repeats_the_run(tiny_model: Path, prompts: Path, judge: str, tmp_path: Path) -> None:
    assert main([*_command(tiny_model, prompts, judge, tmp_path / "a", steps=1), "--eval-every", "0"]) == 0
    assert main(["finetune", "--config", str(tmp_path / "a" / "config.toml"), "--output", str(tmp_path / "b")]) == 0
    rows = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in "ab"]
    assert rows[0]["loss/total"] == rows[1]["loss/total"]
    assert rows[0]["reward/mean"] == rows[1]["reward/mean"]


@pytest.mark.parametrize("algorithm", ["dragon", "rwr"])
def test_full_tuning_of_every_algorithm(
    algorithm: str, tiny_model: Path, prompts: Path, judge: str, tmp_path: Path
) -> None:
    command = _command(tiny_model, prompts, judge, tmp_path / "run", steps=1)
    assert main([*command, "--algorithm", algorithm, "--lora_rank", "0", "--eval_every", "0"]) == 0
    assert not (tmp_path / "run" / "final" / "lora").exists()


def test_a_failing_reward_is_exit_code_5(
    tiny_model: Path, prompts: Path, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = _command(tiny_model, prompts, judge, tmp_path / "run")
    assert main([word.replace(":Loud", ":broken") for word in command]) == 5
    assert "no judge today" in capsys.readouterr().err.splitlines()[-1]


def test_a_used_folder_with_other_options_is_refused(
    tiny_model: Path, prompts: Path, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*_command(tiny_model, prompts, judge, tmp_path / "run", steps=1), "--eval-every", "0"]
    assert main(command) == 0
    capsys.readouterr()
    assert main([*command, "algorithm.loss=dpo"]) == 2
    assert "algorithm.loss was 'kto', now 'dpo'" in capsys.readouterr().err
    assert main([*command, "--fresh"]) == 2
    assert "not empty" in capsys.readouterr().err
    prompts.write_text("quite another prompt\n")
    assert main(command) == 2
    assert "run.prompts_hash" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("algorithm", "text"),
    [("rwr", "holds a run of dragon, this one is rwr; name another --output."), ("dragon", "; and 3 more. Name")],
)
def test_a_refusal_of_many_differences_stays_short(algorithm: str, text: str, tmp_path: Path) -> None:
    """Another algorithm has other options altogether: naming it is enough."""
    from gencontrol.config import dump_toml
    from gencontrol.train.run_folder import changed_settings

    options = {f"option{i}": i for i in range(9)}
    old = {"run": {"algorithm": "dragon"}, "algorithm": options}
    (tmp_path / "config.toml").write_text(dump_toml(old))
    new = {"run": {"algorithm": algorithm}, "algorithm": {name: value + 1 for name, value in options.items()}}
    with pytest.raises(UsageError, match=re.escape(text)):
        changed_settings(tmp_path, new, ())


# ---------------------------------------------------------------- refused before loading


def test_bad_inputs(
    tiny_model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gencontrol.jobs.finetune.load_pipeline", lambda *_, **__: pytest.fail("something was loaded"))
    (tmp_path / "silent").mkdir()
    (tmp_path / "silent" / "notes.txt").write_text("no sound")
    (tmp_path / "nomodel").mkdir()
    good = {"--model": tiny_model, "--prompts": prompts, "--output": tmp_path / "run", "--reward": "spectral-centroid"}
    cases: list[tuple[dict[str, object], int, str]] = [
        ({"--reward": "clapp"}, 2, "Did you mean 'clap'?"),
        ({"--reward": "nowhere.module:Reward"}, 2, "PYTHONPATH"),
        ({"--reward": "ocr:0.5"}, 2, "--reward ocr does not score audios"),
        ({"--model": "bundled-image", "--reward": "clap"}, 2, "choose one of compositional, ocr"),
        ({"--reference": tmp_path / "silent"}, 2, "holds no sound"),
        ({"--reference": tmp_path / "absent"}, 2, "does not exist"),
        ({"--reward-model": tmp_path / "absent"}, 2, "does not exist"),
        ({"--model": tmp_path / "nomodel"}, 2, "model_index.json"),
        ({"--model": "./absent"}, 2, "does not exist"),
        ({"--model": "bundled-imag"}, 2, "Did you mean 'bundled-image'?"),
        ({"--prompts": tmp_path / "absent.txt"}, 2, "does not exist"),
        ({"--output": prompts}, 2, "is a file"),
        ({"--output": tmp_path / "silent"}, 2, "other files"),
        ({"--lr": -1}, 2, "lr = -1"),
        ({"--lora-rank": -3}, 2, "lora_rank"),
        ({"--set": "algorithm.betta=1"}, 2, "Did you mean 'beta'?"),
        ({"--set": "algorithm.generations=1"}, 2, "generations"),
        ({"--resume": ""}, 3, "no checkpoint"),
    ]
    if not torch.cuda.is_available():
        cases.append(({"--device": "cuda"}, 6, "no CUDA device"))
    for change, code, text in cases:
        words = [str(word) for pair in {**good, **change}.items() for word in pair if word != ""]
        assert main(["finetune", *words]) == code, change
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1, (change, error)
    assert not (tmp_path / "run").exists()


def test_dry_run_loads_and_writes_nothing(
    tiny_model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gencontrol.jobs.finetune.load_pipeline", lambda *_, **__: pytest.fail("something was loaded"))
    names = ["--model", str(tiny_model), "--prompts", str(prompts), "--output", str(tmp_path / "run")]
    options = ["--reward", "clap", "--steps", "10", "--batch", "4", "--lora-rank", "2", "--dry-run", "algorithm.beta=7"]
    assert main(["finetune", *names, *options]) == 0
    out = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert "4 prompts × 2 samples = 8 scored samples" in out
    assert "10 steps = 80 samples, 80 updates" in out
    from gencontrol.jobs.setup.settings import SECTIONS, merge

    again = tmp_path / "again.toml"
    again.write_text(out[out.index("[run]") :])
    table = merge(str(again), {}, [])
    assert set(table) == set(SECTIONS)
    assert table["algorithm"]["beta"] == 7 and table["train"]["steps"] == 10


def test_planned_sizes_are_the_real_ones(tiny_model: Path) -> None:
    from gencontrol.jobs.setup.models import count_parameters
    from gencontrol.models.roles import LoraConfig, Roles
    from gencontrol.pipelines import TextToAudioPipeline

    pipe = TextToAudioPipeline.from_pretrained(tiny_model)
    network = sum(p.numel() for p in pipe.network.state_dict().values())
    full = count_parameters(tiny_model, 0)
    assert (full.network, full.trainable) == (network, network)
    planned = count_parameters(tiny_model, 3)
    roles = Roles(pipe.network, ("policy", "ref"), LoraConfig(3))
    assert planned.trainable == sum(p.numel() for p in roles.trainable())


def test_a_crafted_header_is_refused(tmp_path: Path) -> None:
    from gencontrol.errors import UsageError
    from gencontrol.jobs.setup.models import read_shapes

    for content in (
        b"",
        b"\xff" * 8 + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (9).to_bytes(8, "little") + b'{"a":1}  ',
    ):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(UsageError, match="not a safetensors file"):
            read_shapes(tmp_path / "x.safetensors")


# ---------------------------------------------------------------- Ctrl-C


def test_interrupt_saves_and_the_same_command_goes_on(
    tiny_model: Path, prompts: Path, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*_command(tiny_model, prompts, judge, tmp_path / "run", steps=3), "--save-every", "100"]
    command = [word.replace(":Loud", ":interrupted") for word in command] + ["--eval-every", "0"]
    (tmp_path / "interrupt").touch()
    assert main(command) == 130
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert last.startswith("gencontrol: error: ") and "same command" in last
    assert "Traceback" not in error
    assert main(command) == 0
    assert "resumed from step 1" in capsys.readouterr().err
