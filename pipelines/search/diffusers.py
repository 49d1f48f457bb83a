"""diffusers' text-to-image pipelines taken apart: Stable Diffusion 1 and 2, XL, 3, FLUX, PixArt-α and -Σ.

Each class says how its pipeline encodes prompts, shapes and scales latents, and spaces its noise levels; text encoders,
scheduler and VAE are the pipeline's own objects, looked up at every call.  Searches and `TextToImagePipeline` work on
them.  The safety checker and the watermark are not run: a search or a training scores thousands of images, and what
leaves it is the caller's to check.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.models.adapters.diffusers import from_diffusers, scheduler_times
from gencontrol.models.denoiser import Denoiser
from gencontrol.pipelines import arguments
from gencontrol.pipelines.search.problem import Guided, Problem, both_sides, closed, frozen, refuse_offloaded
from gencontrol.types import Cond, cat_cond, cond_to

Size = tuple[int, int]


class DiffusersImage(ABC):
    """What the text-to-image pipelines have in common.

    Args:
        pipe: a loaded pipeline of diffusers.

    Raises:
        UsageError: it is offloaded, or of a kind without a stochastic chain.
    """

    kind: Literal["image", "audio"] = "image"
    network_name: ClassVar[str] = "transformer"
    #: of the pipeline's own call
    default_steps: ClassVar[int]
    default_guidance: ClassVar[float]
    #: "even" where the pipeline gives its scheduler evenly spaced sigmas
    spacing: ClassVar[Literal["scheduler", "even"]] = "scheduler"

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        refuse_offloaded(self.network, type(pipe).__name__)

    @property
    def network(self) -> Any:
        """The denoising network, a module of diffusers."""
        return self.pipe.components[self.network_name]

    @property
    def text_device(self) -> torch.device:
        """Where the text encoders are; the network may be elsewhere."""
        parts = self.pipe.components
        found: torch.device = (parts.get("text_encoder") or parts["text_encoder_2"]).device
        return found

    @abstractmethod
    def encode(self, prompt: str, negative: str | None, scale: float, size: Size) -> tuple[Cond, Cond | None]:
        """Condition of one prompt and of guidance's other side (None: no guidance), batch 1, by the pipeline itself."""

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """[channels h w] of the latents of an image of this size in pixels."""
        factor = self.pipe.vae_scale_factor
        return int(self.network.config.in_channels), size[0] // factor, size[1] // factor

    def patches(self, shape: tuple[int, int, int]) -> int:
        """Number of tokens of one latent, which FLUX's shift of the noise levels depends on."""
        return shape[1] * shape[2]

    def default_size(self) -> Size:
        """Height and width in pixels of a call that gives none."""
        side = int(self.pipe.default_sample_size * self.pipe.vae_scale_factor)
        return side, side

    def multiple(self) -> int:
        """What height and width must be divisible by: 8, whatever the VAE (the rule of the pipelines with a UNet)."""
        return 8

    def rescale(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Latents in the VAE's own units: latents/scaling_factor + shift_factor."""
        config = self.pipe.vae.config
        return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)

    @torch.no_grad()
    def problem(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Problem:
        """Encode the prompts one by one and read the scheduler."""
        texts = arguments.texts(prompt, "prompt")
        self.check_guidance(guidance_scale, negative_prompt)
        scale = arguments.guidance(self.default_guidance if guidance_scale is None else guidance_scale)
        given = arguments.negatives(negative_prompt, len(texts), 1, scale)
        negatives: Sequence[str | None] = [None] * len(texts) if given is None else given
        size = self.size(height, width)
        sides = [self.encode(text, other, scale, size) for text, other in zip(texts, negatives, strict=True)]
        free = None if sides[0][1] is None else cat_cond([side[1] for side in sides])
        denoiser = self.denoiser()
        shape = self.latent_shape(size)
        times = self.times(denoiser, num_inference_steps or self.default_steps, shape)
        grid = closed(times)
        assert grid is not None
        return Problem(
            Guided(denoiser, scale, grid[0]),
            cond_to(both_sides(cat_cond([side[0] for side in sides]), free), self.network.device),
            shape,
            len(grid) - 1,
            grid,
            self.decode,
            texts,
        )

    def denoiser(self) -> Denoiser:
        """The network under the present scheduler's noise law."""
        return from_diffusers(self.network, self.pipe.scheduler)

    def times(self, denoiser: Denoiser, steps: int, shape: tuple[int, int, int]) -> Float[Tensor, " k"]:
        """The scheduler's grid, as the pipeline asks for it."""
        return scheduler_times(self.pipe.scheduler, denoiser, steps, self.patches(shape), spacing=self.spacing)

    def check_guidance(self, scale: float | None, negative: object) -> None:  # noqa: B027  # most have nothing to refuse
        """Raise UsageError for a guidance scale or negative prompt that has no effect; here both have one."""

    def size(self, height: int | None, width: int | None) -> Size:
        """Height and width in pixels.

        Raises:
            UsageError: not a positive multiple of what the network takes.
        """
        default, step = self.default_size(), self.multiple()
        size = (default[0] if height is None else height, default[1] if width is None else width)
        for name, value in zip(("height", "width"), size, strict=True):
            if value < step or value % step:
                good = max(1, round(value / step)) * step
                raise UsageError(f"{name} is {value}; this model takes multiples of {step}, e.g. {good}.")
        return size

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Images in [0, 1], float32, by the pipeline's VAE in its own precision."""
        vae = self.pipe.vae
        image = vae.decode(self.rescale(latents).to(vae.device, vae.dtype), return_dict=False)[0]
        return (image.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Latents, float32, of images in [0, 1]: the mode of the VAE's law, in the network's units."""
        vae = self.pipe.vae
        encoded = vae.encode((2.0 * images - 1.0).to(vae.device, vae.dtype))
        latents = (encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.latents).float()
        offset, one = self.rescale(torch.zeros_like(latents)), self.rescale(torch.ones_like(latents))
        return (latents - offset) / (one - offset)  # `rescale` is affine in each channel

    @contextmanager
    def upcast(self) -> Iterator[None]:
        """A VAE that overflows in float16 (force_upcast) is float32 inside the block."""
        vae = self.pipe.vae
        needed = vae.dtype == torch.float16 and bool(vae.config.get("force_upcast", False))
        if needed:
            vae.to(torch.float32)
        try:
            yield
        finally:
            if needed:
                vae.to(torch.float16)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Freeze network and VAE; a VAE that overflows in float16 (force_upcast) is float32 for the time."""
        with self.upcast(), frozen(self.network, self.pipe.vae):
            yield


class StableDiffusion(DiffusersImage):
    """StableDiffusionPipeline (1.x, 2.x)."""

    network_name = "unet"
    default_steps, default_guidance = 50, 7.5

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        _refuse_distilled(pipe)

    def default_size(self) -> Size:
        """The UNet's own sample size, times the VAE's factor."""
        side = self.pipe.unet.config.sample_size
        rows, columns = (side, side) if isinstance(side, int) else side
        return int(rows * self.pipe.vae_scale_factor), int(columns * self.pipe.vae_scale_factor)

    def encode(self, prompt: str, negative: str | None, scale: float, size: Size) -> tuple[Cond, Cond | None]:
        """CLIP states of the prompt, and of the negative or empty prompt."""
        given, free = self.pipe.encode_prompt([prompt], self.text_device, 1, scale > 1, _listed(negative))
        return {"tokens": given}, {"tokens": free} if scale > 1 else None


class StableDiffusionXL(DiffusersImage):
    """StableDiffusionXLPipeline: pooled states and the sizes (height, width, no crop) beside the text."""

    network_name = "unet"
    default_steps, default_guidance = 50, 5.0

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        _refuse_distilled(pipe)

    def encode(self, prompt: str, negative: str | None, scale: float, size: Size) -> tuple[Cond, Cond | None]:
        """States of both CLIP encoders; without a negative prompt the other side is zeros or the empty prompt."""
        given, free, pooled, pooled_free = self.pipe.encode_prompt(
            [prompt], device=self.text_device, do_classifier_free_guidance=scale > 1, negative_prompt=_listed(negative)
        )
        sizes = torch.tensor([[*size, 0, 0, *size]], dtype=given.dtype, device=given.device)
        other = {"tokens": free, "pooled": pooled_free, "time_ids": sizes} if scale > 1 else None
        return {"tokens": given, "pooled": pooled, "time_ids": sizes}, other

    def rescale(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Latents in the VAE's own units; some VAEs have a mean and deviation for each channel."""
        config = self.pipe.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return latents / config.scaling_factor
        mean, std = (torch.tensor(value).reshape(1, -1, 1, 1).to(latents) for value in (mean, std))
        return latents * std / config.scaling_factor + mean


class StableDiffusion3(DiffusersImage):
    """StableDiffusion3Pipeline (3 and 3.5)."""

    default_steps, default_guidance = 28, 7.0

    def multiple(self) -> int:
        """The VAE's factor times the patch size."""
        return int(self.pipe.vae_scale_factor * self.pipe.patch_size)

    def patches(self, shape: tuple[int, int, int]) -> int:
        """Patches of one latent."""
        return (shape[1] // self.pipe.patch_size) * (shape[2] // self.pipe.patch_size)

    def encode(self, prompt: str, negative: str | None, scale: float, size: Size) -> tuple[Cond, Cond | None]:
        """Joint states of the three encoders, pooled states of the two CLIPs."""
        given, free, pooled, pooled_free = self.pipe.encode_prompt(
            [prompt],
            None,
            None,
            device=self.text_device,
            do_classifier_free_guidance=scale > 1,
            negative_prompt=_listed(negative),
        )
        return {"tokens": given, "pooled": pooled}, {"tokens": free, "pooled": pooled_free} if scale > 1 else None


class Flux(DiffusersImage):
    """FluxPipeline: the guidance scale is an input of the network (dev) or has no meaning (schnell).

    States are unpacked latents [c h w]; the adapter makes the tokens.
    """

    default_steps, default_guidance = 28, 3.5
    spacing = "even"

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """[channels h w]; the network's channels are those of a 2×2 patch."""
        channels, rows, columns = super().latent_shape(size)
        return channels // 4, rows, columns

    def patches(self, shape: tuple[int, int, int]) -> int:
        """2×2 patches of one latent."""
        return shape[1] * shape[2] // 4

    def multiple(self) -> int:
        """Twice the VAE's factor."""
        return 2 * int(self.pipe.vae_scale_factor)

    def check_guidance(self, scale: float | None, negative: object) -> None:
        """Raise UsageError for a negative prompt, or a guidance scale for a network without guidance."""
        if negative is not None:
            raise UsageError("negative_prompt has no effect with FLUX, whose guidance has no negative side; drop it.")
        if scale is not None and not self._embeds:
            raise UsageError(
                "guidance_scale has no effect with this FLUX, which was distilled without guidance; drop it."
            )

    @property
    def _embeds(self) -> bool:
        """Whether the network takes a guidance scale."""
        return bool(self.network.config.guidance_embeds)

    def encode(self, prompt: str, negative: str | None, scale: float, size: Size) -> tuple[Cond, Cond | None]:
        """T5 states, pooled CLIP states, and the guidance scale where the network takes one."""
        given, pooled, _ = self.pipe.encode_prompt([prompt], None, device=self.text_device)
        cond = {"tokens": given, "pooled": pooled}
        if self._embeds:
            cond["guidance"] = torch.full((1,), scale, dtype=torch.float32, device=given.device)
        return cond, None


class PixArt(DiffusersImage):
    """PixArtAlphaPipeline and PixArtSigmaPipeline: T5 states and their mask; α at 1024 pixels also takes the size.

    Captions are used as they are (lower case, no HTML cleaning), and sizes are not mapped to the training's buckets.
    """

    default_steps, default_guidance = 20, 4.5

    def default_size(self) -> Size:
        """The transformer's sample size, times the VAE's factor."""
        side = int(self.network.config.sample_size * self.pipe.vae_scale_factor)
        return side, side

    def multiple(self) -> int:
        """The VAE's factor times the patch size."""
        return int(self.pipe.vae_scale_factor * self.network.config.patch_size)

    def encode(self, prompt: str, negative: str | None, scale: float, size: Size) -> tuple[Cond, Cond | None]:
        """T5 states with their mask, and of the negative or empty prompt."""
        given, mask, free, free_mask = self.pipe.encode_prompt(
            [prompt], scale > 1, negative_prompt=negative or "", device=self.text_device, clean_caption=False
        )
        other = self._cond(free, free_mask, size) if scale > 1 else None
        return self._cond(given, mask, size), other

    def _cond(self, tokens: Tensor, mask: Tensor, size: Size) -> Cond:
        cond = {"tokens": tokens, "mask": mask.bool()}
        extra = self.network.config.use_additional_conditions
        if self.network.config.sample_size == 128 if extra is None else extra:
            pixels = torch.tensor([size], dtype=torch.float32, device=tokens.device)
            cond |= {"resolution": pixels, "aspect_ratio": pixels[:, :1] / pixels[:, 1:]}
        return cond


def _listed(text: str | None) -> list[str] | None:
    """A prompt as encode_prompt takes it."""
    return None if text is None else [text]


def _refuse_distilled(pipe: Any) -> None:
    """Raise UsageError for a UNet that takes the guidance scale as an input (latent consistency models)."""
    if pipe.unet.config.time_cond_proj_dim is not None:
        raise UsageError(
            f"this {type(pipe).__name__}'s UNet is guidance-distilled (time_cond_proj_dim), a few-step model without a "
            "stochastic chain to search; give the model that it was distilled from."
        )


#: Class name of a pipeline → its adapter.
IMAGES: Mapping[str, type[DiffusersImage]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArt,
}
