"""Digit pretraining: the contract, what teaches the classifier, that both parts learn, and the temperature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gencontrol.algorithms.base import StepContext
from gencontrol.errors import UsageError
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.networks.image_transformer import PatchConfig, PatchTransformer, backbone_config
from gencontrol.models.networks.transformer import Transformer
from gencontrol.models.readers.image_classifier import ImageClassifier, build_image_classifier, fit_temperature
from gencontrol.process import GaussianProcess, Linear
from gencontrol.recipes.digits.data import CLASSES, DigitImages
from gencontrol.recipes.digits.train import DigitMicro, DigitsPretrain, DigitsPretrainConfig, distort
from gencontrol.testing.algorithm import AlgorithmContract


def data(n: int = 40) -> DigitImages:
    """Label k is a bright row at height k mod 8, with a little noise; easy to tell apart, no library needed."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 10
    images = torch.full((n, 1, 8, 8), -1.0)
    images[torch.arange(n), 0, labels % 8] = 0.5
    images[labels >= 8, :, :, 0] = 1.0
    return DigitImages(images + 0.05 * torch.randn(images.shape, generator=g), labels, torch.arange(n))


def make(save: Any = None, **options: Any) -> DigitsPretrain:
    cut = PatchConfig(patch=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = PatchTransformer(cut, Transformer(backbone_config(cut, classes=10, dim=16, depth=1, heads=2)))
        torch.nn.init.normal_(network.backbone.out.weight, std=0.1)
    settings = {"batch": 8, "teach": 5, "eval_items": 6, "eval_samples": 10, "eval_steps": 2, **options}
    whole = data()
    return DigitsPretrain(
        Denoiser(network, GaussianProcess(Linear()), "velocity"),
        build_image_classifier(0, CLASSES),
        whole,
        DigitsPretrainConfig(**settings),
        calibration=whole.take(torch.arange(30, 40)),
        held_out=data(20),
        seed=1,
        save=save,
    )


class TestContract(AlgorithmContract):
    def make(self) -> DigitsPretrain:
        return make()


def context(step: int = 0, **changes: Any) -> StepContext:
    return StepContext(seed=1, step=step, **{"micro_batch": 8, **changes})


def micros(algorithm: DigitsPretrain, step: int = 0, **changes: Any) -> list[DigitMicro]:
    ctx = context(step, **changes)
    return list(algorithm.minibatches(algorithm.collect(ctx).data, 0, ctx))  # type: ignore[arg-type]


def test_who_teaches_the_classifier(fenced_rng: None) -> None:
    """The first five of eight items, unless they are kept for calibration (items 30 to 39); whatever the split."""
    algorithm = make()
    for step in range(10):
        rows = [algorithm._item(p) for p in range(8 * step, 8 * step + 8)]
        expected = [algorithm._labels[r] for r in rows[:5] if r < 30]
        whole = micros(algorithm, step)[0]
        assert whole.labels.tolist() == [int(label) for label in expected]
        parts = micros(algorithm, step, micro_batch=3)
        assert torch.equal(torch.cat([p.images for p in parts]), whole.images)
        ranks = [micros(algorithm, step, rank=r, world_size=2)[0] for r in range(2)]
        assert sorted(torch.cat([r.labels for r in ranks]).tolist()) == sorted(whole.labels.tolist())


def test_distort_moves_as_it_says() -> None:
    images = data(3).images
    still = distort(images, torch.zeros(3, 4), rotation=12.0, zoom=0.1, shift=1.0)
    torch.testing.assert_close(still, images, atol=1e-5, rtol=0)  # bilinear weights of whole pixels, float32
    draws = torch.tensor([[0.0, 0.0, 0.0, 1.0]]).expand(3, 4)
    moved = distort(images, draws, rotation=12.0, zoom=0.1, shift=1.0)
    torch.testing.assert_close(moved[:, :, :7], images[:, :, 1:], atol=1e-5, rtol=0)  # one pixel up
    assert bool((moved[:, :, 7] + 1).abs().max() < 1e-5)  # and background comes in
    quarter = distort(images, torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(3, 4), rotation=90.0, zoom=0.0, shift=0.0)
    turned = images.rot90(1, (2, 3))
    assert torch.allclose(quarter, turned, atol=1e-4) or torch.allclose(quarter, turned.rot90(2, (2, 3)), atol=1e-4)


def test_loss_is_the_sum_of_both() -> None:
    algorithm = make()
    micro = micros(algorithm)[0]
    out = algorithm.loss(micro, context())
    judged = F.cross_entropy(algorithm.classifier(micro.images), micro.labels, reduction="sum")
    torch.testing.assert_close(out.total, algorithm.errors(micro).sum() + judged)
    torch.testing.assert_close(out.metrics["loss/classifier"], judged.detach())
    assert out.count == 8


def fit(algorithm: DigitsPretrain, steps: int) -> None:
    optimizer = torch.optim.AdamW(algorithm.roles.trainable(), lr=5e-3, fused=True)
    for step in range(steps):
        for micro in micros(algorithm, step):
            (algorithm.loss(micro, context(step)).total / 8).backward()
        optimizer.step()
        optimizer.zero_grad()
        algorithm.after_update(context(step), 0)


def test_both_learn_and_are_saved_with_the_temperature(tmp_path: Path) -> None:
    saved: list[dict[str, torch.Tensor]] = []
    algorithm = make(ema=0.9, rotation=0.0, zoom=0.0, shift=0.0, save=lambda folder: saved.append(
        {name: value.clone() for name, value in algorithm.roles.module.state_dict().items()}
    ))  # fmt: skip
    before = algorithm.evaluate(context()).metrics
    fit(algorithm, 200)
    result = algorithm.evaluate(context(200))
    after = result.metrics
    assert after["eval/loss"] < 0.6 * before["eval/loss"]
    assert after["eval/classifier/accuracy"] == 1.0 > before["eval/classifier/accuracy"]
    assert result.artefacts["samples.png"].startswith(b"\x89PNG")
    assert 0 <= after["eval/samples/judged_right"] <= 1
    algorithm.save_final(tmp_path)
    ema = algorithm.roles.state_dict()["ema"]
    assert all(torch.equal(saved[0][name], value) for name, value in ema.items())
    with algorithm.roles.use("ema"), torch.no_grad():
        kept = algorithm._calibration
        expected = fit_temperature(algorithm.classifier(kept.images), kept.labels)
    assert algorithm.classifier.config.temperature == expected == after["eval/classifier/temperature"]


def test_default_save_writes_both_parts(tmp_path: Path) -> None:
    algorithm = make()
    algorithm.save_final(tmp_path)
    x = data(4).images
    with algorithm.roles.use("ema"), torch.no_grad():
        expected = algorithm.classifier.log_probs(x)
    torch.testing.assert_close(ImageClassifier.from_pretrained(tmp_path / "classifier").log_probs(x), expected)
    PatchTransformer.from_pretrained(tmp_path / "transformer")


def test_refusals() -> None:
    for bad in ({"teach": 9}, {"teach": 0}, {"rotation": 50.0}, {"zoom": -0.1}, {"shift": 3.0}, {"drop": 2.0}):
        with pytest.raises(ValueError):
            DigitsPretrainConfig(**{"batch": 8, "teach": 4, **bad})
    whole, algorithm = data(), make()
    arguments = {"held_out": whole, "seed": 0}
    for kept in (whole, whole.take(torch.arange(0))):
        with pytest.raises(UsageError, match="calibrate"):
            DigitsPretrain(
                algorithm.denoiser, algorithm.classifier, whole, algorithm.options, calibration=kept, **arguments
            )
