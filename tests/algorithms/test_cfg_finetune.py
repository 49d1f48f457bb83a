"""Classifier-free fine-tuning: the loss, dropout, the Trainer's contract, labels learnt, saving and bad data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

from gencontrol.algorithms.base import StepContext
from gencontrol.algorithms.offline.cfg_finetune import CfgFinetune, CfgFinetuneConfig
from gencontrol.bench.base import Loop, run_in_memory
from gencontrol.errors import UsageError
from gencontrol.models.roles import Roles
from gencontrol.sampling import cfg, sample
from gencontrol.sampling.control.files import load_control
from gencontrol.testing.algorithm import AlgorithmContract
from tests.helpers.dragon_worlds import PROMPTS, SIZE, FirstAxis, make_task

CTX = StepContext(seed=0, step=0, micro_batch=1000)
COUNT = 12


def write_labelled(folder: Path) -> Path:
    """Vectors near +2 (label up) or −2 (label down) on the first axis."""
    generator = torch.Generator().manual_seed(3)
    lines = []
    for i in range(COUNT):
        latent = 0.2 * torch.randn(SIZE, generator=generator)
        latent[0] += 2.0 if i % 2 else -2.0
        save_file({"latent": latent}, str(folder / f"{i}.safetensors"))
        side = {"side": "up" if i % 2 else "down"}
        lines.append(json.dumps({"prompt": PROMPTS[0], "file": f"{i}.safetensors", "labels": side}))
    path = folder / "labels.jsonl"
    path.write_text("\n".join(lines))
    return path


def make_cfg(data: Path, **options: Any) -> CfgFinetune:
    small = {
        "batch": 6,
        "updates_per_round": 2,
        "eval_steps": 4,
        "ema_decay": 0.9,
        "inject": "residual",
        "dropout": 0.3,
    }
    config = CfgFinetuneConfig(**(small | options), data=str(data))
    task = dataclasses.replace(make_task(), uncond=torch.zeros(1, len(PROMPTS)))
    task = CfgFinetune.prepare(task, FirstAxis(), config)
    return CfgFinetune(task, FirstAxis(), config, roles=Roles(task.denoiser.network), seed=0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_labelled(tmp_path)


class TestContract(AlgorithmContract):
    """Labels, dropout, guidance in the evaluation."""

    folder: ClassVar[Path]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def files(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        TestContract.folder = write_labelled(tmp_path_factory.mktemp("labels"))

    def make(self) -> CfgFinetune:
        return make_cfg(self.folder, guidance_scale=2.0)


def test_the_condition_has_no_effect_at_the_start(data: Path) -> None:
    algorithm = make_cfg(data)
    (micro,) = algorithm.minibatches(algorithm.collect(CTX).data, 0, CTX)
    t = micro.t[:, None]
    xt = (1 - t) * micro.latents + t * micro.noise
    base = make_task().denoiser.network(xt, micro.t, micro.cond["base"])
    expected = (base - (micro.noise - micro.latents)).square().mean(1).double().sum()
    torch.testing.assert_close(algorithm.loss(micro, CTX).total, expected, rtol=1e-5, atol=1e-5)


def test_dropped_items_lose_prompt_and_label(data: Path) -> None:
    algorithm = make_cfg(data, batch=600, updates_per_round=1)
    (micro,) = algorithm.minibatches(algorithm.collect(CTX).data, 0, CTX)
    names = algorithm.network.labels.attributes["side"]
    assert names == ("down", "up", "none")
    dropped = micro.cond["labels"][:, 0] == 2
    assert float(dropped.float().mean()) == pytest.approx(0.3, abs=0.06)  # three standard errors
    assert micro.cond["base"][dropped].abs().sum() == 0 and bool((micro.cond["base"][~dropped][:, 0] == 1).all())
    assert torch.equal(micro.latents[~dropped, 0] > 0, micro.cond["labels"][~dropped, 0] == 1)


def test_labels_are_learnt(data: Path, tmp_path: Path) -> None:
    """Samples follow the label, guidance strengthens it, and the saved control samples the same."""
    algorithm = make_cfg(data, batch=48, updates_per_round=4, ema_decay=0.0)
    run_in_memory(algorithm, 30, Loop(1e-2), seed=0)
    task = algorithm.task

    def mean(label: str, scale: float) -> float:
        cond = task.encode([f"{PROMPTS[0]} | side={label}"] * 200)
        model = cfg(task.denoiser, scale, task.uncond)
        with torch.no_grad():
            return float(
                sample(model, (200, SIZE), steps=10, generator=torch.Generator().manual_seed(0), cond=cond)[:, 0].mean()
            )

    assert mean("up", 1.0) > 1.0 and mean("down", 1.0) < -1.0
    assert mean("up", 2.0) > mean("up", 1.0)
    algorithm.save_final(tmp_path / "final")
    loaded, plan = load_control(make_task().denoiser, tmp_path / "final/control")
    assert len(plan.grid) == 5
    for name, value in algorithm.network.own_parameters().items():
        assert torch.equal(dict(loaded.network.named_parameters())[name], value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({}, "line 1: labels {}"),
        ("up", "line 1: labels 'up'"),
        ({"side": 3}, "line 1: labels"),
        ({"side": "none"}, "line 1: label 'none'"),
        ({"side": "a=b"}, "line 1: label 'a=b'"),
    ],
)
def test_bad_labels_are_named(data: Path, labels: Any, message: str) -> None:
    lines = data.read_text().splitlines()
    data.write_text("\n".join([json.dumps(json.loads(lines[0]) | {"labels": labels}), *lines[1:]]))
    with pytest.raises(UsageError) as caught:
        make_cfg(data)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_labels_that_the_model_does_not_have_are_named(data: Path) -> None:
    first = make_cfg(data)
    lines = data.read_text().splitlines()
    data.write_text(json.dumps(json.loads(lines[0]) | {"labels": {"side": "left"}}))
    with pytest.raises(UsageError, match="'side' has no value 'left'"):
        CfgFinetune(
            dataclasses.replace(first.base_task),
            FirstAxis(),
            CfgFinetuneConfig(data=str(data)),
            roles=first.roles,
            seed=0,
        )


def test_dropout_needs_an_empty_condition(data: Path) -> None:
    config = CfgFinetuneConfig(data=str(data), inject="residual")
    task = CfgFinetune.prepare(make_task(), FirstAxis(), config)
    with pytest.raises(UsageError, match=r"dropout = 0\.1: this model has no unconditional branch"):
        CfgFinetune(task, FirstAxis(), config, roles=Roles(task.denoiser.network), seed=0)


@pytest.mark.parametrize("options", [{"dropout": 1.0}, {"inject": "here"}, {"batch": 0}])
def test_options_out_of_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        CfgFinetuneConfig(**options)
