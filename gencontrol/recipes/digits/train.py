"""Pretraining of the bundled digit model: a class-conditional flow and a calibrated classifier, in one run.

The flow is `FlowPretrain` (its data rule, times, dropped conditions, average and held-out loss).  The classifier learns
from the first items of each batch under small random rotations, zooms and shifts; images that are set aside for
calibration never teach it, and choose its temperature when the run ends.  The two share no weights: one optimizer step
moves both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from gencontrol.algorithms.base import Evaluation, LossOut, StepContext
from gencontrol.config import options
from gencontrol.data.images import png_grid
from gencontrol.errors import UsageError
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.readers.image_classifier import ImageClassifier, calibration_error, fit_temperature
from gencontrol.models.roles import Roles
from gencontrol.recipes.digits.data import DigitImages
from gencontrol.recipes.sound.flow import FlowMicro, FlowPretrain, FlowPretrainConfig
from gencontrol.rng import Keyed, item_generators, row_keys


@options
class DigitsPretrainConfig(FlowPretrainConfig):
    """Options of `DigitsPretrain`: those of `FlowPretrainConfig`, and of the classifier.

    More conditions are dropped than elsewhere, because the unconditional model is meant to be used by itself.

    Args:
        teach: items of each batch that the classifier learns from, 1 to `batch`.
        rotation: largest angle of the augmentation, degrees, in [0, 45].
        zoom: largest relative change of size, in [0, 0.5].
        shift: largest shift in either direction, pixels, in [0, 2].
        eval_samples: generated images that the classifier judges at an evaluation, ten labels in turn.
    """

    batch: int = 128
    drop: float = 0.3
    eval_items: int = 360
    eval_samples: int = 100
    eval_guidance: float = 1.0
    teach: int = 32
    rotation: float = 12.0
    zoom: float = 0.12
    shift: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.teach <= self.batch:
            raise ValueError(f"teach = {self.teach}; expected 1 to batch = {self.batch}")
        if not (0 <= self.rotation <= 45 and 0 <= self.zoom <= 0.5 and 0 <= self.shift <= 2):
            raise ValueError("rotation in [0, 45] degrees, zoom in [0, 0.5] and shift in [0, 2] pixels are needed")


@dataclass(frozen=True)
class DigitMicro(FlowMicro):
    """One micro-batch of the flow, and the augmented images and labels among it that teach the classifier."""

    images: Float[Tensor, "m 1 h w"]
    labels: Int64[Tensor, " m"]


def distort(
    images: Float[Tensor, "b 1 h w"], draws: Float[Tensor, "b 4"], *, rotation: float, zoom: float, shift: float
) -> Float[Tensor, "b 1 h w"]:
    """Rotate, zoom and shift each image by its own draws in [-1, 1] times the largest values; background is -1."""
    angle = draws[:, 0] * math.radians(rotation)
    scale = 1.0 + zoom * draws[:, 1]
    offset = draws[:, 2:] * (2.0 * shift / images.shape[-1])  # a pixel is 2/size of grid_sample's unit
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([torch.stack([cos, -sin, offset[:, 0]], 1), torch.stack([sin, cos, offset[:, 1]], 1)], 1)
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1.0, grid, align_corners=False) - 1.0  # outside the image is 0, the background


class DigitsPretrain(FlowPretrain):
    """Trains a denoiser and a classifier on `DigitImages`; see the module docstring."""

    Config = DigitsPretrainConfig
    summary = "Flow matching and a calibrated classifier on scikit-learn's 8x8 digits."

    def __init__(
        self,
        denoiser: Denoiser,
        classifier: ImageClassifier,
        images: DigitImages,
        config: DigitsPretrainConfig,
        *,
        calibration: DigitImages,
        held_out: DigitImages,
        seed: int,
        save: Callable[[Path], None] | None = None,
    ) -> None:
        """Set up the algorithm; its roles hold the denoiser's network and the classifier.

        Args:
            denoiser: of images [b 1 s s], its condition {"pooled": one-hot label, "drop"}.
            classifier: of the same images.
            images: training images.
            config: options.
            calibration: the training images (same `index`) that choose the temperature and do not teach.
            held_out: images of the evaluation.
            seed: of every draw.
            save: (folder) writes a loadable model with the present weights; default: transformer/ and classifier/.

        Raises:
            UsageError: no images, none for calibration, or none left to teach.
        """
        both = nn.ModuleDict({"transformer": denoiser.network, "classifier": classifier})
        data = images.latents()
        super().__init__(
            denoiser,
            data,
            config,
            roles=Roles(both, ("policy", "ema")),
            seed=seed,
            held_out=held_out.latents(),
            save=save,
        )
        self.options, self.classifier = config, classifier
        self._labels, self._teaches = images.labels, ~torch.isin(images.index, calibration.index)
        self._calibration, self._test = calibration, held_out
        if not len(calibration) or not bool(self._teaches.any()):
            raise UsageError("the classifier needs images that teach it and others that calibrate it.")

    @property
    def _device(self) -> torch.device:
        return next(self.classifier.parameters()).device

    def _draw(self, positions: Sequence[int]) -> DigitMicro:
        """The flow's micro-batch, and the classifier's share of it."""
        flow = super()._draw(positions)
        rows = torch.tensor([self._item(position) for position in positions])
        order = torch.tensor(positions)
        teach = (order % self.config.batch < self.options.teach) & self._teaches[rows]
        draws = Keyed(row_keys(self.seed, "digits/distort", order)).uniform((len(order), 4)).float() * 2 - 1
        images, labels, c = flow.x0[teach.to(self._device)], self._labels[rows[teach]].to(self._device), self.options
        if len(images):
            images = distort(images, draws[teach].to(images), rotation=c.rotation, zoom=c.zoom, shift=c.shift)
        return DigitMicro(flow.x0, flow.cond, flow.t, flow.noise, images, labels)

    def loss(self, micro: FlowMicro, ctx: StepContext) -> LossOut:
        """Sum of the flow's errors and of the classifier's cross-entropies."""
        assert isinstance(micro, DigitMicro)  # of `_draw`
        flow = super().loss(micro, ctx)
        if not len(micro.labels):
            return flow
        with ctx.autocast():
            logits = self.classifier(micro.images)
        total = F.cross_entropy(logits.float(), micro.labels, reduction="sum")
        return LossOut(flow.total + total, flow.count, {**flow.metrics, "loss/classifier": total.detach()})

    @torch.no_grad()
    def evaluate(self, ctx: StepContext) -> Evaluation:
        """The flow's held-out loss; the classifier's accuracy and calibration; its verdict on generated digits."""
        metrics = dict(super().evaluate(ctx).metrics)
        with self.roles.use("ema"):
            temperature = fit_temperature(self._logits(self._calibration), self._calibration.labels)
            logits = self._logits(self._test)
            log_probs = torch.log_softmax(logits / temperature, -1)
            metrics |= {
                "eval/classifier/accuracy": float((logits.argmax(1) == self._test.labels).float().mean()),
                "eval/classifier/nll": float(F.nll_loss(log_probs, self._test.labels)),
                "eval/classifier/ece": calibration_error(log_probs, self._test.labels),
                "eval/classifier/temperature": temperature,
            }
            if not self.config.eval_samples:
                return Evaluation(metrics)
            made, labels = self._generated(ctx)
            metrics["eval/samples/judged_right"] = float((self.classifier(made).argmax(1) == labels).float().mean())
        return Evaluation(metrics, {"samples.png": png_grid((made + 1) / 2, columns=10)})

    def _logits(self, part: DigitImages) -> Float[Tensor, "n classes"]:
        return self.classifier(part.images.to(self._device)).float().cpu()

    def _generated(self, ctx: StepContext) -> tuple[Float[Tensor, "n 1 h w"], Int64[Tensor, " n"]]:
        """Images of the labels 0, 1, … 9, 0, … from fixed noise, with those labels."""
        from gencontrol.sampling import sample
        from gencontrol.sampling.guidance import cfg

        device, n = self._device, self.config.eval_samples
        classes = len(self.classifier.config.classes)
        labels = torch.arange(n, device=device) % classes
        cond = {"pooled": F.one_hot(labels, classes).float(), "drop": torch.zeros(n, dtype=torch.bool, device=device)}
        null = {**cond, "drop": torch.ones(n, dtype=torch.bool, device=device)}
        scale = self.config.eval_guidance
        made = sample(
            self.denoiser if scale == 1.0 else cfg(self.denoiser, scale, null),
            (n, *self._test.images.shape[1:]),
            steps=self.config.eval_steps,
            generator=item_generators(self.seed, "pretrain/samples", range(n)),
            cond=cond,
            callback=lambda index, t, x: ctx.poll(),
        )
        return made, labels

    def save_final(self, folder: Path) -> None:
        """Choose the temperature, then write the model with the average weights."""
        with self.roles.use("ema"), torch.no_grad():
            self.classifier.calibrate(
                self._calibration.images.to(self._device), self._calibration.labels.to(self._device)
            )
            if self.save is None:
                network: Any = self.denoiser.network
                network.save_pretrained(folder / "transformer")
                self.classifier.save_pretrained(folder / "classifier")
                return
        super().save_final(folder)
