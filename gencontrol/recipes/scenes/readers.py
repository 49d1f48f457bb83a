"""Pretraining of the two scene networks, in one run: the reader of words and the judge of attributes.

They share no weights; one optimizer step moves both.  Item p of the run is a pure function of (seed, p): a picture with
letters at random places, some of them scrambled and not to be read, and a scene of the grammar.  The reader learns from
the letters and, where the scene has no word, that there is nothing to read; the judge learns from the scene.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gencontrol.algorithms.base import Collected, Evaluation, LossOut, StepContext
from gencontrol.algorithms.pretraining import AveragedPretraining
from gencontrol.config import options
from gencontrol.models.roles import Roles
from gencontrol.recipes.scenes.data.corpus import Split, sample_spec
from gencontrol.recipes.scenes.data.render import Scene, arrange, render
from gencontrol.recipes.scenes.data.words import damage, random_word_image
from gencontrol.recipes.scenes.networks import (
    ATTRIBUTES,
    SceneJudge,
    SceneReader,
    attributes_of,
    judge_loss,
    reader_loss,
)
from gencontrol.rng import stream_seed


@options
class SceneReadersConfig:
    """Options of `SceneReadersPretrain`.

    Args:
        batch: images of one optimizer step.
        ema: largest decay of the moving average that is saved, in [0, 1).
        scramble: probability that a letter is scrambled and must not be read, in [0, 1].
        blur: largest standard deviation of the blur, pixels, in [0, 1).
        noise: largest standard deviation of the noise, in [0, 0.5].
        eval_items: held-out images of the evaluation.
    """

    batch: int = 64
    ema: float = 0.99
    scramble: float = 0.15
    blur: float = 0.9
    noise: float = 0.12
    eval_items: int = 400

    def __post_init__(self) -> None:
        if self.batch < 2 or self.eval_items < 1:
            raise ValueError("batch >= 2 and eval_items >= 1 are needed")
        if not (0 <= self.ema < 1 and 0 <= self.scramble <= 1 and 0 <= self.blur < 1 and 0 <= self.noise <= 0.5):
            raise ValueError("ema in [0, 1), scramble in [0, 1], blur in [0, 1) and noise in [0, 0.5] are needed")


@dataclass(frozen=True)
class ReadersMicro:
    """One micro-batch: images with their words for the reader, images with their attributes for the judge."""

    to_read: Float[Tensor, "r 3 32 32"]
    words: list[str]
    to_judge: Float[Tensor, "j 3 32 32"]
    truth: Int64[Tensor, "j a"]


class SceneReadersPretrain(AveragedPretraining):
    """Trains `SceneReader` and `SceneJudge`; see the module docstring."""

    Config = SceneReadersConfig
    summary = "A reader of words and a judge of attributes, by classification of drawn scenes."

    def __init__(self, reader: SceneReader, judge: SceneJudge, config: SceneReadersConfig, *, seed: int) -> None:
        """Set up the algorithm; its roles hold both networks."""
        super().__init__(Roles(nn.ModuleDict({"reader": reader, "judge": judge}), ("policy", "ema")), config.ema)
        self.reader, self.judge, self.config, self.seed = reader, judge, config, seed

    def collect(self, ctx: StepContext) -> Collected:
        """Numbers of this rank's items of the step; one update."""
        first = ctx.step * self.config.batch
        return Collected(torch.arange(first + ctx.rank, first + self.config.batch, ctx.world_size), 1, {})

    def minibatches(self, data: Any, update: int, ctx: StepContext) -> Iterable[ReadersMicro]:
        """Draw the images of each micro-batch."""
        for start in range(0, len(data), ctx.micro_batch):
            yield self._draw(data[start : start + ctx.micro_batch].tolist(), "train", 1.0)

    def _draw(self, items: Sequence[int], split: Split, harm: float) -> ReadersMicro:
        """Images of items, a pure function of (seed, split, item); `harm` scales blur and noise."""
        scenes: list[Scene] = []
        letters, words, damages, draws = [], [], [], []
        for item in items:
            rng = np.random.default_rng(stream_seed(self.seed, f"scenes/readers/{split}", item))
            scenes.append(arrange(sample_spec(rng, split), rng))
            image, word = random_word_image(rng, self.config.scramble)
            letters.append(image)
            words.append(word)
            blurred = float(rng.random() < 0.5)
            damages.append(
                (harm * blurred * rng.uniform(0, self.config.blur), harm * rng.uniform(0, self.config.noise))
            )
            draws.append(rng.standard_normal((2, *image.shape), np.float32))
        drawn, images = torch.from_numpy(np.stack(draws)), torch.from_numpy(render(scenes))
        blur, noise = torch.tensor(damages, dtype=torch.float32).T
        judged = damage(images, blur, noise, drawn[:, 0])
        spelled = damage(torch.from_numpy(np.stack(letters)), blur, noise, drawn[:, 1])
        empty = torch.tensor([not scene.word for scene in scenes])
        device = next(self.judge.parameters()).device
        return ReadersMicro(
            torch.cat([spelled, judged[empty]]).to(device),
            words + [""] * int(empty.sum()),
            judged.to(device),
            attributes_of(scenes).to(device),
        )

    def loss(self, micro: ReadersMicro, ctx: StepContext) -> LossOut:
        """Sum of the reader's CTC losses and of the judge's attribute losses."""
        with ctx.autocast():
            read, judged = self.reader(micro.to_read), self.judge(micro.to_judge)
        reading = reader_loss(read, micro.words).sum()
        judging = judge_loss(judged, micro.truth).sum()
        metrics = {"loss/reader": reading.detach(), "loss/judge": judging.detach()}
        return LossOut(reading + judging, len(micro.truth), metrics)

    @torch.no_grad()
    def evaluate(self, ctx: StepContext) -> Evaluation:
        """Held-out accuracy of the average weights on clean images and on damaged ones."""
        metrics: dict[str, float] = {}
        with self.roles.use("ema"):
            for name, harm in (("clean", 0.0), ("damaged", 1.0)):
                micro = self._draw(range(self.config.eval_items), "test", harm)
                ctx.poll()
                read = self.reader.read(micro.to_read)
                metrics[f"eval/{name}/words"] = float(np.mean([a == b for a, b in zip(read, micro.words, strict=True)]))
                right = torch.stack([v.argmax(1) for v in self.judge(micro.to_judge).values()], 1) == micro.truth
                metrics[f"eval/{name}/attributes"] = float(right.float().mean())
                metrics[f"eval/{name}/all_{len(ATTRIBUTES)}_attributes"] = float(right.all(1).float().mean())
        return Evaluation(metrics)

    def save_final(self, folder: Path) -> None:
        """Write scene_reader/ and scene_judge/ with the average weights."""
        with self.roles.use("ema"):
            self.reader.save_pretrained(folder / "scene_reader")
            self.judge.save_pretrained(folder / "scene_judge")
