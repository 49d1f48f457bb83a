"""Text to audio: the bundled model, and Stable Audio and AudioLDM2 pipelines of diffusers, behind one call.

A call is: frozen text encoder → prior noise, one stream per sample → sampler steps of the guided denoiser → frozen
decoder → crop.  The same pieces, as a `PromptTask`, are what fine-tuning works on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.pipelines import arguments
from gencontrol.pipelines.artefacts import sound_artefacts
from gencontrol.pipelines.backends.audio import AudioBackend, NativeAudio, ProcessSpec
from gencontrol.pipelines.outputs import AudioPipelineOutput
from gencontrol.pipelines.prompted import Ask, Callback, PromptedPipeline
from gencontrol.types import Cond


class TextToAudioPipeline(PromptedPipeline):
    """Generate sounds from prompts, and hand the model's parts to fine-tuning.

    Use `from_pretrained("bundled")`, a folder or a hub id; or wrap a diffusers pipeline: `TextToAudioPipeline(pipe)`.
    """

    bundled: ClassVar[str] = "text_to_audio"
    fixed_precision: ClassVar[frozenset[str]] = frozenset({"codec"})
    makes: ClassVar[str] = "text-to-audio"
    output_types: ClassVar[tuple[str, ...]] = ("pt", "np", "latent")

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
        arguments.whole_or_parts("TextToAudioPipeline", own, pipeline, process)
        if pipeline is None:
            spec = process if process is not None else ProcessSpec()
            self._set_backend(NativeAudio(transformer, text_encoder, tokenizer, codec, spec))
        else:
            self._set_backend(self._wrap(pipeline))

    @classmethod
    def _foreign(cls) -> Mapping[str, Callable[[Any], Any]]:
        from gencontrol.pipelines.backends.foreign_audio import FOREIGN

        return FOREIGN

    @classmethod
    def _native(cls, index: Mapping[str, Any], folder: Path, dtype: torch.dtype) -> NativeAudio:
        return NativeAudio.load(index, folder, dtype)

    # ---- the parts ------------------------------------------------------------------------------------------------

    @property
    def backend(self) -> AudioBackend:
        """The model taken apart, with what depends on a sound's length; searches work on it."""
        found: AudioBackend = self._backend
        return found

    @property
    def sampling_rate(self) -> int:
        """Hz of the decoded sound."""
        return self.backend.sampling_rate

    @property
    def max_audio_length_in_s(self) -> float:
        """Length in seconds of the sound that a call without `audio_end_in_s` makes."""
        return self.backend.max_seconds

    def encode_prompt(self, prompts: str | Sequence[str], audio_end_in_s: float | None = None) -> Cond:
        """Return the condition of prompts, batch axis first, on the pipeline's device; remembered prompt by prompt.

        Each prompt is encoded alone, so that its condition does not depend on its neighbours, not even in rounding.

        Raises:
            UsageError: no prompt, or something that is not text.
        """
        return self._conditions(prompts, audio_end_in_s)

    def uncond(self, audio_end_in_s: float | None = None) -> Cond:
        """Return the condition of batch 1 that stands for "no prompt" in classifier-free guidance."""
        return self._free(audio_end_in_s)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b *d"]) -> Tensor:
        """Return the sounds [b n] or [b c n] of latents, float32 in [-1, 1], on the pipeline's device."""
        return self.backend.decode(latents).float().clamp(-1, 1)

    @staticmethod
    def numpy_to_pt(audios: np.ndarray | Tensor) -> Tensor:
        """Return sounds as a float32 tensor, whatever `output_type` they were made with."""
        return torch.as_tensor(audios, dtype=torch.float32)

    def artefacts(self, stem: str, sample: Float[Tensor, "*c n"]) -> dict[str, bytes]:
        """Return {"<stem>.wav": …, "<stem>.png": …} of one sound."""
        return sound_artefacts(stem, sample, self.sampling_rate)

    def _task_parts(self) -> dict[str, Any]:
        return {"sampling_rate": self.sampling_rate}

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
        y: Any | None = None,
        y_scale: float = 1.0,
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
            y: labels of a control (`load_control`), for all prompts or a list with one for each: a mapping {attribute:
                label}, or a label where the control has one attribute.  The chain is then the one that the control was
                trained on.  None is the base, bit by bit.
            y_scale: strength of the control, beside the guidance_scale of the prompt: 1 as trained, 0 the base's law.

        Raises:
            UsageError: an argument out of its range or against another one; the message says what to give.
        """
        self._check_output(output_type, callback_on_step_end_tensor_inputs)
        seconds = arguments.seconds(audio_end_in_s, self.max_audio_length_in_s)
        repeats = arguments.positive(num_waveforms_per_prompt, "num_waveforms_per_prompt")
        result = self._generate(
            Ask(
                prompt,
                seconds,
                repeats,
                num_inference_steps,
                guidance_scale,
                negative_prompt,
                generator,
                latents,
                seed,
                step,
                callback_on_step_end,
                y,
                y_scale,
            )
        )
        audios: Any = result if output_type == "latent" else self.crop(self.decode(result), seconds)
        self.maybe_free_model_hooks()
        output = AudioPipelineOutput(audios.cpu().numpy() if output_type == "np" else audios, self.sampling_rate)
        return output if return_dict else output.to_tuple()

    def crop(self, audio: Float[Tensor, "*b n"], seconds: float | None) -> Float[Tensor, "*b m"]:
        """Return the first `seconds` of decoded sounds (None: `max_audio_length_in_s`)."""
        length = self.max_audio_length_in_s if seconds is None else seconds
        return audio[..., : math.floor(length * self.sampling_rate + 1e-6)]
