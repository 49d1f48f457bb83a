"""ImageClassifier: calibration has its known optimum, gradients reach pixels, folders load frozen."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from gencontrol.errors import UsageError
from gencontrol.models.readers.image_classifier import (
    ImageClassifierConfig,
    build_image_classifier,
    calibration_error,
    fit_temperature,
)

CLASSES = ("a", "b", "c")


def images(n: int = 6) -> torch.Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def sampled(n: int = 40_000, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and labels drawn from softmax(logits); the logits that are returned are `scale` times too large."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(n, 3, generator=g) * 1.5
    labels = torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]
    return logits * scale, labels


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_temperature_undoes_a_scale(scale: float) -> None:
    """Labels drawn from softmax(logits): the best temperature of logits·scale is scale (sd of the estimate 0.8 %)."""
    assert fit_temperature(*sampled(scale=scale)) == pytest.approx(scale, rel=0.03)


def test_perfect_answers_do_not_make_certain() -> None:
    """Three items, all right with margin 1: p(right) = 4/5 by Platt's rule, so exp(1/T) = 8."""
    assert fit_temperature(torch.eye(3), torch.arange(3)) == pytest.approx(1 / math.log(8), rel=1e-6)


def test_calibration_error_sees_overconfidence() -> None:
    logits, labels = sampled()
    honest = calibration_error(logits.log_softmax(1), labels)
    assert honest < 0.01  # 4000 items in a bin: sd of an accuracy at most 0.008, mean of ten absolute values 0.004
    boastful = calibration_error((4 * logits).log_softmax(1), labels)
    confidence = (4 * logits).softmax(1).amax(1).mean()
    accuracy = (logits.argmax(1) == labels).float().mean()
    assert boastful == pytest.approx(float(confidence - accuracy), abs=0.01)  # overconfident in every bin


def test_log_probs_are_normalised_tempered_and_differentiable(fenced_rng: None) -> None:
    net = build_image_classifier(0, CLASSES)
    x, labels = images(), torch.tensor([0, 1, 2, 0, 1, 2])
    before = net(x).detach()
    temperature = net.calibrate(x, labels)
    assert temperature == net.config.temperature != 1.0
    x.requires_grad_(True)
    log_probs = net.log_probs(x)
    torch.testing.assert_close(log_probs, (before / temperature).log_softmax(1))
    assert torch.equal(net(x), before)  # logits are as they were
    log_probs[:, 0].sum().backward()
    step = 1e-3 * x.grad / x.grad.norm()  # type: ignore[union-attr,operator]
    with torch.no_grad():
        rise = (net.log_probs(x + step)[:, 0] - net.log_probs(x - step)[:, 0]).sum() / 2e-3
    # a central difference along the gradient is its length; float32 rounding of the difference is about 1e-3 of it
    torch.testing.assert_close(rise, x.grad.norm(), rtol=2e-2, atol=1e-4)  # type: ignore[union-attr]


def test_folder_loads_frozen_with_its_temperature(tmp_path: Path) -> None:
    net = build_image_classifier(1, CLASSES)
    net.calibrate(images(), torch.tensor([0, 1, 2, 2, 2, 2]))
    net.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path)
    assert again.config == net.config and not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert torch.equal(again.log_probs(images()), net.log_probs(images()))
    table = json.loads((tmp_path / "config.json").read_text())
    for wrong in ({**table, "depth": 3}, {**table, "width": 32}, {**table, "temperature": 0.0}):
        (tmp_path / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(UsageError, match="no folder of an ImageClassifier") as caught:
            type(net).from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"takes \[1, 8, 8\]"):
        net(torch.zeros(2, 1, 9, 9))
    with pytest.raises(ValueError, match="even size"):
        ImageClassifierConfig(CLASSES, size=7)
