"""diffusers' Stable Audio and AudioLDM2 behind the pipeline contract, and against their own loops."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gencontrol.errors import EnvironmentMissing, UsageError
from gencontrol.pipelines import TextToAudioPipeline
from tests.helpers.fixtures_models import tiny_audioldm2, tiny_stable_audio
from tests.helpers.pipeline_contract import PROMPTS, PipelineContract

#: fp32 rounding through a whole chain: a scheduler in variance-exploding scale against ours in variance-preserving
CHAIN = 2e-4


@pytest.fixture(scope="module")
def stable_audio() -> TextToAudioPipeline:
    return TextToAudioPipeline(tiny_stable_audio())


@pytest.fixture(scope="module")
def audioldm2() -> TextToAudioPipeline:
    return TextToAudioPipeline(tiny_audioldm2())


def unit_noise(pipe: TextToAudioPipeline, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, *pipe.latent_shape, generator=torch.Generator().manual_seed(0))


def deterministic(order: int) -> Any:
    """Stable Audio's scheduler with the deterministic updates of diffusers' EDM twin."""
    from diffusers import CosineDPMSolverMultistepScheduler, EDMDPMSolverMultistepScheduler

    class Deterministic(CosineDPMSolverMultistepScheduler):
        dpm_solver_first_order_update = EDMDPMSolverMultistepScheduler.dpm_solver_first_order_update
        multistep_dpm_solver_second_order_update = (
            EDMDPMSolverMultistepScheduler.multistep_dpm_solver_second_order_update
        )

    scheduler = Deterministic(solver_order=order)
    scheduler.register_to_config(algorithm_type="dpmsolver++")
    return scheduler


class TestStableAudio(PipelineContract):
    @pytest.fixture(autouse=True)
    def _pipe(self, stable_audio: TextToAudioPipeline) -> None:
        self.pipe = stable_audio

    def test_clean_prediction_is_the_schedulers(self) -> None:
        theirs = self.pipe._backend.pipe
        sigma = torch.tensor(2.5)
        noisy = unit_noise(self.pipe) * 3
        t = theirs.scheduler.precondition_noise(sigma)
        cond = self.pipe.encode_prompt("a bell")
        ours = self.pipe.denoiser(noisy / (1 + sigma**2).sqrt(), float(t), cond)
        with torch.no_grad():
            expected = theirs.scheduler.precondition_outputs(noisy, ours.raw, sigma)
        torch.testing.assert_close(ours.x0, expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("negative", [None, "hiss"])
    def test_network_gets_what_diffusers_gives_it(self, negative: str | None) -> None:
        keywords = {"num_inference_steps": 2, "audio_end_in_s": 3.0, "guidance_scale": 5.0, "negative_prompt": negative}
        noise = unit_noise(self.pipe)
        theirs = tiny_stable_audio()
        calls: list[dict[str, Any]] = []
        for network in (theirs.transformer, self.pipe.network):
            handle = network.register_forward_pre_hook(
                lambda module, args, kwargs: calls.append({**kwargs, "x": args[0], "t": args[1]}), with_kwargs=True
            )
            (theirs if network is theirs.transformer else self.pipe)(PROMPTS[0], latents=noise.clone(), **keywords)
            handle.remove()
        expected, got = calls[0], calls[2]  # the first of two steps each; theirs is [free, given], ours [given, free]
        for name in ("x", "encoder_hidden_states", "global_hidden_states"):
            torch.testing.assert_close(got[name], expected[name].flip(0), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(got["t"], expected["t"].expand(2), atol=1e-6, rtol=0)
        for mine, other in zip(got["rotary_embedding"], expected["rotary_embedding"]):
            assert torch.equal(mine, other)

    @pytest.mark.parametrize("order", [1, 2])
    @pytest.mark.parametrize("scale", [1.0, 4.0])
    def test_deterministic_loop_is_diffusers(self, order: int, scale: float) -> None:
        theirs = tiny_stable_audio()
        theirs.register_modules(scheduler=deterministic(order))
        noise = unit_noise(self.pipe, 2)
        keywords = {"num_inference_steps": 6, "guidance_scale": scale, "output_type": "latent"}
        expected = theirs(PROMPTS[:2], latents=noise.clone(), **keywords).audios
        got = self.pipe(PROMPTS[:2], latents=noise, step="dpmpp2m" if order == 2 else "ddim", **keywords).audios
        torch.testing.assert_close(got, expected, atol=CHAIN, rtol=CHAIN)

    def test_length_is_a_condition(self) -> None:
        whole, half = self.pipe.encode_prompt("a"), self.pipe.encode_prompt("a", audio_end_in_s=2.0)
        assert not torch.equal(whole["global_hidden_states"], half["global_hidden_states"])


class TestAudioLDM2(PipelineContract):
    @pytest.fixture(autouse=True)
    def _pipe(self, audioldm2: TextToAudioPipeline) -> None:
        self.pipe = audioldm2

    @pytest.mark.parametrize(
        "keywords", [{"guidance_scale": 1.0}, {"guidance_scale": 4.0, "negative_prompt": "bad hiss"}]
    )
    def test_loop_is_diffusers_call(self, keywords: dict[str, Any]) -> None:
        # texts of equal length: diffusers pads them to the longest, which would change its language model's positions
        theirs = tiny_audioldm2()
        noise = unit_noise(self.pipe)
        keywords = {"num_inference_steps": 5, **keywords}
        decoded: list[torch.Tensor] = []
        handles = [
            vae.post_quant_conv.register_forward_pre_hook(lambda module, args: decoded.append(args[0]))
            for vae in (theirs.vae, self.pipe.vae)
        ]
        expected = theirs("two bell", latents=noise.clone(), output_type="pt", **keywords).audios
        got = self.pipe("two bell", latents=noise, **keywords).audios
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(decoded[1], decoded[0], atol=CHAIN, rtol=CHAIN)  # scaled for the decoder
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected.clamp(-1, 1), atol=CHAIN, rtol=CHAIN)

    def test_padding_does_not_matter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from gencontrol.pipelines.backends import foreign_audio as foreign

        x = unit_noise(self.pipe)
        long = self.pipe.encode_prompt("a bell")
        monkeypatch.setattr(foreign, "MAX_T5_TOKENS", 10)
        short = TextToAudioPipeline.from_pipe(self.pipe)
        cut = short.encode_prompt("a bell")
        assert cut["encoder_hidden_states_1"].shape[1] == 10 < long["encoder_hidden_states_1"].shape[1]
        with torch.no_grad():
            one, other = (self.pipe.denoiser(x, 0.5, cond).raw for cond in (cut, long))
            open_mask = {**long, "encoder_attention_mask_1": torch.ones_like(long["encoder_attention_mask_1"])}
            unmasked = self.pipe.denoiser(x, 0.5, open_mask).raw
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
        assert (unmasked - other).abs().max() > 1e-5  # attending to the padding would be seen

    def test_shorter_sounds_have_smaller_latents(self) -> None:
        half = self.pipe("x", audio_end_in_s=self.pipe.max_audio_length_in_s / 2, num_inference_steps=1, seed=0)
        latent = self.pipe(
            "x", audio_end_in_s=self.pipe.max_audio_length_in_s / 2, num_inference_steps=1, seed=0, output_type="latent"
        )
        assert latent.audios.shape[2] == self.pipe.latent_shape[1] // 2 and half.audios.shape[-1] == 32


class TestLoading:
    def test_loaded_by_diffusers_too(self, tmp_path: Path, stable_audio: TextToAudioPipeline) -> None:
        from diffusers import StableAudioPipeline

        stable_audio.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["_class_name"] == "StableAudioPipeline"
        theirs = StableAudioPipeline.from_pretrained(tmp_path)
        mine, loaded = stable_audio.network.state_dict(), theirs.transformer.state_dict()
        assert mine.keys() == loaded.keys() and all(torch.equal(mine[k], loaded[k]) for k in mine)

    def test_diffusers_gets_the_options(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import diffusers
        import huggingface_hub

        tiny_stable_audio().save_pretrained(tmp_path)
        asked = {}

        def load(cls, where, **options):
            asked.update(options, where=where)
            return tiny_stable_audio()

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, **_: str(tmp_path / name))
        monkeypatch.setattr(diffusers.StableAudioPipeline, "from_pretrained", classmethod(load))
        TextToAudioPipeline.from_pretrained(
            "a/b", revision="r", variant="fp16", dtype="bf16", cache_dir="/c", token="t"
        )
        assert asked == {
            "where": "a/b",
            "revision": "r",
            "variant": "fp16",
            "dtype": torch.bfloat16,
            "cache_dir": "/c",
            "local_files_only": False,
            "token": "t",
            "use_safetensors": True,
        }

    def test_missing_torchsde_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import diffusers

        tiny_stable_audio().save_pretrained(tmp_path)

        def load(cls, where, **options):
            raise ImportError("CosineDPMSolverMultistepScheduler requires the torchsde library")

        monkeypatch.setattr(diffusers.StableAudioPipeline, "from_pretrained", classmethod(load))
        with pytest.raises(EnvironmentMissing, match="torchsde"):
            TextToAudioPipeline.from_pretrained(tmp_path)

    def test_other_pipelines_are_refused(self) -> None:
        class StableAudioPipeline:  # the right name is not enough
            pass

        for thing in (StableAudioPipeline(), torch.nn.Linear(1, 1)):
            with pytest.raises(UsageError, match="is no text-to-audio pipeline"):
                TextToAudioPipeline(thing)
        with pytest.raises(UsageError, match="either a diffusers pipeline or all of"):
            TextToAudioPipeline(tiny_stable_audio(), codec=object())


@pytest.mark.parametrize("build", [tiny_stable_audio, tiny_audioldm2])
def test_offloaded_diffusers_pipeline_is_refused(build) -> None:
    theirs = build()
    theirs.enable_model_cpu_offload(device="cpu")
    with pytest.raises(UsageError, match="is offloaded; call its remove_all_hooks"):
        TextToAudioPipeline(theirs)


def test_import_is_light() -> None:
    import subprocess

    code = (
        "import sys, gencontrol.pipelines; from gencontrol.pipelines import TextToAudioPipeline; "
        "print([m for m in ('diffusers', 'transformers', 'peft', 'accelerate', 'PIL') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"
