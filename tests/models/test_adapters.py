"""diffusers models as Denoisers: clean samples and whole sampling loops equal to diffusers' own schedulers'."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.models.adapters.diffusers import from_diffusers, scheduler_law, scheduler_times
from gencontrol.models.adapters.networks import CALLS, DiffusersNetwork
from gencontrol.process import Cosine, Edm, Linear, Table
from gencontrol.sampling import sample
from tests.helpers.tiny_diffusers import build, cond

TABLE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def noisy(shape: tuple[int, ...], seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def unet() -> Any:
    return build("UNet2DModel").requires_grad_(False)


def raw(name: str, network: Any, x: Tensor, timestep: float, given: dict[str, Tensor]) -> Tensor:
    """Each network called by hand as its own pipeline calls it."""
    b = len(x)
    ts = torch.full((b,), timestep, dtype=torch.float64)
    match name:
        case "UNet2DModel":
            return network(x, ts).sample
        case "UNet2DConditionModel":
            return network(x, ts, given["tokens"], encoder_attention_mask=given["mask"]).sample
        case "AudioLDM2UNet2DConditionModel":
            rest = {k: v for k, v in given.items() if k != "tokens"}
            return network(x, ts, encoder_hidden_states=given["tokens"], **rest).sample
        case "SD3Transformer2DModel":
            return network(x, given["tokens"], given["pooled"], ts).sample
        case "PixArtTransformer2DModel":
            extra = {"resolution": None, "aspect_ratio": None}
            out = network(x, given["tokens"], ts, added_cond_kwargs=extra, encoder_attention_mask=given["mask"]).sample
            return out[:, :4]
        case "StableAudioDiTModel":
            from diffusers.models.embeddings import get_1d_rotary_pos_embed

            rotary = get_1d_rotary_pos_embed(8, 11, use_real=True, repeat_interleave_real=False)
            return network(x, ts, given["tokens"], global_hidden_states=given["pooled"], rotary_embedding=rotary).sample
    pipe = diffusers.FluxPipeline
    packed = pipe._pack_latents(x, b, 4, 8, 6)
    ids = pipe._prepare_latent_image_ids(b, 4, 3, x.device, x.dtype)
    out = network(
        packed,
        given["tokens"],
        given["pooled"],
        ts / 1000,
        ids,
        torch.zeros(5, 3, dtype=x.dtype),
        guidance=given["guidance"],
    ).sample
    return pipe._unpack_latents(out, 8, 6, 1)


@pytest.mark.parametrize("name", list(CALLS))
def test_network_is_called_as_its_pipeline_calls_it(name: str) -> None:
    network = build(name)
    shape, given = cond(name)
    x = noisy(shape)
    with torch.no_grad():
        found = DiffusersNetwork(network, lambda t: 1000 * t)(x, torch.full((2,), 0.25, dtype=torch.float64), given)
        expected = raw(name, network, x, 250.0, given)
    assert found.std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    for key in given:  # nothing is accepted and ignored
        other = given[key].flip(0).roll(1, -1) if key != "guidance" else given[key] + 1
        with torch.no_grad():
            moved = DiffusersNetwork(network, lambda t: 1000 * t)(
                x, torch.full((2,), 0.25, dtype=torch.float64), {**given, key: other}
            )
        assert not torch.equal(moved, found), key


def test_sdxl_conditions_go_into_added_cond_kwargs() -> None:
    sizes: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 20 + 6 * 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = diffusers.UNet2DConditionModel(**sizes).eval().double()
    x, tokens, pooled = noisy((2, 4, 8, 8)), noisy((2, 5, 16), 4), noisy((2, 20), 5)
    ids = torch.arange(12.0, dtype=torch.float64).view(2, 6)
    added = {"text_embeds": pooled, "time_ids": ids}
    with torch.no_grad():
        expected = network(x, 250.0, tokens, added_cond_kwargs=added).sample
        wrapped = DiffusersNetwork(network, lambda t: 1000 * t)
        half = torch.full((2,), 0.25, dtype=torch.float64)
        found = wrapped(x, half, {"tokens": tokens, "pooled": pooled, "time_ids": ids})
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    with pytest.raises(UsageError, match="needs the condition time_ids"):
        wrapped(x, half, {"tokens": tokens, "pooled": pooled})


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_clean_sample_of_index_schedulers(unet: Any, name: str, prediction: str) -> None:
    scheduler = getattr(diffusers, name)(prediction_type=prediction, clip_sample=False, **TABLE)
    scheduler.set_timesteps(10)
    denoiser = from_diffusers(unet, scheduler)
    x = noisy((2, 3, 8, 8))
    for index in scheduler.timesteps[[0, 4, 9]]:
        output = unet(x, index).sample
        expected = scheduler.step(output, index, x).pred_original_sample
        t = denoiser.process.schedule.time_of_index(index.double())
        torch.testing.assert_close(denoiser(x, t).x0, expected, atol=1e-5, rtol=1e-5)  # alphas_cumprod is fp32


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("karras", [False, True])
def test_clean_sample_of_euler(unet: Any, prediction: str, karras: bool) -> None:
    """EulerDiscrete holds x·sqrt(1 + sigma²)."""
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type=prediction, use_karras_sigmas=karras, **TABLE)
    scheduler.set_timesteps(7)
    denoiser = from_diffusers(unet, scheduler)
    times = scheduler_times(scheduler, denoiser, 7)
    assert len(times) == 8 and times[-1] == 0
    x = noisy((2, 3, 8, 8))
    for i in (0, 3, 6):
        scheduler._step_index = None
        index, sigma = scheduler.timesteps[i], scheduler.sigmas[i].double()
        scaled = x * (1 + sigma**2).sqrt()
        output = unet(scheduler.scale_model_input(scaled, index), denoiser.network.timestep(times[i])).sample
        expected = scheduler.step(output, index, scaled).pred_original_sample
        torch.testing.assert_close(denoiser(x, times[i]).x0, expected, atol=1e-4, rtol=1e-4)  # sigmas are fp32
        if not karras:
            assert abs(float(denoiser.network.timestep(times[i])) - float(index)) < 1e-2
        else:  # diffusers interpolates the index in log sigma, we in the angle: at most half an index apart
            assert abs(float(denoiser.network.timestep(times[i])) - float(index)) < 0.5


def test_clean_sample_of_dpm_solver(unet: Any) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="v_prediction", **TABLE)
    scheduler.set_timesteps(6)
    denoiser = from_diffusers(unet, scheduler)
    times = scheduler_times(scheduler, denoiser, 6)
    x = noisy((2, 3, 8, 8))
    for i in range(6):
        scheduler._step_index = i
        expected = scheduler.convert_model_output(unet(x, scheduler.timesteps[i]).sample, sample=x)
        torch.testing.assert_close(denoiser(x, times[i]).x0, expected, atol=1e-4, rtol=1e-4)


def test_clean_sample_of_stable_audio(unet: Any) -> None:
    """Cosine with V is EDM preconditioning at sigma = tan(πt/2): x0 and the network's time agree."""
    for prediction in ("v_prediction", "epsilon"):
        scheduler = diffusers.CosineDPMSolverMultistepScheduler(
            sigma_min=0.3, sigma_max=500, sigma_data=1.0, prediction_type=prediction
        )
        scheduler.set_timesteps(5)
        denoiser = from_diffusers(unet, scheduler)
        times = scheduler_times(scheduler, denoiser, 5)
        assert isinstance(denoiser.process.schedule, Cosine)
        x = noisy((2, 3, 8, 8))
        for i in (0, 2, 4):
            sigma = scheduler.sigmas[i].double()
            held = x * (1 + sigma**2).sqrt()
            torch.testing.assert_close(times[i], scheduler.timesteps[i].double(), atol=1e-6, rtol=0)
            output = unet(scheduler.precondition_inputs(held, sigma), scheduler.timesteps[i]).sample
            expected = scheduler.precondition_outputs(held, output, sigma)
            torch.testing.assert_close(denoiser(x, times[i]).x0, expected, atol=1e-5, rtol=1e-5)


