"""Handwritten digits of 8x8 pixels: scikit-learn's `load_digits` as tensors, with a split that never changes.

1797 images of the UCI "Optical Recognition of Handwritten Digits" test set (Alpaydin & Kaynak 1998), 17 grey levels.
An image belongs to the test split, or to the part of the training split that calibrates a classifier, by a hash of its
index: the split is the same on every machine and for every version of every library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gencontrol.errors import EnvironmentMissing, UsageError
from gencontrol.recipes.sound.latents import LatentDataset
from gencontrol.rng import stream_seed

#: names of the classes, in the order of their labels
CLASSES = tuple("0123456789")
#: images of each digit in the test split (360 of 1797), and in the calibration part of the training split (180 of 1437)
TEST_PER_CLASS, CALIBRATION_PER_CLASS = 36, 18


@dataclass(frozen=True)
class DigitImages:
    """Images with labels.

    Args:
        images: [n 1 8 8] float32 in [-1, 1]; -1 is background.
        labels: [n] int64, 0 to 9.
        index: [n] int64, place in `load_digits`.
    """

    images: Float[Tensor, "n 1 8 8"]
    labels: Int64[Tensor, " n"]
    index: Int64[Tensor, " n"]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def take(self, rows: Int64[Tensor, " m"]) -> DigitImages:
        """Return some rows, in this order."""
        return DigitImages(self.images[rows], self.labels[rows], self.index[rows])

    def latents(self) -> LatentDataset:
        """Return the images as pretraining data: the condition is the one-hot label, the text its digit."""
        return LatentDataset(self.images, self.labels[:, None], {"pooled": torch.eye(len(CLASSES))}, CLASSES)


def load_digit_images(split: Literal["train", "test", "calibration", "all"]) -> DigitImages:
    """Return a split: "train" 1437 images, "test" 360, "calibration" 180 of the training images, or "all" 1797.

    Raises:
        UsageError: another name.
        EnvironmentMissing: scikit-learn, which holds the images, is not installed.
    """
    if split not in ("train", "test", "calibration", "all"):
        raise UsageError(f"digits have no split '{split}'; give train, test, calibration or all.")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise EnvironmentMissing(
            'the digit images come with scikit-learn, which is not installed; pip install "gencontrol[bench]". '
            "(The bundled model needs no images.)"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8.0 - 1.0
    whole = DigitImages(images, torch.from_numpy(labels).long(), torch.arange(len(images)))
    return whole if split == "all" else whole.take(split_rows(whole.labels, split))


def split_rows(labels: Int64[Tensor, " n"], split: Literal["train", "test", "calibration"]) -> Int64[Tensor, " m"]:
    """Return the rows of a split in rising order: in each class the smallest hashes test, the next ones calibrate."""
    first, last = {
        "test": (0, TEST_PER_CLASS),
        "calibration": (TEST_PER_CLASS, TEST_PER_CLASS + CALIBRATION_PER_CLASS),
        "train": (TEST_PER_CLASS, None),
    }[split]
    rows: list[int] = []
    for label in range(len(CLASSES)):
        members = (labels == label).nonzero()[:, 0].tolist()
        members.sort(key=lambda row: stream_seed(0, "digits/split", row))
        rows += members[first:last]
    return torch.tensor(sorted(rows), dtype=torch.long)
