"""diffusers' text-to-image pipelines as searches see them: prediction, whole sampling loops and decoding are theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.pipelines import TreeSearchPipeline
from gencontrol.pipelines.search.problem import Problem, Searchable
from gencontrol.pipelines.search.searchable import searchable
from gencontrol.sampling import sample
from tests.helpers.fixtures_images import noise, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

#: fp32 rounding through a whole chain whose states are of order 1 (their step order of operations is not ours)
CHAIN = 2e-5
PROMPTS = ["red cube", "a blue ball"]


@dataclass(frozen=True)
class Case:
    """A pipeline, its calls, and a timestep that both time conventions hold exactly."""

    build: Callable[[], Any]
    size: tuple[int, int]
    t: float
    timestep: float
    step: str
    call: dict[str, Any] = field(default_factory=dict)


def schnell() -> Any:
    return tiny_flux(guidance_embeds=False)


CASES = {
    "sd": Case(tiny_sd, (16, 16), 0.5, 499.0, "ddim", {"guidance_scale": 4.0, "negative_prompt": ["ugly", "b"]}),
    "sdxl": Case(tiny_sdxl, (16, 16), 0.5, 499.0, "ddim", {"guidance_scale": 4.0}),
    "sdxl-negative": Case(tiny_sdxl, (16, 24), 0.5, 499.0, "ddim", {"negative_prompt": ["ugly", "b"]}),
    "sd3": Case(tiny_sd3, (16, 12), 0.25, 250.0, "euler", {"guidance_scale": 3.0, "negative_prompt": ["ugly", "b"]}),
    "flux": Case(tiny_flux, (16, 24), 0.25, 250.0, "euler", {"guidance_scale": 2.5}),
    "schnell": Case(schnell, (16, 24), 0.25, 250.0, "euler"),
}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Pipelines saved and loaded by diffusers' own code, each class once."""
    from diffusers import DiffusionPipeline

    loaded: dict[Any, Any] = {}

    def load(name: str) -> Any:
        build = CASES[name].build
        if build not in loaded:
            folder = tmp_path_factory.mktemp("pipe")
            build().save_pretrained(folder)
            loaded[build] = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
            loaded[build].set_progress_bar_config(disable=True)
        return loaded[build]

    return load


def asked(case: Case) -> dict[str, Any]:
    return {"num_inference_steps": 4, "height": case.size[0], "width": case.size[1], **case.call}


def by_hand(pipe: Any, case: Case, x: Tensor) -> Tensor:
    """What the pipeline's own loop computes at this timestep, in its own order (the free side first)."""
    scale, name = case.call.get("guidance_scale"), type(pipe).__name__
    negative = case.call.get("negative_prompt")
    if name == "FluxPipeline":
        embeds, pooled, text_ids = pipe.encode_prompt(PROMPTS, None)
        b, c, h, w = x.shape
        out = pipe.transformer(
            hidden_states=pipe._pack_latents(x, b, c, h, w),
            timestep=torch.full((b,), case.timestep) / 1000,
            guidance=None if scale is None else torch.full((b,), scale),
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=pipe._prepare_latent_image_ids(b, h // 2, w // 2, x.device, x.dtype),
        ).sample
        return pipe._unpack_latents(out, *case.size, pipe.vae_scale_factor)
    scale = 5.0 if scale is None else scale
    t = torch.tensor(case.timestep)
    if name == "StableDiffusionPipeline":
        given, free = pipe.encode_prompt(PROMPTS, x.device, 1, True, negative)
        both = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([free, given])).sample
    elif name == "StableDiffusionXLPipeline":
        given, free, pooled, pooled_free = pipe.encode_prompt(PROMPTS, negative_prompt=negative)
        ids = pipe._get_add_time_ids(case.size, (0, 0), case.size, given.dtype, 8).repeat(4, 1)
        added = {"text_embeds": torch.cat([pooled_free, pooled]), "time_ids": ids}
        both = pipe.unet(torch.cat([x, x]), t, torch.cat([free, given]), added_cond_kwargs=added).sample
    else:
        given, free, pooled, pooled_free = pipe.encode_prompt(PROMPTS, None, None, negative_prompt=negative)
        joint, clip = torch.cat([free, given]), torch.cat([pooled_free, pooled])
        both = pipe.transformer(torch.cat([x, x]), joint, clip, t.expand(4)).sample
    without, with_text = both.chunk(2)
    return without + scale * (with_text - without)


