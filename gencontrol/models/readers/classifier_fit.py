"""Fit and calibrate a classifier of small images from few labels (CTRL step 1).

The temperature is chosen on images that a classifier did not see (Guo et al. 2017).  With few labels a validation
split would cost too many of them, so it is cross-fitted: `folds` classifiers each predict what they did not learn from,
one temperature is fitted to all those predictions, and the classifier that is returned learned from everything (ours).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from gencontrol.errors import UsageError
from gencontrol.models.readers.image_classifier import ImageClassifier, ImageClassifierConfig, fit_temperature
from gencontrol.rng import stream, stream_seed

#: share of the labels that a single split (folds = 1) sets aside
_HELD_OUT = 0.2


def check_labels(images: Tensor, labels: Tensor, classes: Sequence[str], least: int) -> None:
    """Check that every class has enough examples.

    Raises:
        UsageError: lengths differ, a label is no class, or a class has fewer than `least` images.
    """
    if len(images) != len(labels) or labels.ndim != 1 or labels.is_floating_point():
        raise UsageError(f"{len(images)} images with labels {list(labels.shape)} {labels.dtype}; give one int64 each.")
    if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= len(classes):
        raise UsageError(f"labels must be numbers from 0 to {len(classes) - 1} ({', '.join(classes)}).")
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    few = [f"{name} ({count})" for name, count in zip(classes, counts, strict=True) if count < least]
    if few:
        raise UsageError(
            f"too few labelled images of {', '.join(few)}: each class needs at least {least}; label more, or leave the "
            "class out."
        )


def fit_classifier(
    images: Float[Tensor, "n c s s"],
    labels: Int64[Tensor, " n"],
    classes: Sequence[str],
    *,
    folds: int = 5,
    steps: int = 150,
    batch: int = 32,
    lr: float = 2e-3,
    weight_decay: float = 1e-2,
    noise: float = 0.3,
    width: int = 24,
    seed: int = 0,
) -> tuple[ImageClassifier, float]:
    """Return a calibrated classifier, and the share of images that are recognised by one that did not see them.

    Args:
        images: in [-1, 1], square, even side.
        labels: numbers of `classes`, 0 and up.
        folds: ≥ 2 cross-fits the temperature; 1 sets a fifth of each class aside, which then teaches nothing.
        steps, batch, lr, weight_decay: of AdamW with a cosine rate.
        noise: standard deviation of the noise on training images, a smoother for the gradients that CTRL climbs (ours).
        width: of the convolutions.
        seed: of initial weights, batches and folds.

    Raises:
        UsageError: labels that do not fit, or a class with too few images.
    """
    if folds < 1:
        raise UsageError(f"folds is {folds}; give 1 (one split) or more.")
    check_labels(images, labels, classes, max(2, min(folds, 5) if folds > 1 else 2))
    place = fold_of(labels, folds, seed)
    config = ImageClassifierConfig(tuple(classes), images.shape[1], images.shape[2], width)

    def train(rows: Tensor, name: str) -> ImageClassifier:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "classifier/init", name))
            model = ImageClassifier(config).to(images.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = stream(seed, "classifier/batch", name)
        for _ in range(steps):
            chosen = rows[torch.randint(len(rows), (batch,), generator=generator)]
            shaken = images[chosen] + noise * torch.randn(batch, *images.shape[1:], generator=generator).to(images)
            loss = F.cross_entropy(model(shaken), labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        return model.requires_grad_(False).eval()

    if folds == 1:
        model = train((place != 0).nonzero()[:, 0], "split")
        model.calibrate(images[place == 0], labels[place == 0])
        return model, accuracy(model(images[place == 0]), labels[place == 0])
    unseen = torch.zeros(len(images), len(classes))
    for fold in range(folds):
        part = train((place != fold).nonzero()[:, 0], f"fold{fold}")
        with torch.no_grad():
            unseen[place == fold] = part(images[place == fold]).float().cpu()
    model = train(torch.arange(len(images)), "all")
    return calibrated(model, fit_temperature(unseen, labels.cpu())), accuracy(unseen, labels.cpu())


def accuracy(logits: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"]) -> float:
    """Return the share of rows whose largest logit is the label's."""
    return float((logits.argmax(1) == labels).float().mean())


def calibrated(model: ImageClassifier, temperature: float) -> ImageClassifier:
    """Return the classifier with this temperature."""
    from dataclasses import replace

    model.config = replace(model.config, temperature=temperature)
    return model


def calibrate(model: ImageClassifier, images: Float[Tensor, "n c s s"], labels: Int64[Tensor, " n"]) -> float:
    """Choose a classifier's temperature on a validation split that it did not learn from; returns it.

    Raises:
        UsageError: labels that do not fit, or a class without an example.
    """
    check_labels(images, labels, model.config.classes, 1)
    return model.calibrate(images, labels)


def fold_of(labels: Int64[Tensor, " n"], folds: int, seed: int) -> Int64[Tensor, " n"]:
    """Fold of every image, each class spread evenly; with one fold, 0 is the part set aside and 1 the rest."""
    place = torch.zeros_like(labels)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=stream(seed, "classifier/folds", label))
        if folds == 1:
            place[members] = 1
            place[members[order[: max(1, round(_HELD_OUT * len(members)))]]] = 0
        else:
            place[members[order]] = torch.arange(len(members)) % folds
    return place
