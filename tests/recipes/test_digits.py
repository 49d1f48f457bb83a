"""Digits: the split is fixed for good, and what is missing is said; pictures of images."""

from __future__ import annotations

import builtins
import hashlib
import io

import pytest
import torch
from PIL import Image

from gencontrol.data.images import png_grid, to_pil
from gencontrol.errors import EnvironmentMissing, UsageError
from gencontrol.recipes.digits.data import CLASSES, load_digit_images


def test_the_split_is_recorded() -> None:
    train, test, calibration = (load_digit_images(name) for name in ("train", "test", "calibration"))
    assert (len(train), len(test), len(calibration)) == (1437, 360, 180)
    assert sorted([*train.index.tolist(), *test.index.tolist()]) == list(range(1797))
    assert set(calibration.index.tolist()) < set(train.index.tolist())
    assert test.labels.bincount().tolist() == [36] * 10 and calibration.labels.bincount().tolist() == [18] * 10
    # the bundled weights were trained on exactly this split; a change of it needs new weights
    record = {name: hashlib.sha256(str(part.index.tolist()).encode()).hexdigest()[:16]
              for name, part in (("test", test), ("calibration", calibration))}  # fmt: skip
    assert record == {"test": "8d99766ae6d98ebe", "calibration": "0d58ec57b18fa4af"}


def test_images_and_conditions(fenced_rng: None) -> None:
    test = load_digit_images("test")
    assert test.images.shape == (360, 1, 8, 8) and test.images.dtype == torch.float32
    assert float(test.images.min()) == -1.0 and float(test.images.max()) == 1.0
    x, cond = test.latents().read([5, 0], [0, 0])
    assert torch.equal(x, test.images[[5, 0]])
    assert torch.equal(cond["pooled"].argmax(1), test.labels[[5, 0]]) and not cond["drop"].any()
    assert test.latents().text(5) == CLASSES[int(test.labels[5])]


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no split 'val'"):
        load_digit_images("val")  # type: ignore[arg-type]
    real = builtins.__import__

    def without(name: str, *rest: object, **named: object) -> object:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EnvironmentMissing, match=r"gencontrol\[bench\]"):
        load_digit_images("test")


def test_png_grid_puts_images_row_by_row() -> None:
    images = torch.stack([torch.full((1, 2, 3), value) for value in (0.0, 0.2, 1.0)])
    pixels = torch.tensor(list(Image.open(io.BytesIO(png_grid(images, columns=2, zoom=2))).getdata())).reshape(10, 14)
    assert pixels[0, 0] == 0 and pixels[3, 12] == 51 and pixels[5, 5] == 255
    assert pixels[4, 0] == 128 and pixels[0, 6] == 128 and bool((pixels[5:, 7:] == 128).all())  # gaps, missing image


def test_to_pil_clips_and_refuses() -> None:
    assert list(to_pil(torch.tensor([[[-1.0, 0.5, 2.0]]])).getdata()) == [0, 128, 255]
    assert to_pil(torch.zeros(3, 2, 2)).mode == "RGB"
    with pytest.raises(UsageError, match=r"\[1 h w\]"):
        to_pil(torch.zeros(2, 2, 2))
