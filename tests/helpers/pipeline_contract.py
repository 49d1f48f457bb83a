"""What every text-to-audio pipeline must do; a test module subclasses `PipelineContract` and sets `self.pipe`."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gencontrol.errors import UsageError
from gencontrol.pipelines import AudioPipelineOutput, TextToAudioPipeline

PROMPTS = ["a bell", "two drums", "sad cello", "rain", "a bird"]

#: Rounding of a batched against a single matrix product, carried through a few sampler steps in fp32; differences of
#: another noise or condition are of order 1.
ROUNDING = 2e-4


def call(pipe: TextToAudioPipeline, prompt=PROMPTS[:2], **keywords):
    """Latents of a three-step call with fixed noise."""
    keywords = {"num_inference_steps": 3, "output_type": "latent", **keywords}
    if not {"seed", "generator", "latents"} & keywords.keys():
        keywords["seed"] = 0
    return pipe(prompt, **keywords).audios


class PipelineContract:
    """Tests on `self.pipe`, set by the subclass's fixture."""

    pipe: TextToAudioPipeline

    # ---- saving and loading

    def test_saved_and_loaded_is_bit_equal(self, tmp_path: Path) -> None:
        self.pipe.save_pretrained(tmp_path)
        loaded = TextToAudioPipeline.from_pretrained(tmp_path)
        assert type(loaded) is TextToAudioPipeline
        assert loaded.components.keys() == self.pipe.components.keys()
        for name, module in self.pipe.modules().items():
            mine, theirs = module.state_dict(), loaded.modules()[name].state_dict()
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
        ours = self.pipe(PROMPTS[:2], seed=0, num_inference_steps=3).audios
        assert torch.equal(loaded(PROMPTS[:2], seed=0, num_inference_steps=3).audios, ours)

    def test_saving_over_the_folder_it_came_from(self, tmp_path: Path) -> None:
        self.pipe.save_pretrained(tmp_path)
        loaded = TextToAudioPipeline.from_pretrained(tmp_path)
        loaded.save_pretrained(tmp_path)
        again = TextToAudioPipeline.from_pretrained(tmp_path)
        assert torch.equal(call(again), call(self.pipe))

    def test_dtype_and_its_alias(self, tmp_path: Path) -> None:
        self.pipe.save_pretrained(tmp_path)
        new = TextToAudioPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
        old = TextToAudioPipeline.from_pretrained(tmp_path, torch_dtype="bf16")
        assert new.dtype == old.dtype == torch.bfloat16
        assert torch.equal(call(new), call(old))
        assert call(new).dtype == torch.float32  # latents stay in fp32 between the steps
        assert new(PROMPTS[0], seed=0, num_inference_steps=1).audios.isfinite().all()
        with pytest.raises(UsageError, match="both given"):
            TextToAudioPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16, torch_dtype=torch.bfloat16)
        with pytest.raises(UsageError, match="not a floating-point type"):
            TextToAudioPipeline.from_pretrained(tmp_path, dtype="int8")

    def test_missing_component_is_named(self, tmp_path: Path) -> None:
        self.pipe.save_pretrained(tmp_path)
        for file in (tmp_path / self.pipe.network_name).glob("*.safetensors"):
            file.unlink()
        with pytest.raises(UsageError, match=str(tmp_path)):
            TextToAudioPipeline.from_pretrained(tmp_path)

    def test_pickles_are_never_read(self, tmp_path: Path) -> None:
        self.pipe.save_pretrained(tmp_path)
        folder = tmp_path / "text_encoder"
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(UsageError, match=str(tmp_path)):
            TextToAudioPipeline.from_pretrained(tmp_path)

    def test_code_named_in_the_index_is_refused(self, tmp_path: Path) -> None:
        self.pipe.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        index[self.pipe.network_name] = ["my_module", "Network"]
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        (tmp_path / "my_module.py").write_text("raise SystemExit('imported')")
        with pytest.raises(UsageError, match="my_module"):
            TextToAudioPipeline.from_pretrained(tmp_path)

    def test_from_pipe_shares_the_weights(self) -> None:
        other = TextToAudioPipeline.from_pipe(self.pipe)
        assert other is not self.pipe
        assert all(other.components[name] is part for name, part in self.pipe.components.items())

    def test_compiled_network_is_saved_without_its_wrapper(self, tmp_path: Path) -> None:
        pipe = TextToAudioPipeline.from_pipe(self.pipe)
        name, network = self.pipe.network_name, self.pipe.network
        pipe.register_modules(**{name: torch.compile(network, backend="eager")})
        pipe.save_pretrained(tmp_path)
        self.pipe.register_modules(**{name: network})
        loaded = TextToAudioPipeline.from_pretrained(tmp_path).network.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in network.state_dict().items())

    # ---- the call

    def test_argument_names(self) -> None:
        names = list(inspect.signature(self.pipe.__call__).parameters)
        expected = "prompt audio_end_in_s num_inference_steps guidance_scale negative_prompt num_waveforms_per_prompt"
        assert names[:6] == expected.split()
        assert names[6:9] == ["generator", "latents", "output_type"]
        assert {"return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "seed"} <= set(names)

    def test_output_and_its_three_accesses(self) -> None:
        out = self.pipe(PROMPTS[:2], seed=0, num_inference_steps=1)
        assert isinstance(out, AudioPipelineOutput)
        assert out.audios is out["audios"] is out[0]
        assert out.sampling_rate == out["sampling_rate"] == out[1] == self.pipe.sampling_rate
        assert len(out) == 2 and list(out) == ["audios", "sampling_rate"]
        with pytest.raises(KeyError, match="audios"):
            out["audio"]
        with pytest.raises(AttributeError):
            out.audios = None  # type: ignore[misc]  # frozen
        plain = self.pipe(PROMPTS[:2], seed=0, num_inference_steps=1, return_dict=False)
        assert isinstance(plain, tuple) and torch.equal(plain[0], out.audios)

    def test_output_types(self) -> None:
        sound = self.pipe(PROMPTS[:2], seed=0, num_inference_steps=2).audios
        array = self.pipe(PROMPTS[:2], seed=0, num_inference_steps=2, output_type="np").audios
        latent = self.pipe(PROMPTS[:2], seed=0, num_inference_steps=2, output_type="latent").audios
        assert sound.dtype == torch.float32 and isinstance(array, np.ndarray)
        assert np.array_equal(sound.numpy(), array)
        assert latent.shape == (2, *self.pipe.latent_shape)
        assert torch.equal(self.pipe.decode(latent), sound)
        assert sound.shape[-1] == round(self.pipe.max_audio_length_in_s * self.pipe.sampling_rate)
        assert sound.abs().max() <= 1 and torch.equal(self.pipe.numpy_to_pt(array), sound)

    def test_audio_end_crops_and_has_a_maximum(self) -> None:
        half = self.pipe.max_audio_length_in_s / 2
        sound = self.pipe(PROMPTS[0], audio_end_in_s=half, seed=0, num_inference_steps=1).audios
        assert sound.shape[-1] == round(half * self.pipe.sampling_rate)
        for wrong in (self.pipe.max_audio_length_in_s * 1.5, 0.0, -1.0, float("nan")):
            with pytest.raises(UsageError, match=f"{self.pipe.max_audio_length_in_s:g}"):
                self.pipe(PROMPTS[0], audio_end_in_s=wrong)

    @pytest.mark.parametrize("guidance", [1.0, 4.0])
    def test_batch_equals_single(self, guidance: float) -> None:
        def generators(numbers):
            return [torch.Generator().manual_seed(100 + n) for n in numbers]

        five = call(self.pipe, PROMPTS, generator=generators(range(5)), guidance_scale=guidance)
        two = call(self.pipe, PROMPTS[:2], generator=generators(range(2)), guidance_scale=guidance)
        one = call(self.pipe, PROMPTS[1], generator=generators([1]), guidance_scale=guidance)
        torch.testing.assert_close(five[:2], two, atol=ROUNDING, rtol=ROUNDING)
        torch.testing.assert_close(five[1:2], one, atol=ROUNDING, rtol=ROUNDING)
        assert (five[1] - five[0]).abs().max() > 100 * ROUNDING

    def test_seeds(self) -> None:
        three = call(self.pipe, PROMPTS[:3], seed=7)
        torch.testing.assert_close(call(self.pipe, PROMPTS[:2], seed=7), three[:2], atol=ROUNDING, rtol=ROUNDING)
        listed = call(self.pipe, [PROMPTS[0]] * 3, seed=[7, 8, 7])
        assert torch.equal(listed[0], listed[2]) or (listed[0] - listed[2]).abs().max() < ROUNDING
        torch.testing.assert_close(listed[:1], three[:1], atol=ROUNDING, rtol=ROUNDING)
        assert (listed[0] - listed[1]).abs().max() > 100 * ROUNDING
        assert torch.equal(call(self.pipe, seed=7), call(self.pipe, seed=7))

    def test_one_generator_gives_the_same_prefix(self) -> None:
        def drawn(prompts):  # a step without noise of its own: that of a stochastic one is drawn for the whole batch
            return call(self.pipe, prompts, generator=torch.Generator().manual_seed(3), step="ddim")

        long, short = drawn(PROMPTS), drawn(PROMPTS[:2])
        torch.testing.assert_close(long[:2], short, atol=ROUNDING, rtol=ROUNDING)

    def test_waveforms_per_prompt_come_prompt_by_prompt(self) -> None:
        four = call(self.pipe, PROMPTS[:2], seed=[1, 2, 3, 4], num_waveforms_per_prompt=2)
        flat = call(self.pipe, [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]], seed=[1, 2, 3, 4])
        torch.testing.assert_close(four, flat, atol=ROUNDING, rtol=ROUNDING)

    def test_latents_replace_the_draw(self) -> None:
        noise = torch.randn(2, *self.pipe.latent_shape, generator=torch.Generator().manual_seed(5))
        drawn = call(self.pipe, generator=torch.Generator().manual_seed(5), step="ddim")
        torch.testing.assert_close(call(self.pipe, latents=noise, step="ddim"), drawn, atol=0, rtol=0)
        with pytest.raises(UsageError, match="latents have shape"):
            call(self.pipe, latents=noise[:, :1])

    def test_prompt_and_guidance_matter(self) -> None:
        base = call(self.pipe, seed=0, guidance_scale=1.0)
        assert (call(self.pipe, seed=0, guidance_scale=6.0) - base).abs().max() > 100 * ROUNDING
        assert (call(self.pipe, PROMPTS[2:4], seed=0, guidance_scale=1.0) - base).abs().max() > 10 * ROUNDING
        assert torch.equal(call(self.pipe, seed=0, guidance_scale=0.0), base)  # off at 1 and below, as in diffusers

    def test_negative_prompt(self) -> None:
        free = call(self.pipe, guidance_scale=5.0)
        steered = call(self.pipe, guidance_scale=5.0, negative_prompt="noise hiss")
        assert (free - steered).abs().max() > 10 * ROUNDING
        listed = call(self.pipe, guidance_scale=5.0, negative_prompt=["noise hiss"] * 2)
        assert torch.equal(listed, steered)
        two = {"num_waveforms_per_prompt": 2, "guidance_scale": 5.0, "seed": [1, 2, 3, 4]}
        swapped = call(self.pipe, negative_prompt=["hiss", "noise"], **two)
        flat = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
        one = call(
            self.pipe, flat, negative_prompt=["hiss", "hiss", "noise", "noise"], guidance_scale=5.0, seed=[1, 2, 3, 4]
        )
        torch.testing.assert_close(swapped, one, atol=ROUNDING, rtol=ROUNDING)
        # steering away from the prompt itself leaves nothing to extrapolate: the guided model is the plain one
        same = call(self.pipe, PROMPTS[0], guidance_scale=5.0, negative_prompt=PROMPTS[0])
        plain = call(self.pipe, PROMPTS[0], guidance_scale=1.0)
        torch.testing.assert_close(same, plain, atol=ROUNDING, rtol=ROUNDING)

    @pytest.mark.parametrize(
        ("keywords", "message"),
        [
            ({"num_inference_steps": 0}, "num_inference_steps is 0"),
            ({"num_waveforms_per_prompt": 0}, "num_waveforms_per_prompt is 0"),
            ({"guidance_scale": -1.0}, "guidance_scale is -1"),
            ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
            ({"negative_prompt": "x", "guidance_scale": 1.0}, "no effect"),
            ({"negative_prompt": ["x"], "guidance_scale": 2.0}, "1 negative prompts for 2"),
            ({"seed": 1, "generator": torch.Generator()}, "both given"),
            ({"seed": [1, 2, 3]}, "3 seeds for 2"),
            ({"generator": [torch.Generator()]}, "1 generators for 2"),
            ({"output_type": "pil"}, "output_type is 'pil'"),
            ({"prompt": []}, "empty list"),
            ({"prompt": [1]}, "a int"),
            ({"step": "eulr"}, "Did you mean 'euler'"),
            ({"callback_on_step_end_tensor_inputs": ["latent"]}, "Did you mean 'latents'"),
        ],
    )
    def test_wrong_arguments(self, keywords, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            call(self.pipe, **keywords)

    # ---- callback

    def test_callback_sees_every_step_and_its_latents_are_used(self) -> None:
        seen = []

        def zero_last(pipe, step, t, tensors):
            assert pipe is self.pipe
            seen.append((step, t, tensors["latents"].clone()))
            return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

        result = call(self.pipe, callback_on_step_end=zero_last)
        assert [step for step, _, _ in seen] == [0, 1, 2]
        assert all(a[1] > b[1] for a, b in zip(seen, seen[1:])) and seen[-1][1] < 0.01
        assert torch.equal(result, torch.zeros_like(result))
        assert torch.equal(call(self.pipe, callback_on_step_end=lambda *_: None), seen[-1][2])

    def test_callback_may_not_return_the_undeclared(self) -> None:
        with pytest.raises(UsageError, match="returned 'noise'"):
            call(self.pipe, callback_on_step_end=lambda *_: {"noise": 0})
        with pytest.raises(UsageError, match="returned latents"):
            call(self.pipe, callback_on_step_end=lambda *_: {"latents": torch.zeros(1)})

    def test_interrupt_stops_with_the_present_latents(self) -> None:
        states = []

        def stop(pipe, step, t, tensors):
            states.append(tensors["latents"])
            pipe._interrupt = step == 1

        result = call(self.pipe, num_inference_steps=5, callback_on_step_end=stop)
        assert len(states) == 2 and torch.equal(result, states[1])
        assert len(call(self.pipe)) == 2  # the next call is not interrupted

    # ---- parts

    def test_encoding_is_remembered_and_frozen(self) -> None:
        self.pipe._moved()
        first = self.pipe.encode_prompt(PROMPTS[:2])
        again = self.pipe.encode_prompt([PROMPTS[1]])
        for key, value in again.items():
            assert torch.equal(value, first[key][1:2]) and not value.requires_grad and not value.is_inference()
        alone = self.pipe.uncond()
        assert alone.keys() == first.keys()
        assert all(alone[k].shape == v[:1].shape and alone[k].dtype == v.dtype for k, v in first.items())

    def test_task_can_be_trained_on(self, tmp_path: Path) -> None:
        task = self.pipe.task(PROMPTS[:2], PROMPTS[2:3])
        assert task.sampling_rate == self.pipe.sampling_rate
        mine = {id(p) for p in self.pipe.network.parameters()}
        assert {id(p) for p in task.denoiser.network.parameters()} == mine  # training it trains the pipeline
        cond = task.encode(task.prompts)
        x0 = torch.randn(2, *task.latent_shape, generator=torch.Generator().manual_seed(0))
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
        t = torch.tensor([0.3, 0.7])
        pred = task.denoiser(task.denoiser.process.corrupt(x0, t, noise), t, cond)
        (pred.raw - task.denoiser.target(x0, noise, t)).square().mean().backward()
        grads = [p.grad for p in self.pipe.network.parameters() if p.requires_grad]
        assert any(g is not None and float(g.abs().max()) > 0 for g in grads)
        for name, module in self.pipe.modules().items():
            if name != self.pipe.network_name:
                assert not any(p.requires_grad for p in module.parameters()), name
        self.pipe.network.zero_grad(set_to_none=True)
        task.save_final(tmp_path / "final")
        assert torch.equal(call(TextToAudioPipeline.from_pretrained(tmp_path / "final")), call(self.pipe))

    def test_decoded_sound_stays_within_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loud = torch.tensor([[-3.0, 0.5, 3.0]], dtype=torch.float64)
        monkeypatch.setattr(self.pipe._backend, "decode", lambda latents: loud)
        sound = self.pipe.decode(torch.zeros(1))
        assert sound.dtype == torch.float32 and sound.tolist() == [[-1.0, 0.5, 1.0]]

    def test_artefacts_are_files(self) -> None:
        sample = self.pipe(PROMPTS[0], seed=0, num_inference_steps=1).audios[0]
        files = self.pipe.artefacts("x", sample)
        assert list(files) == ["x.wav", "x.png"]
        assert files["x.wav"][:4] == b"RIFF" and files["x.png"][1:4] == b"PNG"
        assert list(self.pipe.artefacts("x", sample * float("nan"))) == ["x.txt"]

    # ---- devices

    def test_to(self) -> None:
        pipe = TextToAudioPipeline.from_pipe(self.pipe)
        assert pipe.to("cpu") is pipe and pipe.device.type == "cpu" and pipe.dtype == torch.float32
        with pytest.raises(UsageError, match="two dtypes"):
            pipe.to(torch.float16, torch.float16)

    def test_offload_changes_nothing(self) -> None:
        before = call(self.pipe)
        pipe = TextToAudioPipeline.from_pipe(self.pipe)
        pipe.enable_model_cpu_offload(device="cpu")  # the hooks run although there is no accelerator here
        try:
            assert torch.equal(call(pipe), before)
            with pytest.raises(UsageError, match="offloaded"):
                pipe.to("cpu")
            with pytest.raises(UsageError, match="offloaded"):
                TextToAudioPipeline.from_pipe(pipe)
        finally:
            pipe.remove_all_hooks()
        assert torch.equal(call(pipe), before)

    @pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
    def test_offload_without_accelerator_warns(self) -> None:
        with pytest.warns(UserWarning, match="no accelerator"):
            self.pipe.enable_model_cpu_offload()
        assert not self.pipe._hooks

    def test_progress_bar_is_silent_without_a_terminal(self, capfd: pytest.CaptureFixture[str]) -> None:
        call(self.pipe)
        assert capfd.readouterr().err == ""
        pipe = TextToAudioPipeline.from_pipe(self.pipe)
        pipe.set_progress_bar_config(disable=False)
        call(pipe)
        assert "3/3" in capfd.readouterr().err

    def test_unknown_attribute(self) -> None:
        name = self.pipe.network_name
        with pytest.raises(AttributeError, match=name):
            getattr(self.pipe, name + "s")
        with pytest.raises(UsageError, match="no component"):
            self.pipe.register_modules(unknown=None)
