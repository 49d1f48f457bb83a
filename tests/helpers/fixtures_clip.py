"""Tiny CLIP models of the real classes, written by save_pretrained, and pictures to score."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def write_clip(folder: Path, *, edge: int = 24, seed: int = 0, size: int | None = None, squash: bool = False) -> Path:
    """Save a random CLIPModel with tokenizer and preprocessor_config.json as the hub lays them out."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(97, 123)]
    vocabulary = letters + [f"{c}</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16).save_pretrained(folder)
    text = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=vocabulary.index("<|startoftext|>"),
        eos_token_id=vocabulary.index("<|endoftext|>"),
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=edge, patch_size=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32)
        CLIPModel(config).save_pretrained(folder)
    box = {"height": edge, "width": edge}
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": box if squash else {"shortest_edge": size or edge},
        "resample": 3,
        "do_center_crop": not squash,
        "crop_size": box,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def pictures(count: int = 4, height: int = 40, width: int = 40, seed: int = 0) -> torch.Tensor:
    """Smooth pictures with edges, in eight bits as [0, 1] floats, so that a PIL round trip is exact."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    images[:, :, height // 4 : height // 2, width // 4 : width // 2] = torch.rand(count, 3, 1, 1, generator=generator)
    return (images * 255).round() / 255


def as_pil(images: torch.Tensor) -> list:
    """PIL images of a batch in [0, 1]."""
    from PIL import Image

    arrays = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]
