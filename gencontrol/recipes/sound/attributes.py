"""Supervised pretraining of the attribute judge: the sum of one cross-entropy per attribute, those that apply.

Features are cached; a step draws clips and augments by a small gain and delay.  A share of the
clips is heard through the codec, as generated clips will be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from gencontrol.algorithms.base import Collected, Evaluation, LossOut, StepContext
from gencontrol.algorithms.pretraining import AveragedPretraining
from gencontrol.config import options
from gencontrol.models.networks.codec import MelCodec
from gencontrol.models.readers.attributes import AttributeNet, build_attribute_net
from gencontrol.models.roles import Roles
from gencontrol.recipes.sound.data.dataset import SoundDataset
from gencontrol.recipes.sound.data.features import SplitFeatures, gather
from gencontrol.recipes.sound.data.grammar import ATTRIBUTES
from gencontrol.rng import stream


@options
class AttributePretrainConfig:
    """Options of `AttributePretrain`.

    Args:
        batch: clips of one optimizer step, over all ranks.
        ema: largest decay of the moving average that is saved, in [0, 1).
        smoothing: label smoothing, in [0, 1).
        gain: largest gain of the augmentation, either sign, nepers of magnitude (0.35 is 3 dB).
        shift: largest delay of the augmentation, frames of 16 ms.
        codec_share: share of the clips heard through the codec, in [0, 1].
        codec_clips: number of training clips that are passed through the codec once, at the start.
        eval_items: held-out clips of the evaluation.
    """

    batch: int = 64
    ema: float = 0.99
    smoothing: float = 0.05
    gain: float = 0.2
    shift: int = 6
    codec_share: float = 0.25
    codec_clips: int = 4000
    eval_items: int = 500

    def __post_init__(self) -> None:
        if min(self.batch, self.codec_clips, self.eval_items) < 1 or self.shift < 0:
            raise ValueError("batch, codec_clips, eval_items >= 1 and shift >= 0 are needed")
        if not all(0.0 <= value <= 1.0 for value in (self.codec_share, self.ema, self.smoothing)):
            raise ValueError("codec_share, ema and smoothing lie in [0, 1]")


@dataclass(frozen=True)
class AttributeMicro:
    """One micro-batch of features and labels."""

    features: Float[Tensor, "b 1 bands frames"]
    labels: Mapping[str, Int[Tensor, " b"]]


def attribute_losses(
    logits: Mapping[str, Float[Tensor, "b classes"]], labels: Mapping[str, Int[Tensor, " b"]], smoothing: float
) -> Float[Tensor, " b"]:
    """Summed cross-entropy per clip; an attribute with label -1 does not apply and costs nothing."""
    losses = [
        F.cross_entropy(values.float(), labels[name], reduction="none", ignore_index=-1, label_smoothing=smoothing)
        for name, values in logits.items()
    ]
    return torch.stack(losses).sum(0)


def augment(
    features: Float[Tensor, "b 1 bands frames"], generator: torch.Generator, *, gain: float, shift: int
) -> Float[Tensor, "b 1 bands frames"]:
    """Add up to ±`gain` and delay by up to `shift` frames (the first frame fills the start), each clip its own."""
    b, _, _, frames = features.shape
    gains = (torch.rand(b, generator=generator) * 2 - 1) * gain
    delays = torch.randint(0, shift + 1, (b,), generator=generator)
    index = (torch.arange(frames)[None] - delays[:, None]).clamp_min(0)
    return features.gather(3, index[:, None, None, :].expand_as(features)) + gains[:, None, None, None]


class AttributePretrain(AveragedPretraining):
    """Trains an `AttributeNet` on a folder of `build_sound_dataset`; see the module docstring."""

    Config = AttributePretrainConfig
    summary = "Classification of what rendered sounds were made from."

    def __init__(
        self,
        data: str | Path,
        config: AttributePretrainConfig,
        *,
        codec: MelCodec | None,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Build the model and the feature caches from the data; arguments and errors as for `ClapPretrain`."""
        self.config, self.seed = config, seed
        self.train, self.held_out = SoundDataset.load(data, "train"), SoundDataset.load(data, "val")
        net = build_attribute_net(seed, ATTRIBUTES)
        self.features = SplitFeatures.load(
            self.train, self.held_out, data, "attr", str(net.config), net.features, config, codec
        )
        super().__init__(Roles(net.to(device), ("policy", "ema")), config.ema)

    def collect(self, ctx: StepContext) -> Collected:
        """Draw the step's clips of this rank."""
        generator = stream(self.seed, "attributes/batch", ctx.step)
        items = torch.randperm(len(self.train), generator=generator)[: self.config.batch]
        return Collected(
            items[ctx.rank :: ctx.world_size], 1, {"data/epoch": ctx.step * self.config.batch / len(self.train)}
        )

    def minibatches(self, data: Any, update: int, ctx: StepContext) -> Iterable[AttributeMicro]:
        """Read, augment and cut the step's clips; the draws do not depend on the micro-batch."""
        generator = stream(self.seed, "attributes/augment", ctx.step, ctx.rank)
        features = augment(
            self.features.draw(data, generator), generator, gain=self.config.gain, shift=self.config.shift
        )
        device = next(self.roles.module.parameters()).device
        for start in range(0, len(data), ctx.micro_batch):
            part = slice(start, start + ctx.micro_batch)
            rows = data[part].numpy()
            labels = {name: torch.from_numpy(values[rows]).to(device) for name, values in self.train.labels.items()}
            yield AttributeMicro(features[part].to(device), labels)

    def loss(self, micro: AttributeMicro, ctx: StepContext) -> LossOut:
        """Sum of the clips' cross-entropies."""
        net: Any = self.roles.module
        with ctx.autocast():
            logits = net.classify(net.frames_of(micro.features).mean(1))
        total = attribute_losses(logits, micro.labels, self.config.smoothing).sum()
        return LossOut(total, len(micro.features), {"loss/cross_entropy": total.detach()})

    @torch.no_grad()
    def evaluate(self, ctx: StepContext) -> Evaluation:
        """Accuracy of each attribute on held-out combinations with the average weights."""
        count = len(self.features.held_out)
        with self.roles.use("ema") as module:
            net: AttributeNet = module  # type: ignore[assignment]  # the roles hold what __init__ gave them
            device = next(net.parameters()).device
            parts = []
            for start in range(0, count, 100):
                ctx.poll()
                features = gather(self.features.held_out, torch.arange(start, min(start + 100, count))).to(device)
                logits = net.classify(net.frames_of(features).mean(1))
                parts.append({name: values.argmax(-1).cpu() for name, values in logits.items()})
        metrics = {}
        for name in parts[0]:
            label = torch.from_numpy(self.held_out.labels[name][:count])
            applies = label >= 0
            metrics[f"eval/accuracy/{name}"] = float(
                (torch.cat([p[name] for p in parts]) == label)[applies].float().mean()
            )
        return Evaluation(metrics)

    def save_final(self, folder: Path) -> None:
        """Write the judge with the average weights, in half precision."""
        with self.roles.use("ema") as module:
            net: Any = module
            net.save_pretrained(folder, dtype=torch.float16)
