"""Contrastive pretraining of a small CLAP on clips and captions (InfoNCE of van den Oord et al. 2018, as in CLAP).

Features are computed once and kept in half precision; a step draws clips, one of the wordings of each, and augments
in the feature domain, where a gain is an added number of decibels and a shift moves frames into the silent tail.
The batch norm at the input holds the data's statistics from the start and the network stays in evaluation mode:
what is trained is exactly what is used.  A share of the clips is heard through the codec, as generated clips will be.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from gencontrol.algorithms.base import Collected, Evaluation, LossOut, StepContext
from gencontrol.algorithms.pretraining import AveragedPretraining
from gencontrol.config import options
from gencontrol.models.networks.codec import MelCodec
from gencontrol.models.readers.clap import build_clap, clap_features, save_clap, small_extractor, train_tokenizer
from gencontrol.models.roles import Roles
from gencontrol.recipes.sound.data.dataset import SoundDataset
from gencontrol.recipes.sound.data.features import SplitFeatures, gather
from gencontrol.rng import stream

if TYPE_CHECKING:
    from transformers import ClapFeatureExtractor, ClapModel, PreTrainedTokenizerBase

SILENCE_DB, LARGEST_SCALE = -100.0, 100.0


def info_nce(
    audio: Float[Tensor, "b d"], text: Float[Tensor, "b d"], scale_a: Tensor, scale_t: Tensor
) -> Float[Tensor, " b"]:
    """Symmetric InfoNCE of unit vectors, one value per pair; the scales are inverse temperatures."""
    own = torch.arange(len(audio), device=audio.device)
    similarity = audio.float() @ text.float().T
    from_audio = F.cross_entropy(scale_a * similarity, own, reduction="none")
    from_text = F.cross_entropy(scale_t * similarity.T, own, reduction="none")
    return 0.5 * (from_audio + from_text)


def augment(
    features: Float[Tensor, "b 1 frames mel"], generator: torch.Generator, *, gain_db: float, shift: int
) -> Float[Tensor, "b 1 frames mel"]:
    """Gain within ±`gain_db` and a delay of up to `shift` frames, each clip its own; silence enters at the start."""
    b, _, frames, _ = features.shape
    gains = (torch.rand(b, generator=generator) * 2 - 1) * gain_db
    delays = torch.randint(0, shift + 1, (b,), generator=generator)
    index = torch.arange(frames)[None] - delays[:, None]
    moved = features.gather(2, index.clamp_min(0)[:, None, :, None].expand_as(features))
    moved = torch.where((index >= 0)[:, None, :, None], moved + gains[:, None, None, None], SILENCE_DB)
    return moved.clamp_min(SILENCE_DB)


def contrastive_loss(
    model: ClapModel, features: Float[Tensor, "b 1 frames mel"], ids: Int[Tensor, "b n"], mask: Int[Tensor, "b n"]
) -> Float[Tensor, " b"]:
    """InfoNCE of a batch of features and token ids under a ClapModel, per pair."""
    audio = model.get_audio_features(input_features=features).pooler_output
    text = model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    scale_a = model.logit_scale_a.exp().clamp_max(LARGEST_SCALE)
    scale_t = model.logit_scale_t.exp().clamp_max(LARGEST_SCALE)
    return info_nce(F.normalize(audio.float(), dim=-1), F.normalize(text.float(), dim=-1), scale_a, scale_t)


def set_input_norm(model: ClapModel, features: Float[Tensor, "n 1 frames mel"]) -> None:
    """Put the mean and variance of each mel band into the audio tower's batch norm."""
    norm: Any = model.audio_model.audio_encoder.batch_norm
    rows = features.float()
    norm.running_mean.copy_(rows.mean((0, 1, 2)))
    norm.running_var.copy_(rows.var((0, 1, 2)))


@options
class ClapPretrainConfig:
    """Options of `ClapPretrain`.

    Args:
        batch: pairs that are contrasted with each other; never split, whatever the micro-batch.
        ema: largest decay of the moving average that is saved, in [0, 1).
        gain_db: largest gain of the augmentation, either sign, decibels.
        shift: largest delay of the augmentation, frames of 11.75 ms.
        codec_share: share of the clips heard through the codec, in [0, 1].
        codec_clips: number of training clips that are passed through the codec once, at the start.
        eval_items: held-out clips of the retrieval evaluation, at least 20.
    """

    batch: int = 128
    ema: float = 0.99
    gain_db: float = 3.0
    shift: int = 16
    codec_share: float = 0.25
    codec_clips: int = 6000
    eval_items: int = 500

    def __post_init__(self) -> None:
        if self.batch < 2 or self.eval_items < 20 or self.shift < 0 or self.codec_clips < 1:
            raise ValueError("batch >= 2, eval_items >= 20, shift >= 0 and codec_clips >= 1 are needed")
        if not (0.0 <= self.codec_share <= 1.0 and 0.0 <= self.ema < 1.0):
            raise ValueError("codec_share in [0, 1] and ema in [0, 1) are needed")


