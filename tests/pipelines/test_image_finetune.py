"""Every registered algorithm on tiny random-weight pipelines of diffusers: two steps of LoRA, then back into diffusers.

By default each algorithm meets one family; GENCONTROL_FULL=1 runs the whole product.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gencontrol.data.images import to_pil
from gencontrol.models.roles import LoraConfig, Roles
from gencontrol.pipelines import TextToImagePipeline
from gencontrol.registry import ALGORITHMS, find
from gencontrol.train.trainer import TrainConfig, Trainer
from gencontrol.types import RewardContext, RewardOut
from tests.helpers.fixtures_images import FAMILIES

PROMPTS = ["a red cube", "two blue balls", "green", "x"]
#: of every algorithm that has the option
SMALL: dict[str, Any] = {
    "prompts_per_round": 2,
    "batch": 2,
    "generations": 2,
    "updates_per_round": 1,
    "train_times": 1,
    "demo_steps": 3,
    "eval_steps": 2,
    "steps": 3,
    "backprop_steps": 1,
    "bound_samples": 2,
    "min_history": 1,
    "ema_decay": 0.5,
}
#: learned from labels, so the model gets a new condition and final/ is no plain LoRA
LABELLED = frozenset({"ctrl", "cfg-finetune"})


class Redness:
    """Item reward: mean of the red channel minus the others'; differentiable."""

    name, kind, differentiable = "redness", "item", True

    def __call__(self, samples: Tensor, context: RewardContext) -> RewardOut:
        values = samples[:, 0].mean((1, 2)) - samples[:, 1:].mean((1, 2, 3))
        return RewardOut(values, torch.ones(len(values), dtype=torch.bool))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders that diffusers' own code wrote, each family once; FLUX's size is that of a tiny image."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            FAMILIES[name]().save_pretrained(made[name])
        return made[name]

    return folder


def load(folder: Path) -> TextToImagePipeline:
    """The pipeline; FLUX, whose folder names no size, makes images of 16 pixels."""
    pipe = TextToImagePipeline.from_pretrained(folder)
    if pipe.backend.embeds_scale:
        pipe.backend.pipe.default_sample_size = 8
    return pipe


