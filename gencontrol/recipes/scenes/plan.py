"""What scene pretraining is made of: the sizes of network and text encoder, and the settings of the bundled model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: the [process] section unless another is given: rectified flow
PROCESS = {"schedule": "linear", "prediction": "velocity", "step": "euler", "steps": 20, "guidance_scale": 1.0}


@dataclass(frozen=True)
class ScenesRun:
    """The [run] section of scene pretraining; the images are drawn as they are needed.

    Args:
        stage: scenes or scene-readers; not meant to be set.
        output: the run folder (default: runs/STAGE).
    """

    stage: str
    output: str = ""


@dataclass(frozen=True)
class CaptionedRun(ScenesRun):
    """The [run] section of the generator's pretraining.

    Args:
        words: share of word captions, in [0, 1].
    """

    words: float = 0.06

    def __post_init__(self) -> None:
        if not 0.0 <= self.words <= 1.0:
            raise ValueError(f"words = {self.words}; expected a share in [0, 1]")


@dataclass(frozen=True)
class ScenesModel:
    """The [model] section: patch size in pixels, sizes of the transformer and of the text encoder."""

    patch: int = 4
    dim: int = 128
    depth: int = 5
    heads: int = 4
    mlp_ratio: float = 4.0
    text_width: int = 128
    text_depth: int = 3


def train_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of [train]: about 40 minutes on one core; the bundled model went on with more words (see its card)."""
    steps = given.get("steps", 9000)
    if not isinstance(steps, int):
        return {}
    return {
        "steps": steps,
        "lr": 1.2e-3,
        "lr_schedule": "cosine",
        "warmup": min(150, steps // 10),
        "weight_decay": 0.01,
        "micro_batch": 32,
        "precision": "auto",
        "save_every": max(1, steps // 12),
        "eval_every": max(1, steps // 6),
    }


def make_scenes(
    algorithm: Any, options: Any, sizes: ScenesModel, spec: Any, *, seed: int, device: str, words: float
) -> Any:
    """Assemble network and text encoder with fresh weights and return the pretraining algorithm on the scenes."""
    import torch

    from gencontrol.errors import UsageError
    from gencontrol.models.networks.image_transformer import PatchConfig, PatchTransformer, backbone_config
    from gencontrol.models.networks.transformer import Transformer
    from gencontrol.recipes.scenes.data.corpus import SceneCorpus
    from gencontrol.recipes.scenes.data.render import SIDE
    from gencontrol.recipes.scenes.text import CaptionedNetwork, build_text_encoder, build_tokenizer

    try:
        cut = PatchConfig(channels=3, size=SIDE, patch=sizes.patch)
        shape = backbone_config(
            cut,
            classes=sizes.text_width,
            context=sizes.text_width,
            dim=sizes.dim,
            depth=sizes.depth,
            heads=sizes.heads,
            mlp_ratio=sizes.mlp_ratio,
        )
        text_encoder = build_text_encoder(seed, width=sizes.text_width, depth=sizes.text_depth)
    except ValueError as error:
        raise UsageError(f"[model] {error}") from error
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = CaptionedNetwork(text_encoder, PatchTransformer(cut, Transformer(shape))).to(device)
    return algorithm(
        spec.denoiser(network),
        SceneCorpus(tokenizer, "train", seed=seed, words=words),
        options,
        held_out=SceneCorpus(tokenizer, "test", seed=seed, words=words),
        seed=seed,
        save=lambda folder: save_text_to_image(folder, network.transformer, text_encoder, tokenizer, spec),
    )


def save_text_to_image(folder: Path, transformer: Any, text_encoder: Any, tokenizer: Any, spec: Any) -> None:
    """Write the folder of a TextToImagePipeline; weights are stored in half precision and loaded in single."""
    import torch

    from gencontrol.pipelines.backends.audio import write_index
    from gencontrol.recipes.scenes.text import save_text

    folder.mkdir(parents=True, exist_ok=True)
    transformer.save_pretrained(folder / "transformer", torch.float16)
    save_text(folder, text_encoder, tokenizer)
    spec.write(folder)
    write_index(
        folder,
        "TextToImagePipeline",
        {
            "transformer": ("gencontrol", "PatchTransformer"),
            "text_encoder": ("transformers", type(text_encoder).__name__),
            "tokenizer": ("transformers", type(tokenizer).__name__),
        },
    )


def readers_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of [train] that make the bundled reader and judge in about 25 minutes on one core."""
    steps = given.get("steps", 4000)
    if not isinstance(steps, int):
        return {}
    return {
        "steps": steps,
        "lr": 3e-3,
        "lr_schedule": "cosine",
        "warmup": min(100, steps // 10),
        "weight_decay": 0.01,
        "micro_batch": 64,
        "save_every": max(1, steps // 10),
        "eval_every": max(1, steps // 5),
    }


def make_readers(algorithm: Any, options: Any, *, seed: int, device: str) -> Any:
    """Draw both scene networks from the seed and return the pretraining algorithm on them."""
    import torch

    from gencontrol.recipes.scenes.networks import SceneJudge, SceneReader

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader, judge = SceneReader().to(device), SceneJudge().to(device)
    return algorithm(reader, judge, options, seed=seed)