@dataclass(frozen=True)
class ClapMicro:
    """One contrastive batch."""

    features: Float[Tensor, "b 1 frames mel"]
    ids: Int[Tensor, "b n"]
    mask: Int[Tensor, "b n"]


class ClapPretrain(AveragedPretraining):
    """Trains the bundled CLAP on a folder of `build_sound_dataset`; see the module docstring."""

    Config = ClapPretrainConfig
    summary = "Contrast of rendered sounds and captions: embeddings of one space."

    def __init__(
        self,
        data: str | Path,
        config: ClapPretrainConfig,
        *,
        codec: MelCodec | None,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Build tokenizer, model and feature caches from the data.

        Args:
            data: folder of the sound data.
            config: options.
            codec: needed where `codec_share` > 0.
            seed: of the initial weights and of every draw.
            device: where the weights live.

        Raises:
            UsageError: `codec_share` > 0 without a codec.
        """
        self.config, self.seed = config, seed
        self.train, self.held_out = SoundDataset.load(data, "train"), SoundDataset.load(data, "val")
        extractor: ClapFeatureExtractor = small_extractor()
        settings = str(sorted((key, str(value)) for key, value in extractor.to_dict().items()))
        self.features = SplitFeatures.load(
            self.train, self.held_out, data, "clap", settings, lambda w: clap_features(w, extractor), config, codec
        )
        self.extractor = extractor
        texts = (text for variants in self.train.captions for text in variants)
        self.tokenizer: PreTrainedTokenizerBase = train_tokenizer(texts)
        model: Any = build_clap(seed, len(self.tokenizer))
        some = torch.arange(0, len(self.train), max(len(self.train) // 1000, 1))
        set_input_norm(model, gather(self.features.clean, some))
        super().__init__(Roles(model.to(device), ("policy", "ema")), config.ema)

    def collect(self, ctx: StepContext) -> Collected:
        """Draw the step's clips; the batch itself is read in `minibatches`."""
        generator = stream(self.seed, "clap/batch", ctx.step, ctx.rank)
        items = torch.randperm(len(self.train), generator=generator)[: self.config.batch]
        return Collected(items, 1, {"data/epoch": ctx.step * self.config.batch / len(self.train)})

    def minibatches(self, data: Any, update: int, ctx: StepContext) -> Iterable[ClapMicro]:
        """One batch: every pair is contrasted with all others."""
        generator = stream(self.seed, "clap/augment", ctx.step, ctx.rank)
        features = self.features.draw(data, generator)
        features = augment(features, generator, gain_db=self.config.gain_db, shift=self.config.shift)
        words = torch.randint(0, len(self.train.captions[0]), (len(data),), generator=generator)
        texts = [self.train.captions[int(i)][int(w)] for i, w in zip(data, words, strict=True)]
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        device = next(self.roles.module.parameters()).device
        parts = (features, tokens["input_ids"], tokens["attention_mask"])
        yield ClapMicro(*(part.to(device) for part in parts))

    def loss(self, micro: ClapMicro, ctx: StepContext) -> LossOut:
        """Sum of the pairs' InfoNCE."""
        model: Any = self.roles.module
        with ctx.autocast():
            total = contrastive_loss(model, micro.features, micro.ids, micro.mask).sum()
        count = len(micro.ids)
        scale = float(model.logit_scale_a.detach().exp()) * count
        return LossOut(total, count, {"loss/info_nce": total.detach(), "clap/scale": scale})

    @torch.no_grad()
    def evaluate(self, ctx: StepContext) -> Evaluation:
        """Retrieval on held-out clips with the average weights: the right one of 20, caption to clip."""
        from gencontrol.models.readers.clap import text_embeddings
        from gencontrol.recipes.sound.retrieval import retrieval_at_one

        texts = [variants[0] for variants in self.held_out.captions[: len(self.features.held_out)]]
        with self.roles.use("ema") as module:
            model: Any = module
            device = next(model.parameters()).device
            audio, text = [], []
            for start in range(0, len(texts), 100):
                ctx.poll()
                features = gather(self.features.held_out, torch.arange(start, min(start + 100, len(texts)))).to(device)
                audio.append(
                    F.normalize(model.get_audio_features(input_features=features).pooler_output.float(), dim=-1)
                )
                text.append(text_embeddings(model, self.tokenizer, texts[start : start + 100]))
        hit = retrieval_at_one(torch.cat(text), torch.cat(audio), candidates=20, seed=self.seed)
        return Evaluation({"eval/retrieval_20": hit})

    def save_final(self, folder: Path) -> None:
        """Write the CLAP folder with the average weights, in half precision."""
        import copy

        with self.roles.use("ema") as module:
            half: Any = copy.deepcopy(module).half()
        save_clap(folder, half, self.tokenizer, self.extractor)