def manifest(name: str, pipe: TextToImagePipeline, folder: Path) -> Path:
    """Pictures of the model's size, and the manifest of a method that learns from files."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, prompt in enumerate(PROMPTS):
        noise = torch.rand(2, 3, *pipe.backend.size(None, None), generator=torch.Generator().manual_seed(i))
        for side, picture in enumerate(noise):
            to_pil(picture).save(folder / f"{i}_{side}.png")
        if name == "diffusion-dpo":
            lines.append({"prompt": prompt, "chosen": f"{i}_0.png", "rejected": f"{i}_1.png"})
        else:
            lines.append({"prompt": prompt, "file": f"{i}_0.png", "labels": {"style": f"s{i % 2}"}})
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def build(
    name: str,
    pipe: TextToImagePipeline,
    folder: Path | None = None,
    *,
    rank: int = 2,
    reward: Any = None,
    **options: Any,
) -> Any:
    """An algorithm with its roles on LoRA (rank 0: all weights); `folder` is for methods that learn from files."""
    kind = find(ALGORITHMS, name, "algorithm")
    fields = {f.name for f in dataclasses.fields(kind.Config)}
    given = {key: value for key, value in (SMALL | options).items() if key in fields}
    if pipe.uncond() is None and "kl_guidance" in fields:
        given["kl_guidance"] = 1.0
    if "data" in fields and folder is not None:
        given["data"] = str(manifest(name, pipe, folder))
    config, reward = kind.Config(**given), reward or Redness()
    task = kind.prepare(pipe.task(PROMPTS, PROMPTS[:2]), reward, config)
    lora, whole = (LoraConfig(rank), kind.whole_parameters(config)) if rank else (None, ())
    roles = Roles(task.denoiser.network, kind.role_names(config), lora, 0, whole)
    return kind(task, reward, config, roles=roles, seed=0)


def fit(name: str, pipe: TextToImagePipeline, run: Path, **train: Any) -> dict[str, Any]:
    """Two steps; returns the last line of metrics."""
    algorithm = build(name, pipe, run.parent / "data")
    config = TrainConfig(**{"steps": 2, "micro_batch": 4, "lr": 1e-2, "threads": 1, **train})
    metrics: dict[str, Any] = Trainer(config, run).fit(algorithm)["metrics"]
    return metrics


def plain(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_lora(pipe: Any, network: str, folder: Path) -> None:
    """diffusers' own loader, strict; PixArt has none, there it is peft's."""
    from diffusers.utils import logging
    from safetensors.torch import load_file

    file = folder / "pytorch_lora_weights.safetensors"
    state = load_file(file)
    module = pipe.components[network]
    if type(pipe).__name__.startswith("PixArt"):
        import peft

        layers = sorted({key.removeprefix(f"{network}.").partition(".lora_")[0] for key in state})
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=2, target_modules=layers), module)
        result = peft.set_peft_model_state_dict(
            module, {key.removeprefix(f"{network}."): value for key, value in state.items()}
        )
        assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora_" in key]
    else:
        with _NoWarnings(logging):
            pipe.load_lora_weights(folder)
    loaded = {name: p for name, p in module.named_parameters() if ".lora_" in name}
    expected = {
        f"{key.removeprefix(f'{network}.').removesuffix('.weight')}.default{'_0' * ('default_0' in next(iter(loaded)))}"
        ".weight": value
        for key, value in state.items()
    }
    assert loaded.keys() == expected.keys()  # nothing missing, nothing unexpected
    assert all(torch.equal(loaded[key], expected[key]) for key in loaded)


class _NoWarnings:
    """Fail on what diffusers only warns about: keys that do not fit."""

    def __init__(self, logging: Any) -> None:
        self.logger = logging.get_logger("diffusers.loaders.peft")

    def __enter__(self) -> None:
        self.before, self.logger.warning = self.logger.warning, self._raise

    def __exit__(self, *_: object) -> None:
        self.logger.warning = self.before

    def _raise(self, message: str, *_: object) -> None:
        raise AssertionError(message)


NAMES = [name for name in ALGORITHMS if name not in LABELLED]
PRODUCT = [(name, family) for name in NAMES for family in FAMILIES]
DIAGONAL = [(name, list(FAMILIES)[index % len(FAMILIES)]) for index, name in enumerate(NAMES)]


@pytest.mark.parametrize(("name", "family"), PRODUCT if os.environ.get("GENCONTROL_FULL") else DIAGONAL)
def test_two_steps_of_lora_and_back_into_diffusers(
    folders: Callable[[str], Path], tmp_path: Path, name: str, family: str
) -> None:
    pipe = load(folders(family))
    before = {key: value.clone() for key, value in pipe.network.state_dict().items()}
    others = {n: _mark(m) for n, m in pipe.modules().items() if n != pipe.network_name}
    metrics = fit(name, pipe, tmp_path / "run")
    assert metrics["step"] == 2 and metrics["health/skipped"] == 0
    assert metrics["updates"] >= 1 and metrics["grad_norm"] > 0
    # text encoders and VAE are as they were
    assert others == {n: _mark(m) for n, m in pipe.modules().items() if n != pipe.network_name}
    final = tmp_path / "run" / "final"
    tuned = load(final)
    changed = [key for key, value in tuned.network.state_dict().items() if not torch.equal(value, before[key])]
    assert changed and all(key.endswith(".weight") for key in changed)
    # the adapter alone, in diffusers' own pipeline of the base, gives the merged model's prediction
    base = plain(folders(family))
    load_lora(base, pipe.network_name, final / "lora")
    cond, x = tuned.encode_prompt(PROMPTS[:1]), torch.ones(1, *tuned.latent_shape)
    with torch.no_grad():
        mine = tuned.denoiser(x, 0.6, cond).raw
        theirs = TextToImagePipeline(base)
        if family == "flux":
            theirs.backend.pipe.default_sample_size = 8
        torch.testing.assert_close(theirs.denoiser(x, 0.6, cond).raw, mine, atol=1e-4, rtol=1e-4)  # merged in fp32


def _mark(module: torch.nn.Module) -> float:
    return float(sum(p.double().abs().sum() for p in module.parameters()))


def test_labels_from_files_and_the_base_stays(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Classifier-free fine-tuning on labelled pictures: the new condition is saved beside an untouched base."""
    pipe = load(folders("sd"))
    before = {key: value.clone() for key, value in pipe.network.state_dict().items()}
    metrics = fit("cfg-finetune", pipe, tmp_path / "run")
    assert metrics["step"] == 2 and metrics["grad_norm"] > 0
    tuned = load(tmp_path / "run" / "final")
    assert all(torch.equal(value, before[key]) for key, value in tuned.network.state_dict().items())
    assert (tmp_path / "run" / "final" / "control").is_dir()


@pytest.mark.parametrize("family", ["sd", "sd3", "flux"])
def test_pictures_become_the_latents_that_decode_to_them(folders: Callable[[str], Path], family: str) -> None:
    """`encode_images` inverts the units of `decode`: the VAE's own reconstruction either way."""
    pipe = load(folders(family))
    task, vae = pipe.task(PROMPTS, PROMPTS[:1]), pipe.backend.pipe.vae
    image = torch.rand(1, 3, *pipe.backend.size(None, None), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = vae.encode(image * 2 - 1).latent_dist.mode()
        expected = (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
        latents = task.encode_samples(image)
        assert tuple(latents.shape[1:]) == tuple(task.latent_shape)
        torch.testing.assert_close(task.decode(latents), expected, atol=1e-5, rtol=1e-5)
