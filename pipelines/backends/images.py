"""What a text-to-image pipeline needs of a model, whoever made it; and the bundled architecture's answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.pipelines.backends.audio import (
    TOKENIZERS,
    NativeText,
    ProcessSpec,
    PromptBackend,
    load_text,
)
from gencontrol.pipelines.hub.hub import check_component, own_memory
from gencontrol.pipelines.hub.lora import uncompiled
from gencontrol.types import Cond

#: height and width in pixels
Size = tuple[int, int]


class ImageBackend(PromptBackend, Protocol):
    """A text-to-image model taken apart; its extent is the size."""

    def size(self, height: int | None, width: int | None) -> Size:
        """The size that a call makes; None is the model's own.

        Raises:
            UsageError: a size that the network does not take.
        """
        ...

    def check_guidance(self, scale: float | None, negative: object) -> None:
        """Raise UsageError for a guidance scale or negative prompt (as given, None is not) without effect here."""
        ...

    @property
    def embeds_scale(self) -> bool:
        """Whether guidance is an input of the network (or distilled away), and not a second prediction."""
        ...

    def embed_scale(self, cond: Cond, scale: float) -> Cond:
        """The condition with the guidance scale in it, where the network takes one."""
        ...

    def encode_images(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b *d"]:
        """Clean latents of images in [0, 1], the inverse of `decode`; without gradient."""
        ...


class NativeImage(NativeText):
    """Our own architecture on pixels: a CLIP text encoder and `PatchTransformer`; images of one fixed size."""

    pipeline_name = "TextToImagePipeline"
    allowed = {
        "transformer": ("PatchTransformer",),
        "text_encoder": ("CLIPTextModelWithProjection",),
        "tokenizer": TOKENIZERS,
    }
    libraries = {"transformer": "gencontrol"}

    def __init__(self, transformer: Any, text_encoder: Any, tokenizer: Any, spec: ProcessSpec) -> None:
        """Assemble from loaded components; the text encoder is frozen.

        Raises:
            UsageError: the text encoder's states are not what the network takes.
        """
        backbone = uncompiled(transformer).backbone.config
        ours = (backbone.pooled_dim, backbone.context_dim)
        theirs = (text_encoder.config.projection_dim, text_encoder.config.hidden_size)
        if ours != theirs:
            raise UsageError(
                f"the transformer takes text states of sizes {ours} (pooled, tokens), the text encoder gives {theirs}; "
                "take both from one pipeline."
            )
        super().__init__({"transformer": transformer, "text_encoder": text_encoder, "tokenizer": tokenizer}, spec)

    @classmethod
    def load(cls, index: Mapping[str, Any], folder: Path, dtype: torch.dtype) -> NativeImage:
        """Load a folder that `save` wrote.

        Raises:
            UsageError: a component is missing, of a class that is not on the list, or does not fit.
        """
        from gencontrol.models.networks.image_transformer import PatchTransformer

        for name in cls.allowed:
            check_component(index, name, cls.allowed, folder)
        text_encoder, tokenizer = load_text(folder, "CLIPTextModelWithProjection", dtype)
        transformer = PatchTransformer.from_pretrained(folder / "transformer", dtype).eval()
        for module in (text_encoder, transformer):
            own_memory(module)
        return cls(transformer, text_encoder, tokenizer, ProcessSpec.read(folder))

    def latent_shape(self, extent: Size | None) -> tuple[int, ...]:
        """Shape [c s s] of one image; the model works on pixels."""
        config = uncompiled(self.components["transformer"]).config
        return (config.channels, config.size, config.size)

    def size(self, height: int | None, width: int | None) -> Size:
        """The one size of this model.

        Raises:
            UsageError: another one.
        """
        _, *own = self.latent_shape(None)
        for name, value, only in zip(("height", "width"), (height, width), own, strict=True):
            if value not in (None, only):
                raise UsageError(f"{name} is {value}; this model makes images of {only}×{only} pixels: leave it out.")
        return own[0], own[1]

    def check_guidance(self, scale: float | None, negative: object) -> None:
        """Both have their effect."""

    @property
    def embeds_scale(self) -> bool:
        """False: guided by a second prediction."""
        return False

    def embed_scale(self, cond: Cond, scale: float) -> Cond:
        """The condition as it is."""
        return cond

    def decode(self, latents: Float[Tensor, "b c s s"]) -> Float[Tensor, "b c s s"]:
        """Images in [0, 1] of clean samples in [-1, 1]; differentiable where nothing is clipped."""
        return ((latents.float() + 1.0) / 2.0).clamp(0.0, 1.0)

    @torch.no_grad()
    def encode_images(self, images: Float[Tensor, "b c s s"]) -> Float[Tensor, "b c s s"]:
        """Clean samples in [-1, 1] of images in [0, 1]."""
        return images.float() * 2.0 - 1.0

    def _empty(self) -> torch.nn.Module:
        from gencontrol.models.networks.image_transformer import PatchTransformer
        from gencontrol.models.networks.transformer import Transformer

        plain = uncompiled(self.components["transformer"])
        return PatchTransformer(plain.config, Transformer(plain.backbone.config))