@pytest.mark.parametrize("name", list(CASES))
def test_prediction_is_the_pipelines(pipes: Callable[[str], Any], name: str) -> None:
    case, pipe = CASES[name], pipes(name)
    problem = searchable(pipe).problem(PROMPTS, **asked(case))
    x = noise((2, *problem.item_shape))
    with torch.no_grad():
        found, expected = problem.model(x, case.t, problem.cond).raw, by_hand(pipe, case, x)
    assert expected.std() > 0.05  # not a network of zeros
    # one network call; the batch is in another order and the two sides are mixed by lerp
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_unguided_prediction_is_exact(pipes: Callable[[str], Any]) -> None:
    pipe = pipes("sd")
    problem = searchable(pipe).problem("red cube", guidance_scale=1.0)
    x = noise((1, 4, 8, 8))
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt(["red cube"], x.device, 1, False)
        expected = pipe.unet(x, torch.tensor(499), encoder_hidden_states=embeds).sample
        assert torch.equal(problem.model(x, 0.5, problem.cond).raw, expected)


def start(pipe: Any, problem: Problem) -> tuple[Tensor, Tensor]:
    """Unit noise for two images: ours, and as the pipeline takes it."""
    x = noise((2, *problem.item_shape))
    theirs = pipe._pack_latents(x, *x.shape) if type(pipe).__name__ == "FluxPipeline" else x
    return x, theirs.clone()


@pytest.mark.parametrize("name", list(CASES))
def test_deterministic_loop_and_decoding_are_the_pipelines(pipes: Callable[[str], Any], name: str) -> None:
    case, pipe = CASES[name], pipes(name)
    problem = searchable(pipe).problem(PROMPTS, **asked(case))
    x, theirs = start(pipe, problem)
    keywords = {"num_inference_steps": 4, "height": case.size[0], "width": case.size[1], **case.call}
    expected = pipe(PROMPTS, latents=theirs.clone(), output_type="latent", **keywords).images
    images = pipe(PROMPTS, latents=theirs.clone(), output_type="pt", **keywords).images
    assert problem.times is not None
    found = sample(problem.model, x.shape, step=case.step, times=problem.times, x_init=x, cond=problem.cond)
    if type(pipe).__name__ == "FluxPipeline":
        expected = pipe._unpack_latents(expected, *case.size, pipe.vae_scale_factor)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=CHAIN * scale, rtol=0)
    with torch.no_grad():
        decoded = problem.decode(expected)
    assert decoded.shape == (2, 3, *case.size) and decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, images, atol=2e-6, rtol=0)  # rounding of one VAE pass


def test_vae_with_means_is_undone_as_the_pipeline_does(pipes: Callable[[str], Any]) -> None:
    pipe = pipes("sdxl")
    pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 1.0, 2.0])
    try:
        keywords = {"num_inference_steps": 1, "guidance_scale": 1.0, "latents": noise((1, 4, 8, 8))}
        latents = pipe("a", output_type="latent", **keywords).images
        images = pipe("a", output_type="pt", **keywords).images
        with torch.no_grad():
            decoded = searchable(pipe).problem("a").decode(latents)
    finally:
        pipe.vae.register_to_config(latents_mean=None, latents_std=None)
    torch.testing.assert_close(decoded, images, atol=2e-6, rtol=0)


def test_half_precision_vae_is_upcast_for_the_time_of_a_search() -> None:
    pipe = tiny_sdxl()
    pipe.vae.half()
    with searchable(pipe).at_work():
        assert pipe.vae.dtype == torch.float32
        assert not any(p.requires_grad for p in (*pipe.vae.parameters(), *pipe.unet.parameters()))
    assert pipe.vae.dtype == torch.float16
    assert all(p.requires_grad for p in (*pipe.vae.parameters(), *pipe.unet.parameters()))
    pipe.vae.register_to_config(force_upcast=False)
    with searchable(pipe).at_work():
        assert pipe.vae.dtype == torch.float16


def test_networks_in_half_precision_keep_states_in_single(pipes: Callable[[str], Any]) -> None:
    pipe = tiny_sd3().to(torch.bfloat16)
    search = TreeSearchPipeline(pipe, lambda images: images.mean((1, 2, 3)), temperature=0.01)
    found = search("a", nfe=16, num_inference_steps=2, seed=0, output_type="latent")
    assert found.images.dtype == torch.float32 and bool(torch.isfinite(found.rewards).all())
    assert pipe.dtype == torch.bfloat16


