"""Text to audio: the bundled model, and Stable Audio and AudioLDM2 pipelines of diffusers, behind one call.

A call is: frozen text encoder → prior noise, one stream per sample → sampler steps of the guided denoiser → frozen
decoder → crop.  The same pieces, as a `PromptTask`, are what fine-tuning works on.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError, nearest
from gencontrol.models.denoiser import Denoiser
from gencontrol.pipelines import arguments, lora
from gencontrol.pipelines.artefacts import sound_artefacts
from gencontrol.pipelines.backend import AudioBackend, NativeAudio, ProcessSpec
from gencontrol.pipelines.hub import LoadOptions, check_pipeline_class, download_folder
from gencontrol.pipelines.lora_pipeline import LoraPipeline
from gencontrol.pipelines.outputs import AudioPipelineOutput
from gencontrol.process import GaussianProcess
from gencontrol.types import Cond, cat_cond, cond_to, map_cond

if TYPE_CHECKING:
    from gencontrol.algorithms.task import PromptTask

_CACHED_PROMPTS = 1024

Callback = Callable[["TextToAudioPipeline", int, float, dict[str, Tensor]], Mapping[str, Tensor] | None]


class _Interrupted(Exception):
    """Raised inside the sampler's callback to leave it with the present latents."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__("interrupted")
        self.latents = latents


