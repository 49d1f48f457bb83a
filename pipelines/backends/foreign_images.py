"""diffusers' text-to-image pipelines as backends: what `pipelines.search.diffusers` knows of them, and their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.pipelines.backends.audio import Defaults
from gencontrol.pipelines.backends.foreign_audio import DiffusersBackend
from gencontrol.pipelines.backends.images import Size
from gencontrol.pipelines.backends.schedulers import step_of
from gencontrol.pipelines.search.diffusers import IMAGES, DiffusersImage, Flux
from gencontrol.pipelines.search.problem import closed
from gencontrol.process import GaussianProcess
from gencontrol.process.gaussian import GridProcess
from gencontrol.types import Cond, cat_cond

#: any scale above 1: it only asks the pipeline for the other side of guidance
_GUIDED = 2.0


class ForeignImage(DiffusersBackend):
    """A text-to-image pipeline of diffusers; its own encoders, scheduler, VAE and files, our denoiser.

    The denoiser's process carries the scheduler's grid of noise levels (spacing, shift), so that rollouts of training
    are sampled as the pipeline samples.
    """

    def __init__(self, pipe: Any) -> None:
        """Share the pipeline's components; all but the network are frozen.

        Raises:
            UsageError: it is offloaded or guidance-distilled, or its network or scheduler has no adapter.
        """
        self.image: DiffusersImage = IMAGES[type(pipe).__name__](pipe)
        self.network_name = self.image.network_name
        super().__init__(pipe)
        law = self.denoiser.process
        assert isinstance(law, GaussianProcess)
        self.denoiser.process = GridProcess(law.schedule, grid=self._grid)
        self.defaults = Defaults(step_of(pipe.scheduler), self.image.default_steps, self.image.default_guidance)

    def _grid(self, steps: int) -> tuple[float, ...]:
        """The scheduler's grid at the model's own size, ending in clean data."""
        grid = closed(self.times(steps, None))
        assert grid is not None
        return grid

    def times(self, steps: int, extent: Size | None = None) -> Float[Tensor, " k"]:
        """The scheduler's own grid, whose shift may depend on the size, as times."""
        return self.image.times(self.denoiser, steps, self._shape(extent))

    def _shape(self, extent: Size | None) -> tuple[int, int, int]:
        return self.image.latent_shape(extent or self.image.default_size())

    def latent_shape(self, extent: Size | None) -> tuple[int, ...]:
        """Shape [channels h w]; of FLUX unpacked."""
        return self._shape(extent)

    def size(self, height: int | None, width: int | None) -> Size:
        """Height and width in pixels.

        Raises:
            UsageError: not a positive multiple of what the network takes.
        """
        return self.image.size(height, width)

    def check_guidance(self, scale: float | None, negative: object) -> None:
        """Raise UsageError where FLUX has no use for them."""
        self.image.check_guidance(scale, negative)

    def offload_order(self) -> list[torch.nn.Module]:
        """In the order of the pipeline's own offloading."""
        names = self.pipe.model_cpu_offload_seq.split("->")
        return [self.components[name] for name in names if isinstance(self.components.get(name), torch.nn.Module)]

    def encode(self, prompts: Sequence[str], extent: Size | None, device: torch.device) -> Cond:
        """Conditions by the pipeline's own encoders; FLUX's hold the default guidance scale."""
        size, scale = extent or self.image.default_size(), self.image.default_guidance
        embedded = scale if self.embeds_scale else 1.0  # elsewhere 1 asks for the prompt's side alone
        return cat_cond([self.image.encode(text, None, embedded, size)[0] for text in prompts])

    def uncond(self, extent: Size | None, device: torch.device) -> Cond:
        """What the pipeline takes without a negative prompt; None where guidance is an input of the network."""
        return self.image.encode("", None, _GUIDED, extent or self.image.default_size())[1]

    @property
    def embeds_scale(self) -> bool:
        """True for FLUX."""
        return isinstance(self.image, Flux)

    def embed_scale(self, cond: Cond, scale: float) -> Cond:
        """FLUX's condition with this guidance scale, where its network takes one."""
        return {**cond, "guidance": torch.full_like(cond["guidance"], scale)} if "guidance" in cond else cond

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Images in [0, 1], float32, differentiable where nothing is clipped; the VAE and the network stay frozen."""
        with self.image.upcast():
            return self.image.decode(latents)

    def encode_images(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Latents, float32, of images in [0, 1], without gradient."""
        with self.image.upcast():
            return self.image.encode_images(images)


#: Class name of a pipeline → what makes a backend of it.
FOREIGN_IMAGES: Mapping[str, Callable[[Any], ForeignImage]] = dict.fromkeys(IMAGES, ForeignImage)
