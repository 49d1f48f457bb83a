"""Small pipelines and rewards that tests of searches share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gencontrol.models.exact import GaussianMixture
from gencontrol.models.networks.image_transformer import PatchConfig, PatchTransformer, backbone_config
from gencontrol.models.networks.transformer import Transformer
from gencontrol.models.readers.image_classifier import build_image_classifier
from gencontrol.pipelines import ClassToImagePipeline, ProcessSpec, TreeSearchPipeline
from gencontrol.pipelines.search.problem import Problem
from gencontrol.process import GaussianProcess, Linear
from gencontrol.recipes.digits.data import CLASSES
from gencontrol.rewards.base import checked
from gencontrol.types import RewardContext, RewardOut
from tests.helpers.fixtures_models import randomise, seeded

STEPS = 4
PATH = STEPS  # model calls of one path


def brightness(images: Tensor) -> Tensor:
    """A differentiable reward of decoded samples."""
    return images.flatten(1).mean(1)


class Watcher:
    """A reward of our own kind that remembers what it was given."""

    name, kind, differentiable = "watcher", "item", True

    def __init__(self) -> None:
        self.samples: list[Tensor] = []
        self.contexts: list[RewardContext] = []

    def __call__(self, samples: Tensor, context: RewardContext) -> RewardOut:
        self.samples.append(samples)
        self.contexts.append(context)
        return checked(self.name, brightness(samples), len(samples))


def tiny_digits() -> ClassToImagePipeline:
    """A ClassToImagePipeline with random weights, 4 steps, guided."""
    cut = PatchConfig(patch=4)
    with seeded(0):
        network = PatchTransformer(cut, Transformer(backbone_config(cut, classes=10, dim=16, depth=1, heads=2)))
        randomise(network)
    spec = ProcessSpec(steps=STEPS, guidance_scale=2.0)
    return ClassToImagePipeline(transformer=network.eval(), classifier=build_image_classifier(0, CLASSES), process=spec)


def search_of(pipe: Any, reward: Any = brightness, **more: Any) -> TreeSearchPipeline:
    return TreeSearchPipeline(pipe, reward, **{"temperature": 0.02, **more})


def rows_of(network: torch.nn.Module) -> list[int]:
    """Batch sizes of the calls of a network, from now on."""
    rows: list[int] = []
    network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    return rows


class Plane:
    """A Searchable of a user's: a standard normal law in two dimensions, whose denoiser is exact."""

    kind = "audio"

    def problem(self, prompt: str, *, num_inference_steps: int = 60) -> Problem:
        model = GaussianMixture(torch.zeros(1, 2), torch.eye(2)[None], torch.ones(1), GaussianProcess(Linear()))
        return Problem(model, None, (2,), num_inference_steps, None, lambda x: x, [prompt], 1)

    def at_work(self) -> AbstractContextManager[None]:
        return nullcontext()
