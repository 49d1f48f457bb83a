"""Pretraining of the bundled text-to-image model: a flow on 32x32 scenes and its text encoder, in one run.

The flow is `FlowPretrain` (its data rule, times, dropped captions, average and held-out loss) on the network
`CaptionedNetwork`, whose text half learns with it.  Beside the flow's error, the text encoder is taught to say what the
caption says (ours): the two losses are added, and one optimizer step moves all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from gencontrol.algorithms.base import Evaluation, LossOut, StepContext
from gencontrol.config import options
from gencontrol.data.images import png_grid
from gencontrol.errors import UsageError
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.roles import Roles
from gencontrol.recipes.scenes.data.corpus import SceneCorpus
from gencontrol.recipes.scenes.text import CaptionedNetwork, caption_targets, reading_loss
from gencontrol.recipes.sound.flow import FlowMicro, FlowPretrain, FlowPretrainConfig


@options
class ScenesPretrainConfig(FlowPretrainConfig):
    """Options of `ScenesPretrain`: those of `FlowPretrainConfig`, and of the text encoder.

    Args:
        reading: weight of the loss by which the text encoder learns to say what a caption says, ≥ 0.
    """

    batch: int = 32
    times_mean: float = 0.8  # scenes are mostly ground: what an object is gets decided at high noise
    ema: float = 0.998
    eval_samples: int = 48
    eval_guidance: float = 1.0
    reading: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.reading >= 0:
            raise ValueError(f"reading = {self.reading}; expected a weight of at least 0")


@dataclass(frozen=True)
class SceneMicro(FlowMicro):
    """One micro-batch of the flow, and what its captions say."""

    facts: Int64[Tensor, "b f"]


class ScenesPretrain(FlowPretrain):
    """Trains a `CaptionedNetwork` on a `SceneCorpus`; see the module docstring."""

    Config = ScenesPretrainConfig
    summary = "Flow matching on drawn scenes and words with their captions."

    def __init__(
        self,
        denoiser: Denoiser,
        corpus: SceneCorpus,
        config: ScenesPretrainConfig,
        *,
        held_out: SceneCorpus,
        seed: int,
        save: Callable[[Path], None],
    ) -> None:
        """Set up the algorithm; its roles hold the denoiser's network.

        Args:
            denoiser: around a `CaptionedNetwork`.
            corpus: training scenes, with a tokenizer.
            config: options.
            held_out: scenes of the evaluation.
            seed: of every draw.
            save: (folder) writes a loadable model with the network's present weights.

        Raises:
            UsageError: another network, or a corpus without a tokenizer.
        """
        network = denoiser.network
        if not isinstance(network, CaptionedNetwork) or corpus.tokenizer is None or held_out.tokenizer is None:
            raise UsageError("scene pretraining needs a CaptionedNetwork, and corpora with a tokenizer.")
        roles = Roles(network, ("policy", "ema"))
        super().__init__(denoiser, corpus, config, roles=roles, seed=seed, held_out=held_out, save=save)
        self.options, self.network, self._corpus = config, network, corpus
        self._pictures: list[Tensor] = []
        self.artefacts = self._keep

    def _draw(self, positions: Sequence[int]) -> SceneMicro:
        """The flow's micro-batch with what the captions say."""
        flow = super()._draw(positions)
        facts = caption_targets([self._corpus.spec(self._item(position)) for position in positions])
        return SceneMicro(flow.x0, flow.cond, flow.t, flow.noise, facts.to(flow.x0.device))

    def loss(self, micro: FlowMicro, ctx: StepContext) -> LossOut:
        """Sum of the flow's errors and of the weighted reading losses."""
        assert isinstance(micro, SceneMicro)  # of `_draw`
        with ctx.autocast():
            encoded = self.network.encode(micro.cond)
            logits = self.network.read(encoded)
        flow = super().loss(replace(micro, cond=encoded), ctx)
        reading = reading_loss(logits, micro.facts).sum()
        metrics = {**flow.metrics, "loss/reading": reading.detach()}
        return LossOut(flow.total + self.options.reading * reading, flow.count, metrics)

    def _keep(self, stem: str, sample: Tensor) -> dict[str, bytes]:
        """Collect the evaluation's samples for one picture."""
        self._pictures.append(sample)
        return {}

    def evaluate(self, ctx: StepContext) -> Evaluation:
        """The flow's held-out loss, and one picture of samples of held-out captions."""
        self._pictures = []
        found = super().evaluate(ctx)
        if not self._pictures:
            return found
        picture = png_grid((torch.stack(self._pictures) + 1) / 2, columns=8)
        return Evaluation(found.metrics, {**found.artefacts, "samples.png": picture})