class TextToAudioPipeline(LoraPipeline):
    """Generate sounds from prompts, and hand the model's parts to fine-tuning.

    Use `from_pretrained("bundled")`, a folder or a hub id; or wrap a diffusers pipeline: `TextToAudioPipeline(pipe)`.
    """

    bundled: ClassVar[str] = "text_to_audio"
    fixed_precision: ClassVar[frozenset[str]] = frozenset({"codec"})
    #: tensors that a callback may ask for and replace
    callback_tensors: ClassVar[tuple[str, ...]] = ("latents",)

    def __init__(
        self,
        pipeline: Any | None = None,
        *,
        transformer: Any | None = None,
        text_encoder: Any | None = None,
        tokenizer: Any | None = None,
        codec: Any | None = None,
        process: ProcessSpec | None = None,
    ) -> None:
        """Wrap a loaded diffusers pipeline (StableAudioPipeline, AudioLDM2Pipeline), or our own components.

        Raises:
            UsageError: both or neither are given, a component is missing, or a pipeline of another kind.
        """
        own = {"transformer": transformer, "text_encoder": text_encoder, "tokenizer": tokenizer, "codec": codec}
        given = sorted(name for name, part in own.items() if part is not None)
        if (pipeline is None and len(given) < len(own)) or (pipeline is not None and (given or process is not None)):
            raise UsageError(
                f"TextToAudioPipeline takes either a diffusers pipeline or all of {', '.join(own)}; got "
                f"{'a pipeline and ' if pipeline is not None else ''}{', '.join(given) or 'nothing'}."
            )
        if pipeline is None:
            backend: AudioBackend = NativeAudio(
                transformer, text_encoder, tokenizer, codec, process if process is not None else ProcessSpec()
            )
        else:
            from gencontrol.pipelines.foreign import wrap

            backend = wrap(pipeline)
        self._set_backend(backend)

    def _set_backend(self, backend: AudioBackend) -> None:
        super().__init__(backend.components, backend.network_name)
        self._backend = backend
        self._prompts: OrderedDict[tuple[str, float | None], Cond] = OrderedDict()

    # ---- loading and saving ---------------------------------------------------------------------------------------

    def _load(self, index: Mapping[str, Any], where: str | Path, options: LoadOptions) -> None:
        from gencontrol.pipelines.foreign import FOREIGN, load_foreign

        name = type(self).__name__
        kind = check_pipeline_class(index, {name: None, **FOREIGN}, where, name)
        if kind in FOREIGN:
            self._set_backend(load_foreign(kind, where, options))
            return
        if options.variant is not None:
            raise UsageError(f"'{where}' was saved by gencontrol and has no variants; drop variant= and use dtype=.")
        folder = where if isinstance(where, Path) else download_folder(where, options)
        self._set_backend(NativeAudio.load(index, folder, options.dtype))

    def _share(self, pipeline: Any) -> None:
        from gencontrol.pipelines.foreign import wrap

        if not isinstance(pipeline, TextToAudioPipeline):
            self._set_backend(wrap(pipeline))
            return
        if pipeline._hooks:
            raise UsageError("the pipeline is offloaded; call its remove_all_hooks() before sharing its components.")
        self._set_backend(pipeline._backend)

    def _rebuild(self, components: Mapping[str, Any]) -> None:
        self._set_backend(self._backend.replace(components))

    def _save(self, folder: Path) -> None:
        plain = lora.uncompiled(self.network) is self.network and not lora.has_adapters(self.network)
        self._backend.save(folder, None if plain else lambda: lora.merged_state(self.network))

    def save_final(self, folder: Path) -> None:
        """Write what `from_pretrained` needs with the present weights, and active adapters as LoRA files in lora/."""
        self.save_pretrained(folder)
        active = self.get_active_adapters()
        for name in active:
            self.save_lora_weights(Path(folder) / "lora" / name if len(active) > 1 else Path(folder) / "lora", name)

    # ---- the parts ------------------------------------------------------------------------------------------------

    @property
    def backend(self) -> AudioBackend:
        """The model taken apart, with what depends on a sound's length; searches work on it."""
        return self._backend

    @property
    def denoiser(self) -> Denoiser:
        """Network, process and prediction; its network is the very component that training changes."""
        return self._backend.denoiser

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent of the longest sound, without the batch axis."""
        return self._backend.latent_shape(None)

    @property
    def sampling_rate(self) -> int:
        """Hz of the decoded sound."""
        return self._backend.sampling_rate

    @property
    def max_audio_length_in_s(self) -> float:
        """Length in seconds of the sound that a call without `audio_end_in_s` makes."""
        return self._backend.max_seconds

    def _offload_order(self) -> list[torch.nn.Module]:
        return self._backend.offload_order()

    def _moved(self) -> None:
        self._prompts.clear()

    @torch.no_grad()  # not inference_mode: training saves these tensors for its backward pass
    def encode_prompt(self, prompts: str | Sequence[str], audio_end_in_s: float | None = None) -> Cond:
        """Return the condition of prompts, batch axis first, on the pipeline's device; remembered prompt by prompt.

        Each prompt is encoded alone, so that its condition does not depend on its neighbours, not even in rounding.

        Raises:
            UsageError: no prompt, or something that is not text.
        """
        texts = arguments.texts(prompts, "prompt")
        for text in dict.fromkeys(texts):
            key = (text, audio_end_in_s)
            if key not in self._prompts:
                cond = self._backend.encode([text], audio_end_in_s, self.device)
                self._prompts[key] = map_cond(lambda leaf: leaf.detach().to(self.device), cond)
        result = cat_cond([self._prompts[text, audio_end_in_s] for text in texts])
        while len(self._prompts) > _CACHED_PROMPTS:
            self._prompts.popitem(last=False)
        return result

    @torch.no_grad()
    def uncond(self, audio_end_in_s: float | None = None) -> Cond:
        """Return the condition of batch 1 that stands for "no prompt" in classifier-free guidance."""
        return cond_to(self._backend.uncond(audio_end_in_s, self.device), self.device)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b *d"]) -> Tensor:
        """Return the sounds [b n] or [b c n] of latents, float32 in [-1, 1], on the pipeline's device."""
        return self._backend.decode(latents).float().clamp(-1, 1)

    @staticmethod
    def numpy_to_pt(audios: np.ndarray | Tensor) -> Tensor:
        """Return sounds as a float32 tensor, whatever `output_type` they were made with."""
        return torch.as_tensor(audios, dtype=torch.float32)

    def artefacts(self, stem: str, sample: Float[Tensor, "*c n"]) -> dict[str, bytes]:
        """Return {"<stem>.wav": …, "<stem>.png": …} of one sound."""
        return sound_artefacts(stem, sample, self.sampling_rate)

    def task(self, prompts: Sequence[str], eval_prompts: Sequence[str]) -> PromptTask:
        """Return what a fine-tuning algorithm needs of this pipeline, for training and held-out prompts.

        Raises:
            UsageError: an empty list, or something that is not text.
        """
        from gencontrol.algorithms.task import PromptTask

        return PromptTask(
            denoiser=self.denoiser,
            latent_shape=self.latent_shape,
            encode=self.encode_prompt,
            uncond=self.uncond(),
            decode=self.decode,
            prompts=arguments.texts(prompts, "prompts"),
            eval_prompts=arguments.texts(eval_prompts, "eval_prompts"),
            artefacts=self.artefacts,
            save_final=self.save_final,
            sampling_rate=self.sampling_rate,
        )

    # ---- the call -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        audio_end_in_s: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_waveforms_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Float[Tensor, "b *d"] | None = None,
        output_type: Literal["pt", "np", "latent"] = "pt",
        *,
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        seed: int | Sequence[int] | None = None,
        step: Any | None = None,
    ) -> AudioPipelineOutput | tuple[Any, ...]:
        """Generate sounds; sample i·num_waveforms_per_prompt + j is the j-th of prompt i.

        Args:
            prompt: one text or several.
            audio_end_in_s: length in seconds, at most `max_audio_length_in_s` (the default).
            num_inference_steps: sampler steps; the model's own default if not given.
            guidance_scale: weight of classifier-free guidance; at 1 or below there is none.
            negative_prompt: what to steer away from, one for all or one for each prompt.
            num_waveforms_per_prompt: sounds per prompt.
            generator: one source of noise, or one for each sound; noise is drawn on the generator's device.
            latents: standard normal noise to start from, [b *latent_shape], instead of a draw.
            output_type: "pt" tensor, "np" array, or "latent" (no decoding).
            return_dict: False returns the tuple (audios, sampling_rate).
            callback_on_step_end: called as (pipeline, step, t, {"latents": …}) after each step, t in [0, 1] being the
                time reached; latents in the returned mapping replace the present ones.  Setting
                `pipeline._interrupt = True` in it ends the sampling with the present latents.
            callback_on_step_end_tensor_inputs: which tensors the callback gets.
            seed: instead of a generator; an int gives sound i the stream (seed, i), a list gives each its own.
            step: name of a sampler step, or a Step, of `gencontrol.sampling`; the model's own default if not given.

        Raises:
            UsageError: an argument out of its range or against another one; the message says what to give.
        """
        self._check_output(output_type, callback_on_step_end_tensor_inputs)
        defaults = self._backend.defaults
        seconds = arguments.seconds(audio_end_in_s, self.max_audio_length_in_s)
        prompts = arguments.texts(prompt, "prompt")
        repeats = arguments.positive(num_waveforms_per_prompt, "num_waveforms_per_prompt")
        steps = arguments.positive(
            num_inference_steps if num_inference_steps is not None else defaults.steps, "num_inference_steps"
        )
        scale = arguments.guidance(guidance_scale if guidance_scale is not None else defaults.guidance_scale)
        negative = arguments.negatives(negative_prompt, len(prompts), repeats, scale)
        texts = [text for text in prompts for _ in range(repeats)]
        generators = arguments.sources(generator, seed, len(texts))
        noise = arguments.noise(latents, (len(texts), *self._backend.latent_shape(seconds)), generators, self.device)
        model = self._guided(scale, negative, seconds)
        cond = self.encode_prompt(texts, seconds)
        result = self._sample(model, noise, steps, step or defaults.step, generators, cond, callback_on_step_end)
        audios: Any = result if output_type == "latent" else self.crop(self.decode(result), seconds)
        self.maybe_free_model_hooks()
        output = AudioPipelineOutput(audios.cpu().numpy() if output_type == "np" else audios, self.sampling_rate)
        return output if return_dict else output.to_tuple()

    def _check_output(self, output_type: str, tensors: Sequence[str]) -> None:
        kinds = ("pt", "np", "latent")
        if output_type not in kinds:
            raise UsageError(f"output_type is '{output_type}'.{nearest(output_type, kinds)} Known: {', '.join(kinds)}.")
        for name in tensors:
            if name not in self.callback_tensors:
                raise UsageError(
                    f"callback_on_step_end_tensor_inputs names '{name}'.{nearest(name, self.callback_tensors)} "
                    f"A callback can have: {', '.join(self.callback_tensors)}."
                )

    def _guided(self, scale: float, negative: list[str] | None, seconds: float | None) -> Any:
        """The model with classifier-free guidance, or as it is at a scale of 1 or below."""
        if scale <= 1.0:
            return self.denoiser
        from gencontrol.sampling.guidance import cfg

        uncond = self.uncond(seconds) if negative is None else self.encode_prompt(negative, seconds)
        return cfg(self.denoiser, scale, uncond)

    def _sample(
        self,
        model: Any,
        noise: Float[Tensor, "b *d"],
        steps: int,
        step: Any,
        generators: arguments.Generators,
        cond: Cond,
        callback: Callback | None,
    ) -> Float[Tensor, "b *d"]:
        """Run the sampler from unit noise to clean latents, with progress, callback and interruption."""
        from gencontrol.sampling import sample

        process, times = self.denoiser.process, self._backend.times(steps)
        assert isinstance(process, GaussianProcess)  # ProcessSpec and the adapters make no other
        start = process.schedule.at(1.0 if times is None else float(times[0]))
        # the standard deviation at the first time: of pure noise, or of noise and unit-variance data where t < 1
        spread = start.s if times is None else math.sqrt(start.a**2 + start.s**2)
        self._interrupt = False
        count = steps if times is None else len(times) - 1
        with self.progress_bar(total=count) as bar:

            def after(index: int, t: float, x: Tensor) -> Tensor | None:
                bar.update()
                return None if callback is None else self._call_back(callback, index, t, x)

            try:
                return sample(
                    model,
                    noise.shape,
                    steps=count,
                    step=step,
                    generator=generators,
                    cond=cond,
                    callback=after,
                    x_init=spread * noise,
                    times=times,
                )
            except _Interrupted as stop:
                return stop.latents

    def _call_back(self, callback: Callback, index: int, t: float, x: Tensor) -> Tensor:
        """Give the user's callback its tensors, take the latents it returns, leave the loop if it asks for it."""
        returned = callback(self, index, float(t), {"latents": x}) or {}
        for name in returned:
            if name not in self.callback_tensors:
                raise UsageError(f"the callback returned '{name}'; it can return {', '.join(self.callback_tensors)}.")
        latents = returned.get("latents", x)
        if latents.shape != x.shape:
            raise UsageError(f"the callback returned latents {tuple(latents.shape)}; expected {tuple(x.shape)}.")
        if self._interrupt:
            raise _Interrupted(latents)
        return latents

    def crop(self, audio: Float[Tensor, "*b n"], seconds: float | None) -> Float[Tensor, "*b m"]:
        """Return the first `seconds` of decoded sounds (None: `max_audio_length_in_s`)."""
        length = self.max_audio_length_in_s if seconds is None else seconds
        return audio[..., : math.floor(length * self.sampling_rate + 1e-6)]
