"""Measured quality of the bundled digit model, and the model card that quotes it.

    gencontrol bench digits-quality --model gencontrol/bundled/digits --run RUN

Generated digits are judged by the bundled classifier and by the nearest test image, which nothing was trained on; their
law is compared with the data's by the maximum mean discrepancy (Gretton et al. 2012), beside the same number for real
training images and for Gaussian noise of the data's mean and covariance.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from gencontrol.config import Count, options
from gencontrol.data.images import png_grid
from gencontrol.files import existing
from gencontrol.models.readers.image_classifier import ImageClassifier, calibration_error
from gencontrol.pipelines import ClassToImagePipeline
from gencontrol.recipes.digits.data import DigitImages, load_digit_images
from gencontrol.reports.card import origin_of_run, write_measured
from gencontrol.rng import stream

#: bandwidths of the Gaussian kernels, in the units of pixels in [-1, 1]; two test digits are about 6 apart
BANDWIDTHS = (2.0, 4.0, 8.0)
#: images of one label that are generated and judged
PER_LABEL = 100


def mmd2(x: Float[Tensor, "n *d"], y: Float[Tensor, "m *d"], bandwidths: Sequence[float] = BANDWIDTHS) -> float:
    """Unbiased squared maximum mean discrepancy, the mean over Gaussian kernels exp(−‖x − y‖²/(2h²)).

    Its expectation is 0 for equal laws, and one estimate may lie a little below 0 (Gretton et al. 2012, eq. 3).
    """
    a, b = x.flatten(1).double(), y.flatten(1).double()
    value = 0.0
    for h in bandwidths:
        within_a, within_b, across = (torch.exp(-torch.cdist(p, q).square() / (2 * h * h)) for p, q in _pairs(a, b))
        n, m = len(a), len(b)
        value += float((within_a.sum() - n) / (n * (n - 1)) + (within_b.sum() - m) / (m * (m - 1)) - 2 * across.mean())
    return value / len(bandwidths)


def _pairs(a: Tensor, b: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    return (a, a), (b, b), (a, b)


def moment_noise(like: Float[Tensor, "n *d"], count: int, seed: int = 0) -> Float[Tensor, "count *d"]:
    """Gaussian samples with the mean and covariance of `like`: what a model that knows only these would draw."""
    flat = like.flatten(1).double()
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    root = vectors * values.clamp_min(0).sqrt()
    noise = torch.randn(count, flat.shape[1], generator=stream(seed, "digits/moments"), dtype=torch.float64)
    return (flat.mean(0) + noise @ root.T).float().reshape(count, *like.shape[1:]).clamp(-1, 1)


def nearest(x: Float[Tensor, "n *d"], to: DigitImages) -> tuple[Float[Tensor, " n"], Int64[Tensor, " n"]]:
    """Euclidean distance of each image to the nearest one of a split, and that one's label."""
    distance, row = torch.cdist(x.flatten(1), to.images.flatten(1)).min(1)
    return distance, to.labels[row]


def generated(pipe: ClassToImagePipeline, labels: Sequence[Any], **call: Any) -> Float[Tensor, "n 1 8 8"]:
    """Images in [0, 1] of a call of the pipeline with these labels and keywords."""
    output: Any = pipe(labels, output_type="pt", **call)
    images: Tensor = output.images
    return images


@torch.no_grad()
def classifier_quality(classifier: ImageClassifier, test: DigitImages) -> dict[str, float]:
    """Accuracy, calibration and size of the classifier on images that it never saw."""
    log_probs = classifier.log_probs(test.images)
    return {
        "images": len(test),
        "accuracy": float((log_probs.argmax(1) == test.labels).double().mean()),
        "negative_log_likelihood": float(F.nll_loss(log_probs, test.labels)),
        "calibration_error": calibration_error(log_probs, test.labels),
        "temperature": classifier.config.temperature,
        "parameters": sum(p.numel() for p in classifier.parameters()),
    }


@torch.no_grad()
def conditional_quality(
    pipe: ClassToImagePipeline, classifier: ImageClassifier, test: DigitImages, *, per_label: int, **call: Any
) -> dict[str, float]:
    """How often generated digits show their label, judged twice, and the worst digit; `call` goes to the pipeline."""
    labels = torch.arange(10).repeat_interleave(per_label)
    made = generated(pipe, list(range(10)), num_images_per_label=per_label, seed=0, **call) * 2 - 1
    right = (classifier(made).argmax(1) == labels).double()
    return {
        "images": len(made),
        "right_by_classifier": float(right.mean()),
        "right_by_classifier_worst_digit": float(right.unflatten(0, (10, per_label)).mean(1).min()),
        "right_by_nearest_test_image": float((nearest(made, test)[1] == labels).double().mean()),
        "mmd2_to_test": mmd2(made, test.images),
    }


@torch.no_grad()
def unconditional_quality(
    pipe: ClassToImagePipeline, classifier: ImageClassifier, train: DigitImages, test: DigitImages, *, count: int
) -> dict[str, float]:
    """Distance of the unconditional law to the data's, evenness over the digits, and distance to training images."""
    made = generated(pipe, [None] * count, seed=1) * 2 - 1
    shares = classifier(made).argmax(1).bincount(minlength=10) / count
    return {
        "images": count,
        "mmd2_to_test": mmd2(made, test.images),
        "mmd2_of_train_to_test": mmd2(train.images, test.images),
        "mmd2_of_gaussian_to_test": mmd2(moment_noise(train.images, count), test.images),
        "smallest_share_of_a_digit": float(shares.min()),
        "largest_share_of_a_digit": float(shares.max()),
        "median_distance_to_nearest_train_image": float(nearest(made, train)[0].median()),
        "median_distance_of_test_to_nearest_train_image": float(nearest(test.images, train)[0].median()),
    }


