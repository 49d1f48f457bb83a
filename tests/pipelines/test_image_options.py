"""Options of training on image models: they change memory or speed, and the first step's loss and gradient only by
what is stated."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gencontrol.errors import UsageError
from gencontrol.pipelines import TextToImagePipeline
from gencontrol.train.trainer import TrainConfig, Trainer
from tests.helpers.fixtures_images import FAMILIES
from tests.helpers.fixtures_scenes import tiny_text_to_image
from tests.pipelines.test_image_finetune import build, load

MODELS = ("native", "sd", "sd3", "flux", "pixart")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            if name == "native":
                tiny_text_to_image(made[name])
            else:
                FAMILIES[name]().save_pretrained(made[name])
        return made[name]

    return folder


def first_step(folder: Path, run: Path, *, checkpointing: bool = False, **train: Any) -> tuple[float, float]:
    """Loss and gradient norm of the first optimizer step of reward-weighted regression on four samples."""
    pipe = TextToImagePipeline.from_pretrained(folder) if (folder / "process.json").exists() else load(folder)
    if checkpointing:
        pipe.enable_gradient_checkpointing()
    algorithm = build("rwr", pipe, ema_decay=0.0)
    config = TrainConfig(**{"steps": 1, "micro_batch": 4, "lr": 1e-3, "threads": 1, "max_grad_norm": 0.0, **train})
    metrics = Trainer(config, run).fit(algorithm)["metrics"]
    return metrics["loss/total"], metrics["grad_norm"]


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_changes_memory_only(folders: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """The same operations again: equal up to the order of a sum in the backward pass."""
    loss, norm = first_step(folders(name), tmp_path / "plain")
    kept: list[int] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[-1] += x.numel()
        return x

    pipe = TextToImagePipeline.from_pretrained(folders(name)) if name == "native" else load(folders(name))
    for _ in range(2):  # numbers that autograd keeps for one backward pass
        x, cond = torch.ones(2, *pipe.latent_shape), pipe.encode_prompt(["a red circle"] * 2)
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
            pipe.denoiser(x, 0.5, cond).raw.sum().backward()
        pipe.enable_gradient_checkpointing()
    assert kept[1] < kept[0]
    assert first_step(folders(name), tmp_path / "less", checkpointing=True) == pytest.approx((loss, norm), rel=1e-5)


@pytest.mark.parametrize("name", ["native", "sd3"])
def test_accumulation_changes_nothing(folders: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Losses are sums over items: a batch cut into single items, rollouts included, differs by rounding."""
    whole = first_step(folders(name), tmp_path / "whole")
    assert first_step(folders(name), tmp_path / "cut", micro_batch=1) == pytest.approx(whole, rel=2e-4)


@pytest.mark.parametrize("name", ["native", "sd", "flux"])
def test_bf16_autocast_is_near(folders: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """bf16 keeps 8 bits: a relative 2^-8 in each operation, a few per cent in the loss; weights stay float32."""
    loss, norm = first_step(folders(name), tmp_path / "wide")
    low, low_norm = first_step(folders(name), tmp_path / "narrow", precision="bf16")
    assert low != loss and low == pytest.approx(loss, rel=0.05) and low_norm == pytest.approx(norm, rel=0.25)


@pytest.mark.parametrize("name", ["native", "sd3"])
def test_compiled_network_trains_alike(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """torch.compile traces the network (roles and LoRA slots are traced again); fp32 rounding.

    Traced and differentiated by the compiler, run without its C++ code, which takes minutes to build:
    GENCONTROL_FULL=1 builds it.
    """
    plain = first_step(folders(name), tmp_path / "plain")
    torch._dynamo.reset()
    if not os.environ.get("GENCONTROL_FULL"):
        compiler = torch.nn.Module.compile
        monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiler(module, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()
    compiled = first_step(folders(name), tmp_path / "compiled", compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert compiled == pytest.approx(plain, rel=2e-4)
    again = TextToImagePipeline.from_pretrained(tmp_path / "compiled" / "final")  # saved without the compiler's wrapper
    assert (tmp_path / "compiled" / "final" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert again.network.state_dict().keys() == (
        TextToImagePipeline.from_pretrained(folders(name)).network.state_dict().keys()
    )


def test_a_network_without_checkpointing_says_so(folders: Callable[[str], Path], monkeypatch: Any) -> None:
    pipe = load(folders("sd3"))
    monkeypatch.setattr(type(pipe.network), "_supports_gradient_checkpointing", False)
    with pytest.raises(UsageError, match="does not support gradient checkpointing.*lower --micro-batch"):
        pipe.enable_gradient_checkpointing()
