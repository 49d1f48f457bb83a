"""What digit pretraining is made of: the network's sizes, the images and the settings that make the bundled model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: the [process] section unless another is given: rectified flow
PROCESS = {"schedule": "linear", "prediction": "velocity", "step": "heun", "steps": 20, "guidance_scale": 1.0}


@dataclass(frozen=True)
class DigitsRun:
    """The [run] section of digit pretraining; the images come with scikit-learn.

    Args:
        stage: digits; not meant to be set.
        output: the run folder (default: runs/STAGE).
    """

    stage: str
    output: str = ""


@dataclass(frozen=True)
class DigitsModel:
    """The [model] section: patch size in pixels and sizes of the transformer (see `TransformerConfig`)."""

    patch: int = 4
    dim: int = 128
    depth: int = 3
    heads: int = 4
    mlp_ratio: float = 4.0


def train_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of [train] that make the bundled model in a few minutes on two cores."""
    steps = given.get("steps", 3500)
    if not isinstance(steps, int):
        return {}
    return {
        "steps": steps,
        "lr": 2e-3,
        "lr_schedule": "cosine",
        "warmup": min(200, steps // 10),
        "weight_decay": 0.01,
        "micro_batch": 128,
        "save_every": max(1, steps // 4),
        "eval_every": max(1, steps // 4),
    }


def make_digits(algorithm: Any, options: Any, sizes: DigitsModel, spec: Any, *, seed: int, device: str) -> Any:
    """Assemble network and classifier with fresh weights and return the pretraining algorithm on the images."""
    import torch

    from gencontrol.errors import UsageError
    from gencontrol.models.networks.image_transformer import PatchConfig, PatchTransformer, backbone_config
    from gencontrol.models.networks.transformer import Transformer
    from gencontrol.models.readers.image_classifier import build_image_classifier
    from gencontrol.pipelines import ClassToImagePipeline
    from gencontrol.recipes.digits.data import CLASSES, load_digit_images

    splits = {name: load_digit_images(name) for name in ("train", "calibration", "test")}
    try:
        cut = PatchConfig(channels=1, size=8, patch=sizes.patch)
        shape = backbone_config(
            cut,
            classes=len(CLASSES),
            dim=sizes.dim,
            depth=sizes.depth,
            heads=sizes.heads,
            mlp_ratio=sizes.mlp_ratio,
        )
    except ValueError as error:
        raise UsageError(f"[model] {error}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PatchTransformer(cut, Transformer(shape)).to(device)
    classifier = build_image_classifier(seed, CLASSES).to(device)
    return algorithm(
        spec.denoiser(network),
        classifier,
        splits["train"],
        options,
        calibration=splits["calibration"],
        held_out=splits["test"],
        seed=seed,
        save=lambda folder: ClassToImagePipeline(
            transformer=network, classifier=classifier, process=spec
        ).save_pretrained(folder),
    )
