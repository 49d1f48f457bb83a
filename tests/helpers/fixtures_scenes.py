"""A tiny random-weight folder of the bundled text-to-image layout, written by the real code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gencontrol.models.networks.image_transformer import PatchConfig, PatchTransformer, backbone_config
from gencontrol.models.networks.transformer import Transformer
from gencontrol.pipelines.backends.audio import ProcessSpec
from gencontrol.recipes.scenes.plan import PROCESS, save_text_to_image
from gencontrol.recipes.scenes.text import build_text_encoder, build_tokenizer
from tests.helpers.fixtures_models import randomise


def tiny_text_to_image(folder: Path, *, size: int = 8, seed: int = 0) -> Path:
    """Write a TextToImagePipeline folder of `size` x `size` RGB images (4x4 patches) and return it."""
    cut = PatchConfig(channels=3, size=size, patch=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PatchTransformer(
            cut, Transformer(backbone_config(cut, classes=16, context=16, dim=16, depth=1, heads=2))
        )
        randomise(network)
    text_encoder = build_text_encoder(seed, width=16, depth=1).eval()
    spec = ProcessSpec(**{**PROCESS, "steps": 3})  # type: ignore[arg-type]  # values of several types
    save_text_to_image(folder, network, text_encoder, build_tokenizer(), spec)
    return folder


def classifier(classes: tuple[str, ...], size: int, channels: int = 3) -> Any:
    """An ImageClassifier with random weights."""
    from gencontrol.models.readers.image_classifier import ImageClassifier, ImageClassifierConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(classes))
        return ImageClassifier(ImageClassifierConfig(classes, channels, size, 8, 8)).requires_grad_(False).eval()