def test_clean_sample_of_edm(unet: Any) -> None:
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(5)
    denoiser = from_diffusers(unet, scheduler)
    assert isinstance(denoiser.process.schedule, Edm)
    times = scheduler_times(scheduler, denoiser, 5)
    for i in (0, 2, 4):
        sigma = scheduler.sigmas[i].double()
        x = noisy((2, 3, 8, 8)) * (0.25 + sigma**2).sqrt()
        output = unet(scheduler.precondition_inputs(x, sigma), scheduler.timesteps[i]).sample
        expected = scheduler.precondition_outputs(x, output, sigma)
        torch.testing.assert_close(denoiser(x, times[i]).x0, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("eta_one", [False, True])
def test_ddim_loop(unet: Any, eta_one: bool) -> None:
    """Ours equals DDIMScheduler's loop; set_alpha_to_one decides where the last step lands."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=eta_one, steps_offset=1, **TABLE)
    scheduler.set_timesteps(8)
    denoiser = from_diffusers(unet, scheduler)
    start = noisy((2, 3, 8, 8))
    x = start
    for index in scheduler.timesteps:
        x = scheduler.step(unet(x, index).sample, index, x).prev_sample
    times = scheduler_times(scheduler, denoiser, 8)
    assert (times[-1] == 0) == eta_one
    ours = sample(denoiser, tuple(start.shape), step="ddim", times=times, x_init=start)
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler_discrete_loop_is_ddim(unet: Any, prediction: str) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type=prediction, timestep_spacing="trailing", **TABLE)
    scheduler.set_timesteps(6)
    denoiser = from_diffusers(unet, scheduler)
    sigma = scheduler.sigmas[0].double()
    start = noisy((2, 3, 8, 8))
    x = start * (1 + sigma**2).sqrt()
    for index in scheduler.timesteps:
        x = scheduler.step(unet(scheduler.scale_model_input(x, index), index).sample, index, x).prev_sample
    times = scheduler_times(scheduler, denoiser, 6)
    ours = sample(denoiser, tuple(start.shape), step="ddim", times=times, x_init=start)
    torch.testing.assert_close(ours, x.double(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kwargs", [{"shift": 3.0}, {"shift": 1.0}, {"use_dynamic_shifting": True}])
def test_flow_match_loop(kwargs: dict[str, Any]) -> None:
    network = build("SD3Transformer2DModel").requires_grad_(False)
    shape, given = cond("SD3Transformer2DModel")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**kwargs)
    denoiser = from_diffusers(network, scheduler)
    assert isinstance(denoiser.process.schedule, Linear)
    if "shift" in kwargs:
        times = scheduler_times(scheduler, denoiser, 6)
        scheduler.set_timesteps(6)
    else:
        with pytest.raises(UsageError, match="sequence_length"):
            scheduler_times(scheduler, denoiser, 6)
        times = scheduler_times(scheduler, denoiser, 6, sequence_length=1024)
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 6, 6).numpy(), mu=calculate_shift(1024))
    x = start = noisy(shape)
    for index in scheduler.timesteps:
        output = network(x, given["tokens"], given["pooled"], index.expand(2)).sample
        x = scheduler.step(output, index, x).prev_sample
    ours = sample(denoiser, tuple(shape), step="euler", times=times, x_init=start, cond=given)
    torch.testing.assert_close(ours, x.double(), atol=1e-4, rtol=1e-4)  # its sigmas and steps are fp32
    half = denoiser(start, 0.5, given)
    velocity = network(start, given["tokens"], given["pooled"], torch.full((2,), 500.0, dtype=torch.float64)).sample
    torch.testing.assert_close(half.x0, start - 0.5 * velocity, atol=1e-12, rtol=0)


def test_stable_audio_first_order_loop(unet: Any) -> None:
    """Solver order 1 without noise is DDIM in our coordinates."""
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        sigma_min=0.3, sigma_max=500.0, sigma_data=1.0, sigma_schedule="exponential", solver_order=1
    )
    cosine = diffusers.CosineDPMSolverMultistepScheduler(
        sigma_min=0.3, sigma_max=500, sigma_data=1.0, prediction_type="epsilon", solver_order=1
    )
    scheduler.set_timesteps(5)
    denoiser = from_diffusers(unet, cosine)
    times = scheduler_times(cosine, denoiser, 5)
    torch.testing.assert_close(scheduler.sigmas.double().atan() * 2 / math.pi, times, atol=1e-6, rtol=0)
    start = noisy((2, 3, 8, 8))
    x = start * (1 + scheduler.sigmas[0].double() ** 2).sqrt()
    for i, index in enumerate(scheduler.timesteps):
        held = scheduler.scale_model_input(x, index)
        x = scheduler.step(unet(held, times[i]).sample, index, x).prev_sample
    ours = sample(denoiser, tuple(start.shape), step="ddim", times=times, x_init=start)
    torch.testing.assert_close(ours, x.double(), atol=1e-3, rtol=1e-3)


def test_pndm_and_heun_grids_hold_each_time_once(unet: Any) -> None:
    pndm = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **TABLE)
    denoiser = from_diffusers(unet, pndm)
    times = scheduler_times(pndm, denoiser, 10)
    assert len(times) == 11 and bool((times.diff() < 0).all())
    indices = denoiser.process.schedule.index_of(times[:-1])
    torch.testing.assert_close(indices, torch.arange(901.0, 0.0, -100.0, dtype=torch.float64), atol=1e-6, rtol=0)
    heun = diffusers.HeunDiscreteScheduler(**TABLE)
    assert len(scheduler_times(heun, from_diffusers(unet, heun), 10)) == 11


def test_reading_a_scheduler_does_not_change_it(unet: Any) -> None:
    scheduler = diffusers.DDIMScheduler(**TABLE)
    scheduler.set_timesteps(50)
    before = scheduler.timesteps.clone()
    scheduler_times(scheduler, from_diffusers(unet, scheduler), 7)
    assert torch.equal(scheduler.timesteps, before)


def test_zero_terminal_signal(unet: Any) -> None:
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, **TABLE)
    law = scheduler_law(scheduler)
    assert isinstance(law.schedule, Table) and law.schedule.at(1.0).a == 0.0
    x = noisy((2, 3, 8, 8))
    expected = -unet(x, 999.0).sample  # v = a·eps − s·x0 with a = 0
    torch.testing.assert_close(from_diffusers(unet, scheduler)(x, 1.0).x0, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("scheduler", "text"),
    [
        (diffusers.LCMScheduler(), "no adapter for the scheduler LCMScheduler"),
        (diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"), "continuous"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
        (diffusers.CosineDPMSolverMultistepScheduler(sigma_data=0.5), "sigma_data 0.5"),
        (diffusers.EDMEulerScheduler(prediction_type="v_prediction"), "only 'epsilon'"),
        (diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True), "go together"),
    ],
)
def test_what_is_not_understood_is_refused(scheduler: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        scheduler_law(scheduler)


def test_wrong_conditions_are_refused() -> None:
    network = build("SD3Transformer2DModel")
    shape, given = cond("SD3Transformer2DModel")
    wrapped = DiffusersNetwork(network, lambda t: 1000 * t)
    x, t = noisy(shape), torch.full((2,), 0.5, dtype=torch.float64)
    with pytest.raises(UsageError, match="needs the condition pooled_projections"):
        wrapped(x, t, {"tokens": given["tokens"]})
    with pytest.raises(UsageError, match="Did you mean 'tokens'"):
        wrapped(x, t, {**given, "token": given["tokens"]})
    with pytest.raises(UsageError, match="needs the condition encoder_hidden_states"):
        wrapped(x, t, None)
    with pytest.raises(UsageError, match="mapping"):
        wrapped(x, t, given["tokens"])
    with pytest.raises(UsageError, match="no adapter for the network class Linear"):
        DiffusersNetwork(torch.nn.Linear(1, 1), lambda t: t)
