"""CTRL through the image pipelines: two steps with LoRA on every family, `load_control`, calls with labels.

By default each family meets one way of entering; GENCONTROL_FULL=1 runs both.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gencontrol.algorithms.ctrl.ctrl import Ctrl, CtrlConfig
from gencontrol.errors import UsageError
from gencontrol.models.conditions.base import conditioned
from gencontrol.models.roles import LoraConfig, Roles
from gencontrol.pipelines import TextToImagePipeline
from gencontrol.pipelines.control import parse_labels
from gencontrol.rewards.image.classifier import ClassifierReward
from gencontrol.train.trainer import TrainConfig, Trainer
from tests.helpers.fixtures_images import FAMILIES
from tests.helpers.fixtures_scenes import classifier, tiny_text_to_image

PROMPTS = ["a red cube", "green"]
SHAPES, SIZES = ("circle", "square", "star"), ("small", "large")


def load(folder: Path) -> TextToImagePipeline:
    """The pipeline; FLUX, whose folder names no size, makes images of 16 pixels."""
    pipe = TextToImagePipeline.from_pretrained(folder)
    if pipe.backend.embeds_scale:
        pipe.backend.pipe.default_sample_size = 8
    return pipe


def train(pipe: TextToImagePipeline, run: Path, *, rank: int = 2, **options: Any) -> Ctrl:
    """Two steps of CTRL with two attributes; final/ is written."""
    pixels = pipe.backend.size(None, None)[0]
    own = {"shape": classifier(SHAPES, pixels), "size": classifier(SIZES, pixels)}
    reward = ClassifierReward(reward_model=own, device="cpu")
    config = CtrlConfig(**({"prompts_per_round": 2, "steps": 3, "bound_samples": 2} | options))
    task = Ctrl.prepare(pipe.task(PROMPTS, PROMPTS[:1]), reward, config)
    lora = LoraConfig(rank) if rank else None
    whole = Ctrl.whole_parameters(config) if rank else ()
    roles = Roles(task.denoiser.network, Ctrl.role_names(config), lora, 0, whole)
    ctrl = Ctrl(task, reward, config, roles=roles, seed=0)
    metrics = Trainer(TrainConfig(steps=2, micro_batch=4, lr=1e-2, threads=1), run).fit(ctrl)["metrics"]
    assert metrics["step"] == 2 and metrics["health/skipped"] == 0 and metrics["grad_norm"] > 0
    return ctrl


def images(pipe: TextToImagePipeline, **given: Any) -> Tensor:
    """Latents of two images of one prompt."""
    call = {"seed": 3, "num_images_per_prompt": 2, "output_type": "latent", **given}
    return pipe(PROMPTS[0], **call).images


FULL = bool(os.environ.get("GENCONTROL_FULL"))
CASES = [
    (family, inject)
    for place, family in enumerate(FAMILIES)
    for turn, inject in enumerate(("residual", "time"))
    if FULL or place % 2 == turn
]


@pytest.mark.parametrize(("family", "inject"), CASES)
def test_two_steps_on_every_family(family: str, inject: str, tmp_path: Path) -> None:
    FAMILIES[family]().save_pretrained(tmp_path / "base")
    base = images(load(tmp_path / "base"), num_inference_steps=2)
    train(load(tmp_path / "base"), tmp_path / "run", inject=inject)
    pipe = load(tmp_path / "run" / "final")  # the base itself lies there
    assert torch.equal(images(pipe, num_inference_steps=2), base)
    pipe.load_control(tmp_path / "run")
    assert torch.equal(images(pipe, num_inference_steps=2), base)  # y = None, also with the control loaded
    found = images(pipe, y={"shape": "star", "size": "large"})
    assert found.isfinite().all() and not torch.equal(found, images(pipe, y={"shape": "star"}))
    assert torch.equal(images(pipe, y={"shape": "star"}, y_scale=0.0), images(pipe, y={"size": "small"}, y_scale=0.0))
    assert torch.equal(images(pipe, num_inference_steps=2), base)
    pipe.unload_control()
    assert torch.equal(images(pipe, num_inference_steps=2), base) and not pipe.get_list_adapters()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], TextToImagePipeline]:
    """Our own architecture with a trained residual control beside LoRA; each call loads it anew."""
    folder = tmp_path_factory.mktemp("control")
    tiny_text_to_image(folder / "base")
    train(load(folder / "base"), folder / "run")

    def make() -> TextToImagePipeline:
        pipe = load(folder / "base")
        pipe.load_control(folder / "run" / "final")
        return pipe

    return make


def test_pipeline_samples_the_trained_chain(tmp_path: Path) -> None:
    """The same noise through `sample_controlled` on the trained network."""
    from gencontrol.sampling.control.controlled import sample_controlled

    tiny_text_to_image(tmp_path / "base")
    ctrl = train(load(tmp_path / "base"), tmp_path / "run")
    pipe = load(tmp_path / "base")
    pipe.load_control(tmp_path / "run")
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    mine = pipe(PROMPTS, y={"shape": "star", "size": "small"}, generator=generators, output_type="latent").images
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    labels = conditioned(ctrl.base_task.denoiser).labels.encode([{"shape": "star", "size": "small"}]).expand(2, -1)
    with torch.no_grad():
        theirs = sample_controlled(
            ctrl.base_task.denoiser,
            ctrl.plan,
            tuple(mine.shape),
            labels=labels,
            cond=ctrl.base_task.encode(PROMPTS),
            uncond=ctrl.base_task.uncond,
            generator=generators,
        )
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


def test_two_strengths(run: Callable[[], TextToImagePipeline]) -> None:
    """u + g·(c − u) + w·(y − c): each strength moves the sample, w = 0 leaves the guided base."""
    pipe, label = run(), {"shape": "circle", "size": "large"}
    plain = images(pipe, y=label)
    assert torch.equal(plain, images(pipe, y=label, guidance_scale=1.0, y_scale=1.0))
    assert not torch.equal(plain, images(pipe, y=label, guidance_scale=4.0))
    assert not torch.equal(plain, images(pipe, y=label, y_scale=2.0))
    guided = images(pipe, y=label, guidance_scale=4.0, y_scale=0.0)
    assert torch.equal(guided, images(pipe, y={"size": "small"}, guidance_scale=4.0, y_scale=0.0))
    negative = images(pipe, y=label, guidance_scale=4.0, y_scale=0.0, negative_prompt="blue")
    assert not torch.equal(guided, negative)


def test_one_label_per_prompt(run: Callable[[], TextToImagePipeline]) -> None:
    pipe = run()
    labels = [{"shape": "star"}, {"shape": "circle"}]
    together = pipe(PROMPTS, y=labels, seed=[0, 1], output_type="latent").images
    for i in range(2):
        alone = pipe(PROMPTS[i], y=labels[i], seed=[i], output_type="latent").images
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)  # another batch size
    assert pipe.control_labels == {"shape": SHAPES, "size": SIZES}


def test_saving_leaves_the_control_out(run: Callable[[], TextToImagePipeline], tmp_path: Path) -> None:
    """The control's LoRA is no part of the base's weights."""
    pipe = run()
    assert pipe.get_active_adapters() == []
    pipe.save_pretrained(tmp_path)
    again = load(tmp_path)
    for key, value in again.network.state_dict().items():
        assert torch.equal(value, pipe.network.state_dict().get(key, pipe.network.state_dict().get(_inner(key))))


def _inner(key: str) -> str:
    layer, _, part = key.rpartition(".")
    return f"{layer}.base_layer.{part}"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"y": {"shap": "star"}}, "no attribute 'shap'. Did you mean 'shape'.*Attributes: shape, size"),
        ({"y": {"shape": "starr"}}, "no value 'starr'. Did you mean 'star'.*Values: circle, square, star"),
        ({"y": "star"}, "has the attributes shape, size; give a mapping"),
        ({"y": {}}, "empty mapping; attributes: shape, size"),
        ({"y": [{"shape": "star"}] * 3}, "3 labels for 1 prompts"),
        ({"y": {"shape": "star"}, "num_inference_steps": 7}, "7 steps instead of 3"),
        ({"y": {"shape": "star"}, "step": "euler"}, "step has no place"),
        ({"y": {"shape": "star"}, "y_scale": float("nan")}, "finite"),
        ({"y_scale": 2.0}, "no effect without y"),
    ],
)
def test_refusals(run: Callable[[], TextToImagePipeline], given: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        images(run(), **given)


def test_what_does_not_fit_together(run: Callable[[], TextToImagePipeline], tmp_path: Path) -> None:
    pipe = run()
    Roles(load_tiny(tmp_path / "a").denoiser.network, ("policy", "ref"), LoraConfig(2)).save_lora(tmp_path / "lora")
    other = load_tiny(tmp_path / "b")
    with pytest.raises(UsageError, match="no control is loaded"):
        images(other, y={"shape": "star"})
    other.load_lora_weights(tmp_path / "lora")
    with pytest.raises(UsageError, match="carries the LoRA adapters default"):
        other.load_control(pipe._control.folder)  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="holds no control"):
        other.load_control(tmp_path)
    pipe.load_lora_weights(tmp_path / "lora", "mine")
    with pytest.raises(UsageError, match="adapters mine.*trained without"):
        images(pipe, y={"shape": "star"})
    with pytest.raises(UsageError, match="unload_control"):
        pipe.register_modules(tokenizer=pipe.tokenizer)


def load_tiny(folder: Path) -> TextToImagePipeline:
    """A fresh tiny pipeline."""
    tiny_text_to_image(folder)
    return load(folder)


def test_other_steps_by_force(run: Callable[[], TextToImagePipeline]) -> None:
    pipe = run()
    folder = pipe._control.folder  # type: ignore[union-attr]
    pipe.load_control(folder, force=True)
    assert images(pipe, y={"shape": "star"}, num_inference_steps=5).isfinite().all()


def test_labels_of_the_command_line() -> None:
    assert parse_labels(["shape=circle", "size=large"]) == {"shape": "circle", "size": "large"}
    assert parse_labels(["shape=circle, size=large"]) == {"shape": "circle", "size": "large"}
    assert parse_labels(["ink"]) == "ink"
    for wrong in (["a=1", "a=2"], ["a=1", "b"], ["a="], [""]):
        with pytest.raises(UsageError, match="ATTRIBUTE=LABEL"):
            parse_labels(wrong)
