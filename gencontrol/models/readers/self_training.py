"""Classifiers that deserve trust: augmentation, an ensemble, and self-training on what the base makes (ours).

A control climbs wherever its classifier is wrong, and it meets the base's samples, not the labelled images.  So several
classifiers learn from augmented images, each without one fold; their calibrated mean labels samples of the base; and
one classifier, the one returned, learns from both.  Give labels of some base samples too, and a class for what is none
of the others, where the base makes such: without it they fall into a class that they do not belong to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from gencontrol.models.readers.classifier_fit import accuracy, check_labels, fold_of
from gencontrol.models.readers.image_classifier import ImageClassifier, ImageClassifierConfig, fit_temperature
from gencontrol.rng import stream, stream_seed

#: images [n c s s], generator → images of the same classes
Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Affine:
    """Small turns, shears, scalings and shifts, uniform within ± these numbers: radians, shares, shares of the side."""

    turn: float = 0.25
    scale: float = 0.15
    shift: float = 0.12

    def __call__(self, images: Float[Tensor, "n c s s"], generator: torch.Generator) -> Float[Tensor, "n c s s"]:
        """Transform every image by a draw of its own; edges are repeated."""
        draw = 2 * torch.rand(len(images), 6, generator=generator) - 1
        angle, grow, wide = draw[:, 0] * self.turn, 1 + draw[:, 1] * self.scale, 1 + draw[:, 2] * self.scale
        lean = draw[:, 3] * self.turn
        rows = [
            torch.stack([grow * angle.cos(), -wide * (angle + lean).sin(), 2 * self.shift * draw[:, 4]], 1),
            torch.stack([grow * angle.sin(), wide * angle.cos(), 2 * self.shift * draw[:, 5]], 1),
        ]
        grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid.to(images), padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class Mixed:
    """Flips and, for labels that do not depend on colour, channels in any order: breaks "red means small"."""

    flip: bool = True
    channels: bool = False

    def __call__(self, images: Float[Tensor, "n c s s"], generator: torch.Generator) -> Float[Tensor, "n c s s"]:
        """Transform every image by a draw of its own."""
        if self.flip:
            for axis in (2, 3):
                turned = torch.rand(len(images), generator=generator) < 0.5
                images = torch.where(turned[:, None, None, None], images.flip(axis), images)
        if self.channels:
            order = torch.rand(images.shape[:2], generator=generator).argsort(1)
            images = images.gather(1, order[..., None, None].expand_as(images))
        return images


@dataclass(frozen=True)
class Budget:
    """Updates of the members and of the final classifier, images of an update (as many again of the base's), rate."""

    member_steps: int = 300
    final_steps: int = 600
    batch: int = 32
    lr: float = 2e-3
    noise: float = 0.2


def fit_self_trained(
    images: Float[Tensor, "n c s s"],
    labels: Int64[Tensor, " n"],
    classes: Sequence[str],
    base: Float[Tensor, "m c s s"],
    *,
    augment: Augment,
    members: int = 4,
    budget: Budget | None = None,
    width: int = 24,
    seed: int = 0,
) -> ImageClassifier:
    """Return a classifier that learned from labelled images and from samples of the base.

    Its `config.held_out` is the share of labelled images that a member which did not see them recognised.

    Args:
        images, base: in [-1, 1], square, even side; `base` are unlabelled samples of the model to be controlled.
        labels: numbers of `classes`, 0 and up.
        augment: keeps the class of an image.
        members: of the ensemble, ≥ 2; each leaves one fold out.

    Raises:
        UsageError: labels that do not fit, or a class with fewer than 2 images.
    """
    check_labels(images, labels, classes, 2)
    budget = budget or Budget()
    place = fold_of(labels, members, seed)
    config = ImageClassifierConfig(tuple(classes), images.shape[1], images.shape[2], width)
    hard = F.one_hot(labels, len(classes)).float()
    unseen, soft = torch.zeros(len(images), len(classes)), torch.zeros(len(base), len(classes))
    members_found = []
    for fold in range(members):
        rows = (place != fold).nonzero()[:, 0]
        member = _train(config, images[rows], hard[rows], None, augment, budget.member_steps, budget, seed, f"{fold}")
        with torch.no_grad():
            unseen[place == fold] = member(images[place == fold]).float()
        members_found.append(member)
    temperature, held = fit_temperature(unseen, labels), accuracy(unseen, labels)
    with torch.no_grad():
        for member in members_found:
            for part in torch.arange(len(base)).split(512):
                soft[part] += torch.softmax(member(base[part]) / temperature, 1) / members
    final = _train(config, images, hard, (base, soft), augment, budget.final_steps, budget, seed, "final")
    if temperature_at_end(temperature):  # keep what `check_classifiers` refuses
        final.config = replace(final.config, temperature=temperature)
    final.config = replace(final.config, held_out=held)
    return final


def temperature_at_end(temperature: float) -> bool:
    """Whether a fitted temperature has no minimum inside its search."""
    from gencontrol.models.readers.image_classifier import TEMPERATURES

    return not TEMPERATURES[0] * 1.02 < temperature < TEMPERATURES[1] / 1.02


def _train(
    config: ImageClassifierConfig,
    images: Tensor,
    targets: Tensor,
    base: tuple[Tensor, Tensor] | None,
    augment: Augment,
    steps: int,
    budget: Budget,
    seed: int,
    name: str,
) -> ImageClassifier:
    """Train one classifier on soft targets; labelled images alone, or half of every batch from the base's samples."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "self-training/init", name))
        model = ImageClassifier(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=budget.lr, weight_decay=1e-2, fused=True)
    generator = stream(seed, "self-training/batch", name)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = budget.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = torch.randint(len(images), (budget.batch,), generator=generator)
        x, y = images[chosen], targets[chosen]
        if base is not None:
            more = torch.randint(len(base[0]), (2 * budget.batch,), generator=generator)
            x, y = torch.cat([x, base[0][more]]), torch.cat([y, base[1][more]])
        x = augment(x, generator)
        x = x + budget.noise * torch.randn(x.shape, generator=generator)
        loss = -(y * torch.log_softmax(model(x), 1)).sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False).eval()
