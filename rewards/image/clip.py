"""CLIP score: cosine of the image embedding of a sample and the text embedding of its prompt (arXiv 2103.00020)."""

from __future__ import annotations

from pathlib import Path

import torch

from gencontrol.rewards.image.clip_backend import ClipEmbeddings, FitImage, Precision, clip_backend
from gencontrol.rewards.image.preference import CLIP_MODEL, Similarity


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
        factor = backend.logit_scale if logit_scale else 1.0
        super().__init__("clip", ClipEmbeddings(backend, resize, batch_size), factor)
