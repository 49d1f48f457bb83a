"""TextToImagePipeline around the five families of diffusers and around our own architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gencontrol.errors import UsageError
from gencontrol.pipelines import TextToImagePipeline
from tests.helpers.fixtures_images import FAMILIES, tiny_flux, tiny_pixart, tiny_sd

PROMPTS = ["a red cube", "two blue balls"]
#: fp32 rounding through a whole chain whose states are of order 1 (the order of operations is not diffusers')
CHAIN = 5e-5
#: size of the images where a family's own is large
SIZE = {"height": 16, "width": 16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders that diffusers' own code wrote, each family once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            FAMILIES[name]().save_pretrained(made[name])
        return made[name]

    return folder


def theirs(folder: Path, scheduler: str | None = None) -> Any:
    """The plain diffusers pipeline of a folder."""
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    return pipe


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_call_is_diffusers_own(folders: Callable[[str], Path], name: str) -> None:
    """Same prompt, generator, steps and guidance: the images of the pipeline itself."""
    keywords: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0, **SIZE}
    if name not in ("flux",):
        keywords["negative_prompt"] = ["ugly", "grey"]
    # PixArt's multistep solver has no twin of ours that agrees to rounding; Euler has
    plain = theirs(folders(name), "EulerDiscreteScheduler" if name == "pixart" else None)
    extra = {"use_resolution_binning": False, "clean_caption": False} if name == "pixart" else {}
    expected = plain(PROMPTS, generator=torch.Generator().manual_seed(1), output_type="np", **keywords, **extra).images
    ours = TextToImagePipeline(plain)
    got = ours(PROMPTS, generator=torch.Generator().manual_seed(1), output_type="np", **keywords).images
    assert got.shape == expected.shape == (2, 16, 16, 3) and expected.std() > 0.01
    np.testing.assert_allclose(got, expected, atol=CHAIN)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_saved_folder_is_diffusers_and_loads_equal(folders: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(folders(name))
    pipe.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path)
    call = {"num_inference_steps": 2, "seed": 0, "output_type": "latent", **SIZE}
    assert torch.equal(again(PROMPTS, **call).images, pipe(PROMPTS, **call).images)
    plain = theirs(tmp_path)
    state = pipe.network.state_dict()
    assert type(plain).__name__ == type(theirs(folders(name))).__name__
    written = plain.components[pipe.network_name].state_dict()
    assert all(torch.equal(value, state[key]) for key, value in written.items())


@pytest.mark.parametrize("name", list(FAMILIES))
def test_task_has_all_that_training_needs(folders: Callable[[str], Path], name: str) -> None:
    pipe = TextToImagePipeline.from_pretrained(folders(name))
    task = pipe.task(PROMPTS, PROMPTS[:1])
    frozen = [m for n, m in pipe.modules().items() if n != pipe.network_name]
    assert not any(p.requires_grad for m in frozen for p in m.parameters())
    assert all(p.requires_grad for p in pipe.network.parameters())
    assert (task.uncond is None) == (name == "flux")
    # rollouts step through the scheduler's own noise levels, shift included, and end in clean data
    times = task.denoiser.process.times(4)
    own = pipe.backend.times(4)
    assert times[-1] == 0.0 and list(times[:-1]) == own.tolist()[:-1]
    if name == "sd3":  # shifted by 3: half of the way in t is 3/4 of the noise; the scheduler's last step is at 1/1000
        even = torch.linspace(1, 1 / 1000, 4, dtype=torch.float64)
        even[-1] = own[-2]  # its last spacing is the scheduler's affair
        torch.testing.assert_close(own[1:3], (3 * even / (1 + 2 * even))[1:3], atol=2e-3, rtol=0)
    if name == "flux":
        assert task.encode(PROMPTS)["guidance"].tolist() == [3.5, 3.5]
    if name == "sdxl":
        assert task.encode(PROMPTS)["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2


def test_each_prompt_is_encoded_once(folders: Callable[[str], Path]) -> None:
    pipe = TextToImagePipeline.from_pretrained(folders("sd3"))
    calls: list[int] = []
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        pipe.components[name].register_forward_hook(lambda *a, **k: calls.append(1))
    task = pipe.task(PROMPTS, PROMPTS)
    before = len(calls)  # of the unconditional side
    first = task.encode([PROMPTS[0]] * 3 + [PROMPTS[1]])
    assert len(calls) - before == 2 * 3  # two different prompts, three encoders
    again = task.encode(PROMPTS)
    assert len(calls) - before == 2 * 3
    assert torch.equal(first["tokens"][3], again["tokens"][1]) and torch.equal(first["tokens"][0], first["tokens"][2])


def test_pixart_gets_its_sizes() -> None:
    pipe = TextToImagePipeline(tiny_pixart(sizes=True))
    cond = pipe.encode_prompt(PROMPTS, height=16, width=32)
    assert cond["resolution"].tolist() == [[16.0, 32.0]] * 2 and cond["aspect_ratio"].tolist() == [[0.5]] * 2
    images = pipe("a", num_inference_steps=1, height=16, width=32, output_type="pt", seed=0).images
    assert images.shape == (1, 3, 16, 32)


def test_output_types_and_repeats() -> None:
    pipe = TextToImagePipeline(tiny_sd())
    call: dict[str, Any] = {"num_inference_steps": 1, "num_images_per_prompt": 2, "seed": 3}
    pt = pipe(PROMPTS, output_type="pt", **call).images
    assert pt.shape == (4, 3, 16, 16) and 0 <= pt.min() and pt.max() <= 1
    pil = pipe(PROMPTS, **call)[0]
    assert pil[0].size == (16, 16) and len(pil) == 4
    assert np.abs(np.asarray(pil[3]) / 255 - pt[3].permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
    assert torch.equal(torch.as_tensor(pipe(PROMPTS, output_type="np", **call).images).permute(0, 3, 1, 2), pt)
    latents = pipe(PROMPTS, output_type="latent", **call).images
    assert torch.equal(pipe.decode(latents), pt)
    assert torch.equal(pipe(PROMPTS, output_type="pt", return_dict=False, **call)[0], pt)


def test_flux_guidance_is_an_input() -> None:
    pipe = TextToImagePipeline(tiny_flux())
    call: dict[str, Any] = {"num_inference_steps": 1, "seed": 0, "output_type": "latent", **SIZE}
    assert not torch.equal(pipe("a", guidance_scale=1.0, **call).images, pipe("a", guidance_scale=5.0, **call).images)
    with pytest.raises(UsageError, match="negative_prompt has no effect with FLUX"):
        pipe("a", negative_prompt="b", **call)
    with pytest.raises(UsageError, match="distilled without guidance"):
        TextToImagePipeline(tiny_flux(guidance_embeds=False))("a", guidance_scale=2.0, **call)


def test_bad_calls_are_told() -> None:
    pipe = TextToImagePipeline(tiny_sd())
    with pytest.raises(UsageError, match="height is 17; this model takes multiples of 8, e.g. 16"):
        pipe("a", height=17)
    with pytest.raises(UsageError, match="Did you mean 'latent'"):
        pipe("a", output_type="latents")
    with pytest.raises(UsageError, match="no text-to-image pipeline"):
        TextToImagePipeline(torch.nn.Linear(1, 1))
    with pytest.raises(UsageError, match="either a diffusers pipeline or all of"):
        TextToImagePipeline(tiny_sd(), transformer=object())


def test_callback_and_interruption() -> None:
    pipe = TextToImagePipeline(tiny_sd())
    seen: list[tuple[int, float]] = []

    def stop(p: Any, index: int, t: float, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append((index, t))
        p._interrupt = index == 1
        return {"latents": torch.zeros_like(tensors["latents"])} if index == 1 else {}

    out = pipe("a", num_inference_steps=4, seed=0, output_type="latent", callback_on_step_end=stop).images
    assert [index for index, _ in seen] == [0, 1] and not out.any()


def test_decode_passes_gradients() -> None:
    """Rewards are followed through the decoder (DRaFT, CTRL); the VAE itself stays frozen."""
    pipe = TextToImagePipeline(tiny_sd())
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).mul(0.01).requires_grad_()
    pipe.decode(x).mean().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(p.grad is None for p in pipe.components["vae"].parameters())