def test_grid_ends_in_clean_data_and_starts_at_unit_scale() -> None:
    pipe = tiny_sd()
    pipe.scheduler.register_to_config(set_alpha_to_one=False)
    problem = searchable(pipe).problem("a", num_inference_steps=5)
    assert problem.times is not None and problem.times[0] == pytest.approx(0.802) and problem.times[-1] == 0.0
    assert problem.steps == 5 and all(later < earlier for earlier, later in zip(problem.times, problem.times[1:]))
    # diffusers starts from unit noise; s(1) of the table alone would be 0.0023 too small
    drawn = problem.model.process.prior((1, 9), torch.Generator().manual_seed(5))
    torch.testing.assert_close(drawn, noise((1, 9)), atol=1e-6, rtol=0)


def test_pipeline_is_looked_up_at_every_call() -> None:
    from diffusers import DDIMScheduler

    pipe = tiny_sd()
    found = searchable(pipe)
    before = found.problem("a", num_inference_steps=2).times
    assert before is not None and before[0] == pytest.approx(0.502)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    assert found.problem("a", num_inference_steps=2).times == (1.0, 0.5, 0.0)


def test_several_prompts_are_encoded_as_each_alone(pipes: Callable[[str], Any]) -> None:
    found = searchable(pipes("sd3"))
    both = found.problem(PROMPTS, negative_prompt=["x", "y"]).cond
    for row, (prompt, negative) in enumerate(zip(PROMPTS, "xy")):
        alone = found.problem(prompt, negative_prompt=negative).cond
        for side in ("given", "free"):
            for key in ("tokens", "pooled"):
                assert torch.equal(both[side][key][row], alone[side][key][0])
    assert not torch.equal(both["free"]["tokens"][0], both["free"]["tokens"][1])


@pytest.mark.parametrize(
    ("name", "ask", "message"),
    [
        ("sd", {"height": 15}, "height is 15; this model takes multiples of 8, e.g. 16"),
        ("sd3", {"width": 18}, "width is 18; this model takes multiples of 4, e.g. 16"),
        ("flux", {"height": 18, "width": 16}, "height is 18; this model takes multiples of 4"),
        ("flux", {"height": 16, "width": 16, "negative_prompt": "x"}, "negative_prompt has no effect with FLUX"),
        ("schnell", {"height": 16, "width": 16, "guidance_scale": 3.0}, "distilled without guidance"),
        ("sd", {"audio_end_in_s": 3.0}, "audio_end_in_s has no effect with a StableDiffusionPipeline"),
        ("sd", {"guidance_scale": 1.0, "negative_prompt": "x"}, "no effect at guidance_scale 1"),
        ("sd", {"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ("sd", {"prompt": [], "negative_prompt": None}, "prompt holds an empty list"),
        ("sd", {"prompt": 3}, "prompt holds"),
    ],
)
def test_refused_arguments(pipes: Callable[[str], Any], name: str, ask: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TreeSearchPipeline(pipes(name), noise).problem(**({"prompt": "a"} | ask))


def test_only_listed_classes_are_searched() -> None:
    class StableDiffusionPipeline:  # a namesake that is not diffusers'
        pass

    for stranger in (StableDiffusionPipeline(), object()):
        with pytest.raises(UsageError, match="cannot be searched.*StableDiffusion3Pipeline, FluxPipeline"):
            searchable(stranger)
    from diffusers import UNet2DConditionModel

    pipe = tiny_sd()
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=8)
    with pytest.raises(UsageError, match="guidance-distilled"):
        searchable(pipe)


def test_offloaded_pipelines_are_refused(pipes: Callable[[str], Any]) -> None:
    from accelerate import cpu_offload_with_hook

    pipe = pipes("flux")  # it has run before: a cache context's hook on its network is no offloading
    assert isinstance(searchable(pipe), Searchable)
    _, hook = cpu_offload_with_hook(pipe.transformer, "cpu")
    with pytest.raises(UsageError, match="this FluxPipeline is offloaded"):
        searchable(pipe)
    hook.remove()
    pipe.vae.to("cpu")
    assert isinstance(searchable(pipe), Searchable)


def test_group_offloading_is_refused() -> None:
    from diffusers.hooks import apply_group_offloading

    pipe = tiny_sd()
    apply_group_offloading(pipe.unet, onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(UsageError, match="offloaded"):
        searchable(pipe)


def test_images_carry_gradients_to_latents(pipes: Callable[[str], Any]) -> None:
    problem = searchable(pipes("flux")).problem(PROMPTS, **asked(CASES["flux"]))
    latents = noise((1, *problem.item_shape)).requires_grad_()
    problem.decode(latents).mean().backward()
    assert latents.grad is not None and float(latents.grad.abs().sum()) > 0