@torch.no_grad()
def speed(pipe: ClassToImagePipeline, batch: int = 128, repeats: int = 30) -> dict[str, float]:
    """Size of the network, and images per CPU second through the denoiser and the classifier, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, cond = torch.randn(batch, *pipe.latent_shape, generator=stream(0, "digits/speed")), pipe.encode([0] * batch)
    seconds = {}
    for name, call in (
        ("denoiser", lambda: pipe.denoiser(x, 0.5, cond).x0),
        ("classifier", lambda: pipe.classifier(x)),
    ):
        for _ in range(3):
            call()
        begin = time.process_time()
        for _ in range(repeats):
            call()
        seconds[name] = (time.process_time() - begin) / repeats
    torch.set_num_threads(threads)
    return {
        "parameters": sum(p.numel() for p in pipe.network.parameters()),
        **{f"{name}_images_per_second_batch_{batch}_one_thread": batch / value for name, value in seconds.items()},
    }


def measure(model: Path) -> dict[str, dict[str, float]]:
    """Sections of measured numbers of a model folder."""
    pipe = ClassToImagePipeline.from_pretrained(model)
    train, test = load_digit_images("train"), load_digit_images("test")
    judge = pipe.classifier
    conditional = {"per_label": PER_LABEL, "num_inference_steps": 20}
    return {
        "classifier on test images": classifier_quality(judge, test),
        "real test images, judged as generated ones are": {
            "right_by_nearest_train_image": float((nearest(test.images, train)[1] == test.labels).double().mean())
        },
        "conditional, 20 Heun steps, no guidance": conditional_quality(
            pipe, judge, test, **conditional, step="heun", guidance_scale=1.0
        ),
        "conditional, 20 Euler steps, no guidance": conditional_quality(
            pipe, judge, test, **conditional, step="euler", guidance_scale=1.0
        ),
        "conditional, 20 Heun steps, guidance 2": conditional_quality(
            pipe, judge, test, **conditional, step="heun", guidance_scale=2.0
        ),
        "unconditional, 20 Heun steps": unconditional_quality(pipe, judge, train, test, count=1000),
        "speed": speed(pipe),
    }


def write_card(model: Path, sections: Mapping[str, Mapping[str, float]], origin: str) -> None:
    """Write README.md, card.png and measured.json into the model's folder."""
    write_measured(
        model,
        sections,
        title="Digits",
        text="Flow-matching transformer on 8x8 images of handwritten digits, conditional and (condition dropped) "
        "unconditional, with a calibrated classifier. Load with `gencontrol.pipelines.ClassToImagePipeline."
        'from_pretrained("bundled-digits")`; the classifier alone is the reward `digit-class`. Made for trying search, '
        "guidance and training in seconds; good for nothing else.",
        origin=origin,
        source="Data: scikit-learn's `load_digits` (UCI Optical Recognition of Handwritten Digits, test set: 1797 "
        "images by 13 writers, CC BY 4.0), pixels scaled to [-1, 1]. Split by `gencontrol.recipes.digits.data` (36 "
        "images of each digit test, by a hash of the index): 1437 train the flow, 1257 of them the classifier, the "
        "other 180 chose its temperature; 360 are test images.",
        note="`mmd2`: unbiased, Gaussian kernels of bandwidth 2, 4 and 8; `calibration_error`: ten bins of equal mass. "
        "Numbers by `gencontrol bench digits-quality`, also in `measured.json`.",
        caption="Left: ten images of each label, generated (20 Heun steps, no guidance); right: test images",
        picture=("card.png", _picture(model)),
    )


def _picture(model: Path) -> bytes:
    """Ten generated images of each label beside ten test images, one row per label."""
    pipe, test = ClassToImagePipeline.from_pretrained(model), load_digit_images("test")
    made = generated(pipe, list(range(10)), num_images_per_label=10, num_inference_steps=20, seed=0)
    gap = torch.full((1, 1, 8, 8), 0.5)
    rows = []
    for label in range(10):
        real = (test.images[test.labels == label][:10] + 1) / 2
        rows.append(torch.cat([made[label * 10 : (label + 1) * 10], gap, real]))
    return png_grid(torch.cat(rows), columns=21, zoom=4)


@options
class Options:
    """What is measured.

    Args:
        model: folder of the model; the card is written into it.
        run: run folder that made it; the card quotes its record.
        machine: what else the machine did, for the card.
        threads: of the CPU.
    """

    model: str
    run: str
    machine: str = "doing nothing else"
    threads: Count = 1


def main(options: Options) -> None:
    """Measure a model folder, print JSON and write its card."""
    torch.set_num_threads(options.threads)
    model, origin = existing(options.model), origin_of_run(Path(options.run), options.machine)
    sections = measure(model)
    write_card(model, sections, origin)
    print(json.dumps(sections, indent=1))
