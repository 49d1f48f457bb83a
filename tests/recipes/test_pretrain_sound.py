"""Pretraining of the CLAP and of the attribute judge on a rendered folder: contract, learning, what is saved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gencontrol.algorithms.base import StepContext
from gencontrol.errors import UsageError
from gencontrol.models.networks.codec import MelCodec
from gencontrol.recipes.sound.attributes import AttributePretrain, AttributePretrainConfig
from gencontrol.recipes.sound.clap import ClapPretrain, ClapPretrainConfig
from gencontrol.recipes.sound.data.dataset import SoundDataset
from gencontrol.recipes.sound.data.features import SplitFeatures, gather
from gencontrol.testing.algorithm import AlgorithmContract, metric_lines
from gencontrol.types import RewardContext
from tests.helpers.sound_folder import write_sound_folder

FOLDER = Path("set by the fixture")  # the contract makes algorithms where no fixture can be asked for
CLIPS, CODED, HELD_OUT, RATE = 24, 12, 20, 16000


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    global FOLDER
    FOLDER = write_sound_folder(tmp_path_factory.mktemp("sound"), {"train": CLIPS, "val": HELD_OUT})
    yield FOLDER


def make_clap(**options: float) -> ClapPretrain:
    settings = {"batch": 8, "codec_share": 0.25, "codec_clips": CODED, "eval_items": HELD_OUT, **options}
    codec = MelCodec() if settings["codec_share"] else None
    return ClapPretrain(FOLDER, ClapPretrainConfig(**settings), codec=codec, seed=1)


def make_attributes(**options: float) -> AttributePretrain:
    settings = {"batch": 8, "codec_share": 0.25, "codec_clips": CODED, "eval_items": HELD_OUT, **options}
    codec = MelCodec() if settings["codec_share"] else None
    return AttributePretrain(FOLDER, AttributePretrainConfig(**settings), codec=codec, seed=1)


class TestClap(AlgorithmContract):
    """One micro-batch, whatever its size: every pair is contrasted with all others."""

    def make(self) -> ClapPretrain:
        return make_clap()

    def test_loss_falls_and_the_final_model_is_a_reward(self, tmp_path: Path) -> None:
        from gencontrol.models.readers.clap import audio_embeddings
        from gencontrol.rewards.audio.clap import ClapReward

        few = write_sound_folder(tmp_path / "few", {"train": 8, "val": HELD_OUT})
        made = ClapPretrain(
            few, ClapPretrainConfig(batch=8, ema=0.9, codec_share=0.0, gain_db=0.0, shift=0), codec=None, seed=1
        )
        self.fit(tmp_path / "run", made, steps=40, lr=5e-4, warmup=5)
        losses = [row["loss/info_nce"] for row in metric_lines(tmp_path / "run")]
        assert np.median(losses[-8:]) < 0.75 * math.log(8), losses  # log 8: all pairs equally similar
        data = SoundDataset.load(few, "train")
        wave, texts = data.waveforms(range(8)), [wordings[0] for wordings in data.captions]
        reward = ClapReward(reward_model=tmp_path / "run" / "final", device="cpu")
        with made.roles.use("ema") as averaged, torch.no_grad():
            expected = audio_embeddings(averaged, made.extractor, wave)
        found = reward.audio_embeddings(wave, RATE)
        assert float((found * expected).sum(1).min()) > 0.999  # stored in half precision
        right = reward(wave, RewardContext(prompts=texts, sampling_rate=RATE)).values.mean()
        wrong = reward(wave, RewardContext(prompts=[*texts[3:], *texts[:3]], sampling_rate=RATE)).values.mean()
        assert right > wrong + 0.05


class TestAttributes(AlgorithmContract):
    def make(self) -> AttributePretrain:
        return make_attributes()

    def test_loss_falls_and_the_final_model_is_an_encoder(self, tmp_path: Path) -> None:
        from gencontrol.models.readers.attributes import AttributeNet
        from gencontrol.rewards.audio.encoders import AttributeEncoder

        made = make_attributes(ema=0.9, codec_share=0.0, gain=0.0, shift=0)
        self.fit(tmp_path / "run", made, steps=16, eval_every=16)
        rows = metric_lines(tmp_path / "run")
        losses = [row["loss/cross_entropy"] for row in rows if "loss/cross_entropy" in row]
        assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3]), losses
        final = tmp_path / "run" / "final"
        net = AttributeNet.from_pretrained(final)
        data = SoundDataset.load(FOLDER, "train")
        wave = data.waveforms(range(CLIPS))
        with made.roles.use("ema") as averaged, torch.no_grad():
            torch.testing.assert_close(net.embed(wave), averaged.embed(wave), atol=2e-2, rtol=0)  # half precision
            heard = net(wave)["instrument"].argmax(1)
        right = float((heard == torch.from_numpy(data.labels["instrument"])).float().mean())
        assert right > 0.5, right  # one class of six is right for about 0.2
        frames = AttributeEncoder(final, "cpu").frames(wave[:2], RATE)
        assert frames.shape == (2, 32, 128) and bool(torch.isfinite(frames).all())

    def test_draws_do_not_depend_on_the_micro_batch(self, fenced_rng: None) -> None:
        made, context = make_attributes(), StepContext(seed=1, step=2, micro_batch=8)
        items = made.collect(context).data
        (whole,) = made.minibatches(items, 0, context)
        parts = list(made.minibatches(items, 0, replace(context, micro_batch=3)))
        assert [len(part.features) for part in parts] == [3, 3, 2]
        assert torch.equal(torch.cat([part.features for part in parts]), whole.features)
        for name, labels in whole.labels.items():
            assert torch.equal(torch.cat([part.labels[name] for part in parts]), labels)


@pytest.mark.parametrize("make", [make_clap, make_attributes])
def test_the_codec_has_its_share(make: type) -> None:
    features: SplitFeatures = make().features
    assert features.coded is not None and len(features.coded) == CODED and len(features.held_out) == HELD_OUT
    assert features.coded_rate == pytest.approx(0.25 * CLIPS / CODED)
    items = torch.arange(CLIPS)
    clean, count = gather(features.clean, items), torch.zeros(CLIPS)
    coded = gather(features.coded, items[:CODED])
    assert (coded - clean[:CODED]).flatten(1).abs().amax(1).min() > 0.1
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        drawn = features.draw(items, generator)
        same = (drawn == clean).flatten(1).all(1)
        assert torch.equal(drawn[:CODED][~same[:CODED]], coded[~same[:CODED]]) and bool(same[CODED:].all())
        count += ~same
    n = 200 * CLIPS
    assert abs(float(count.sum()) / n - 0.25) < 4 * (0.25 * 0.75 / n) ** 0.5


def test_refusals() -> None:
    with pytest.raises(UsageError, match="needs a codec"):
        ClapPretrain(FOLDER, ClapPretrainConfig(codec_share=0.1), codec=None, seed=0)
    with pytest.raises(UsageError, match="needs a codec"):
        AttributePretrain(FOLDER, AttributePretrainConfig(codec_share=0.1), codec=None, seed=0)
    with pytest.raises(ValueError, match="eval_items"):
        ClapPretrainConfig(eval_items=19)
    with pytest.raises(ValueError, match="codec_share"):
        AttributePretrainConfig(codec_share=1.5)


def test_another_codec_does_not_read_the_features_of_the_first() -> None:
    config = ClapPretrainConfig(batch=8, codec_share=0.25, codec_clips=CODED, eval_items=HELD_OUT)
    other = MelCodec()
    other.basis.mul_(0.5)
    first, second = (ClapPretrain(FOLDER, config, codec=codec, seed=1).features for codec in (MelCodec(), other))
    assert first.coded is not None and second.coded is not None
    assert not np.array_equal(first.coded, second.coded)
