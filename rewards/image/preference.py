"""Rewards that compare a picture with its prompt in a CLIP space: CLIP score, PickScore, HPS v2.

CLIP: Radford et al. 2021, arXiv 2103.00020.  PickScore (Kirstain et al. 2023, arXiv 2305.01569) is a CLIP ViT-H/14
fine-tuned on preferences, published for transformers; HPS v2 (Wu et al. 2023, arXiv 2306.09341) is another, published
as a checkpoint of open_clip whose images are padded to a square.  All three are one similarity in one backbone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.rewards.base import checked
from gencontrol.rewards.image.clip_backend import ClipBackend, ClipEmbeddings, FitImage, Precision, clip_backend
from gencontrol.rewards.inputs import image_batch
from gencontrol.rewards.pretrained import one_prompt_each
from gencontrol.types import RewardContext, RewardOut

CLIP_MODEL = "openai/clip-vit-large-patch14"
PICKSCORE_MODEL = "yuvalkirstain/PickScore_v1"
#: PickScore was trained with this model's tokenizer and images, and its own repository holds neither (its card)
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
HPS_ARCHITECTURE = "ViT-H-14"


class Similarity:
    """Item reward factor · cos(E_image(x), E_text(prompt)); differentiable with respect to the image."""

    kind: Literal["item", "set"] = "item"
    differentiable = True

    def __init__(
        self, name: str, backend: ClipBackend, resize: FitImage, batch_size: int, *, logit_scale: bool = False
    ) -> None:
        """Score with the embeddings of this model, times its logit scale where asked."""
        self.name = name
        self.embeddings = ClipEmbeddings(backend, resize, batch_size)
        self._factor = backend.logit_scale if logit_scale else 1.0

    def __call__(self, samples: Float[Tensor, "b 3 h w"], context: RewardContext) -> RewardOut:
        """Similarity per image; `extras["image_embeddings"]` [b d] holds the detached embeddings.

        Raises:
            UsageError: no images in [0, 1], or not one prompt per image.
        """
        images, finite = image_batch(samples, self.name)
        prompts = one_prompt_each(context.prompts, len(images), self.name)
        if not prompts:
            return checked(self.name, images.new_zeros(0), 0)
        seen = self.embeddings.images(images)
        values = self._factor * (seen * self.embeddings.texts(prompts).to(seen.device)).sum(-1)
        out = checked(self.name, values, len(images), finite)
        return RewardOut(out.values, out.valid, {"image_embeddings": seen.detach()})


class ClipReward(Similarity):
    """`clip`: cos(E_image(x), E_text(prompt)) in [−1, 1], or times the model's logit scale."""

    title = "cosine of the CLIP embeddings of the image and of its prompt"
    paper = "arXiv:2103.00020"
    medium = "image"

    def __init__(
        self,
        model: str | Path = CLIP_MODEL,
        device: str | torch.device | None = None,
        architecture: str | None = None,
        processor: str | Path | None = None,
        resize: FitImage = "auto",
        batch_size: int = 32,
        precision: Precision = "fp32",
        *,
        logit_scale: bool = False,
    ) -> None:
        """Load the model (once per process; rewards of the same model share it).

        Args:
            model: folder or hub id of a transformers CLIPModel, a folder saved for open_clip, "open_clip:NAME/TAG",
                or an open_clip checkpoint file.
            device: None takes the GPU when there is one.
            architecture: open_clip's name of the network, for checkpoint files only.
            processor: source of tokenizer and image settings of a transformers model; None: its own.
            resize: "crop", "squash" or "pad" instead of the model's own way ("auto").
            batch_size: images in one forward pass.
            precision: "fp32", "bf16" or "fp16".
            logit_scale: multiply by the model's logit scale (100 for OpenAI's models).

        Raises:
            UsageError, EnvironmentMissing: the model cannot be loaded.
        """
        backend = clip_backend(model, device, precision, architecture, processor)
        super().__init__("clip", backend, resize, batch_size, logit_scale=logit_scale)


class PickScore(Similarity):
    """`pickscore`: logit scale · cosine of the PickScore model; about 15 to 25 for its published weights."""

    title = "PickScore, human preference"
    paper = "arXiv:2305.01569"
    medium = "image"

    def __init__(
        self,
        model: str | Path = PICKSCORE_MODEL,
        device: str | torch.device | None = None,
        processor: str | Path | None = None,
        resize: FitImage = "auto",
        batch_size: int = 32,
        precision: Precision = "fp32",
        *,
        logit_scale: bool = True,
    ) -> None:
        """Load the model.

        Args:
            model: folder or hub id of the transformers model.
            device: None takes the GPU when there is one.
            processor: source of tokenizer and image settings; None: the published one for the published model, else
                the model's own folder.
            resize: "crop", "squash" or "pad" instead of the model's own way ("auto").
            batch_size: images in one forward pass.
            precision: "fp32", "bf16" or "fp16".
            logit_scale: multiply the cosine by the model's scale, as the PickScore paper does.

        Raises:
            UsageError, EnvironmentMissing: the model cannot be loaded.
        """
        if processor is None and str(model) == PICKSCORE_MODEL:
            processor = PICKSCORE_PROCESSOR
        backend = clip_backend(model, device, precision, processor=processor)
        super().__init__("pickscore", backend, resize, batch_size, logit_scale=logit_scale)


class Hps(Similarity):
    """`hps`: cosine of a human preference model (HPS v2, v2.1); about 0.2 to 0.35 for its published weights."""

    title = "HPS, human preference"
    paper = "arXiv:2306.09341"
    medium = "image"

    def __init__(
        self,
        model: str | Path | None = None,
        device: str | torch.device | None = None,
        architecture: str = HPS_ARCHITECTURE,
        resize: FitImage = "pad",
        batch_size: int = 32,
        precision: Precision = "fp32",
    ) -> None:
        """Load the model.

        Args:
            model: checkpoint file such as HPS_v2.1_compressed.pt (or .safetensors of the same keys), or a folder.
            device: None takes the GPU when there is one.
            architecture: open_clip's name of the network of a checkpoint file.
            resize: "pad", the published way; "crop", "squash", or "auto" for the model's own.
            batch_size: images in one forward pass.
            precision: "fp32", "bf16" or "fp16".

        Raises:
            UsageError: no model is named, or it cannot be loaded.
            EnvironmentMissing: open_clip_torch is needed and not installed.
        """
        if model is None:
            raise UsageError(
                "reward 'hps' needs its weights: model=PATH (--reward-model PATH) of HPS_v2.1_compressed.pt from the "
                "hub repository xswu/HPSv2."
            )
        is_file = str(model).endswith((".pt", ".pth", ".bin", ".safetensors"))
        backend = clip_backend(model, device, precision, architecture if is_file else None)
        super().__init__("hps", backend, resize, batch_size)
