"""Text to image: the bundled model, and Stable Diffusion, SDXL, SD3, FLUX and PixArt of diffusers, behind one call.

A call is: frozen text encoders → prior noise, one stream per sample → sampler steps of the guided denoiser on the
model's own noise levels → frozen decoder.  The same pieces, as a `PromptTask`, are what fine-tuning works on.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.data.images import png_grid, to_pil
from gencontrol.pipelines import arguments
from gencontrol.pipelines.backends.audio import ProcessSpec
from gencontrol.pipelines.backends.images import ImageBackend, NativeImage
from gencontrol.pipelines.outputs import ImagePipelineOutput
from gencontrol.pipelines.prompted import Ask, Callback, PromptedPipeline
from gencontrol.types import Cond

#: pictures that people look at are enlarged to at least this many pixels
_SHOWN = 256


class TextToImagePipeline(PromptedPipeline):
    """Generate images from prompts, and hand the model's parts to fine-tuning.

    Use `from_pretrained("bundled")`, a folder or a hub id; or wrap a diffusers pipeline: `TextToImagePipeline(pipe)`.
    A safety checker that comes with a model is kept in its folder and not run.
    """

    bundled: ClassVar[str] = "text_to_image"
    makes: ClassVar[str] = "text-to-image"
    output_types: ClassVar[tuple[str, ...]] = ("pil", "np", "pt", "latent")

    def __init__(
        self,
        pipeline: Any | None = None,
        *,
        transformer: Any | None = None,
        text_encoder: Any | None = None,
        tokenizer: Any | None = None,
        process: ProcessSpec | None = None,
    ) -> None:
        """Wrap a loaded diffusers pipeline, or our own components.

        Raises:
            UsageError: both or neither are given, a component is missing, or a pipeline of another kind.
        """
        own = {"transformer": transformer, "text_encoder": text_encoder, "tokenizer": tokenizer}
        arguments.whole_or_parts("TextToImagePipeline", own, pipeline, process)
        if pipeline is None:
            spec = process if process is not None else ProcessSpec()
            self._set_backend(NativeImage(transformer, text_encoder, tokenizer, spec))
        else:
            self._set_backend(self._wrap(pipeline))

    @classmethod
    def _foreign(cls) -> Mapping[str, Callable[[Any], Any]]:
        from gencontrol.pipelines.backends.foreign_images import FOREIGN_IMAGES

        return FOREIGN_IMAGES

    @classmethod
    def _native(cls, index: Mapping[str, Any], folder: Path, dtype: torch.dtype) -> NativeImage:
        return NativeImage.load(index, folder, dtype)

    # ---- the parts ------------------------------------------------------------------------------------------------

    @property
    def backend(self) -> ImageBackend:
        """The model taken apart, with what depends on an image's size; searches work on it."""
        found: ImageBackend = self._backend
        return found

    def encode_prompt(self, prompts: str | Sequence[str], height: int | None = None, width: int | None = None) -> Cond:
        """Return the condition of prompts, batch axis first, on the pipeline's device; remembered prompt by prompt.

        Each prompt is encoded alone, so that its condition does not depend on its neighbours, not even in rounding.
        FLUX's holds the default guidance scale, SDXL's and PixArt-α's the size.

        Raises:
            UsageError: no prompt, something that is not text, or a size that the model does not take.
        """
        return self._conditions(prompts, self.backend.size(height, width))

    def uncond(self, height: int | None = None, width: int | None = None) -> Cond:
        """Return the condition of batch 1 for classifier-free guidance; None for FLUX, which is guided by an input."""
        return self._free(self.backend.size(height, width))

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Return the images in [0, 1] of latents, float32; differentiable where nothing is clipped."""
        return self.backend.decode(latents)

    def artefacts(self, stem: str, sample: Float[Tensor, "c h w"]) -> dict[str, bytes]:
        """Return {"<stem>.png": …} of one image in [0, 1]; small ones are enlarged by a whole factor.

        An image with NaN or infinity gives "<stem>.txt" saying so.
        """
        if not bool(torch.isfinite(sample).all()):
            return {f"{stem}.txt": b"this sample holds NaN or infinite values\n"}
        zoom = max(1, _SHOWN // max(sample.shape[-2:]))
        if zoom > 1:
            return {f"{stem}.png": png_grid(sample[None], columns=1, zoom=zoom)}
        buffer = io.BytesIO()
        to_pil(sample).save(buffer, format="PNG")
        return {f"{stem}.png": buffer.getvalue()}

    def _task_parts(self) -> dict[str, Any]:
        return {"encode_samples": self.backend.encode_images}

    # ---- the call -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Float[Tensor, "b *d"] | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        *,
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        seed: int | Sequence[int] | None = None,
        step: Any | None = None,
        y: Any | None = None,
        y_scale: float = 1.0,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Generate images; image i·num_images_per_prompt + j is the j-th of prompt i.

        Args:
            prompt: one text or several.
            height, width: pixels; the model's own size if not given.
            num_inference_steps: sampler steps; the model's own default if not given.
            guidance_scale: weight of classifier-free guidance, none at 1 or below; for FLUX the network's input.
            negative_prompt: what to steer away from, one for all or one for each prompt.
            num_images_per_prompt: images per prompt.
            generator: one source of noise, or one for each image; noise is drawn on the generator's device.
            latents: standard normal noise to start from, [b c h w] (FLUX: unpacked), instead of a draw.
            output_type: "pil" images, "np" array [b h w 3], "pt" tensor [b 3 h w], or "latent" (no decoding).
            return_dict: False returns the tuple (images,).
            callback_on_step_end: called as (pipeline, step, t, {"latents": …}) after each step, t in [0, 1] being the
                time reached; latents in the returned mapping replace the present ones.  Setting
                `pipeline._interrupt = True` in it ends the sampling with the present latents.
            callback_on_step_end_tensor_inputs: which tensors the callback gets.
            seed: instead of a generator; an int gives image i the stream (seed, i), a list gives each its own.
            step: name of a sampler step, or a Step, of `gencontrol.sampling`; the scheduler's nearest if not given.
            y: labels of a control (`load_control`), for all prompts or a list with one for each: a mapping {attribute:
                label}, or a label where the control has one attribute.  The chain is then the one that the control was
                trained on.  None is the base, bit by bit.
            y_scale: strength of the control, beside the guidance_scale of the prompt: 1 as trained, 0 the base's law.

        Raises:
            UsageError: an argument out of its range or against another one; the message says what to give.
        """
        self._check_output(output_type, callback_on_step_end_tensor_inputs)
        self.backend.check_guidance(guidance_scale, negative_prompt)
        size = self.backend.size(height, width)
        repeats = arguments.positive(num_images_per_prompt, "num_images_per_prompt")
        result = self._generate(
            Ask(
                prompt,
                size,
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
        output = ImagePipelineOutput(self._as(result, output_type))
        self.maybe_free_model_hooks()
        return output if return_dict else output.to_tuple()

    def _condition_of(self, texts: Sequence[str], extent: Any, scale: float) -> Cond:
        """Conditions, with FLUX's guidance scale in them."""
        return self.backend.embed_scale(self._conditions(texts, extent), scale)

    def _guided(self, scale: float, negative: list[str] | None, extent: Any) -> Any:
        """The model with classifier-free guidance, unless there is none or its scale is an input of the network."""
        if self.backend.embeds_scale:
            return self.denoiser
        return super()._guided(scale, negative, extent)

    @property
    def _embeds_scale(self) -> bool:
        return self.backend.embeds_scale

    def _as(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        images = self.decode(latents)
        if output_type == "pt":
            return images
        return [to_pil(image) for image in images] if output_type == "pil" else images.permute(0, 2, 3, 1).cpu().numpy()
