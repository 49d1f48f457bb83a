"""A pipeline's own scheduler: followed, or replaced with one line that says by what."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from gencontrol.pipelines import TextToAudioPipeline, TextToImagePipeline
from gencontrol.sampling.multistep import SdeDpmPp2M
from tests.helpers.fixtures_images import tiny_sd
from tests.helpers.fixtures_models import tiny_stable_audio

TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
KEYWORDS: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 3.0, "height": 16, "width": 16}


def piped(scheduler: Any) -> Any:
    pipe = tiny_sd()
    pipe.scheduler = scheduler
    return pipe


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("LMSDiscreteScheduler", {}),
        ("EulerDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    ],
)
def test_deterministic_schedulers_are_followed_without_a_word(kind: str, options: dict[str, Any]) -> None:
    """The default call gives the images of diffusers' own, from the same noise, to rounding through the chain."""
    pipe = piped(getattr(diffusers, kind)(**(TABLE | options)))
    own = pipe(["a red cube"], generator=torch.Generator().manual_seed(1), output_type="np", **KEYWORDS).images
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours = TextToImagePipeline(pipe)
    got = ours(["a red cube"], generator=torch.Generator().manual_seed(1), output_type="np", **KEYWORDS).images
    np.testing.assert_allclose(got, own, atol=2e-4)


@pytest.mark.parametrize(
    ("kind", "options", "step", "word"),
    [
        ("PNDMScheduler", {"skip_prk_steps": False}, "plms", "warm-up"),
        ("UniPCMultistepScheduler", {}, "dpmpp2m", "corrector"),
        ("DEISMultistepScheduler", {}, "dpmpp2m", "DPM-Solver"),
        ("HeunDiscreteScheduler", {}, "heun", "coordinates"),
        ("DPMSolverSinglestepScheduler", {}, "dpmpp2m", "multistep"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "dpmpp2m", "order 2"),
        ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, "dpmpp2m", "midpoint"),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, "dpmpp2m", "15 steps"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "dpmpp2m", "rounds"),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
            "sde-dpmpp2m",
            "order 2",
        ),
    ],
)
def test_other_ones_are_named_in_one_line(kind: str, options: dict[str, Any], step: str, word: str) -> None:
    extra = {} if kind == "DPMSolverSinglestepScheduler" else {"steps_offset": 1}
    table = {key: value for key, value in TABLE.items() if key != "steps_offset"} | extra
    with pytest.warns(UserWarning, match=f"{kind} runs as '{step}'.*{word}") as said:
        ours = TextToImagePipeline(piped(getattr(diffusers, kind)(**(table | options))))
    assert len([one for one in said if "runs as" in str(one.message)]) == 1
    assert ours(["a"], output_type="pt", generator=torch.Generator().manual_seed(1), **KEYWORDS).images.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "options", "step"),
    [
        ("EulerAncestralDiscreteScheduler", {}, "sde"),
        ("DDPMScheduler", {}, "sde"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "sde-dpmpp2m"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}, "sde"),
    ],
)
def test_stochastic_schedulers_stay_stochastic(kind: str, options: dict[str, Any], step: str) -> None:
    table = {key: value for key, value in TABLE.items() if key != "steps_offset"}
    pipe = piped(getattr(diffusers, kind)(**(table | options)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours = TextToImagePipeline(pipe)
    assert ours._backend.defaults.step == step


def test_stable_audios_own_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cosine DPM-Solver++ SDE of order 2 with the same noise on both sides; theirs comes from a Brownian tree."""
    from diffusers.schedulers import scheduling_cosine_dpmsolver_multistep as module

    theirs = tiny_stable_audio()
    ours = TextToAudioPipeline(theirs)
    noise = torch.randn(8, 1, *ours.latent_shape, generator=torch.Generator().manual_seed(3))
    counts = {"theirs": -1, "ours": -1}

    def following(name: str) -> torch.Tensor:
        counts[name] += 1
        return noise[counts[name]]

    class Tree:
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            pass

        def __call__(self, sigma: Any, sigma_next: Any) -> torch.Tensor:
            return following("theirs")

    monkeypatch.setattr(module, "BrownianTreeNoiseSampler", Tree)
    monkeypatch.setattr(SdeDpmPp2M, "draw", lambda self, x, generator: following("ours"))
    start = torch.randn(1, *ours.latent_shape, generator=torch.Generator().manual_seed(0))
    keywords = {"num_inference_steps": 6, "guidance_scale": 4.0, "output_type": "latent"}
    expected = theirs(["a dog"], latents=start.clone(), **keywords).audios
    got = ours(["a dog"], latents=start.clone(), **keywords).audios
    assert ours._backend.defaults.step == "sde-dpmpp2m" and counts["ours"] == 4
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)
