"""The compositional reward: exact on rendered scenes of every category, graded on request, invalid with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gencontrol.errors import UsageError
from gencontrol.recipes.scenes.data import CATEGORIES, parse
from gencontrol.recipes.scenes.data.corpus import sample_captions
from gencontrol.recipes.scenes.data.render import arrange, render
from gencontrol.recipes.scenes.networks import SceneReader
from gencontrol.rewards import load_reward
from gencontrol.types import RewardContext


def pictures(prompts: list[str], seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(render([arrange(parse(prompt), rng) for prompt in prompts]))


def test_right_pictures_score_one_and_exchanged_ones_do_not() -> None:
    prompts = [text for kind in CATEGORIES for text in sample_captions(12, split="test", kind=kind, seed=2)]
    reward = load_reward("compositional")
    images = pictures(prompts)
    out = reward(images, RewardContext(prompts=prompts))
    assert bool(out.valid.all()) and out.values.dtype == torch.float32
    accuracy = out.extras["accuracy"]
    assert set(accuracy) == set(CATEGORIES) and accuracy["word"] >= 0.95  # the reader's share, see its card
    assert min(accuracy[kind] for kind in CATEGORIES if kind != "word") == 1.0
    assert out.extras["category"] == [kind for kind in CATEGORIES for _ in range(12)]
    assert torch.equal(out.extras["exact"].float(), out.values)
    shifted = reward(images.roll(12, 0), RewardContext(prompts=prompts))  # each category's pictures for another one
    assert shifted.mean() <= 0.15  # a caption that says little ("a circle") may be true of another picture


def test_share_is_graded() -> None:
    prompts = ["a red circle and a blue square"] * 2
    images = pictures(["a red circle and a blue square", "a red circle and a blue triangle"])
    exact = load_reward("compositional")(images, RewardContext(prompts=prompts))
    share = load_reward("compositional", score="share")(images, RewardContext(prompts=prompts))
    assert exact.values.tolist() == [1.0, 0.0] and share.values.tolist() == [1.0, 0.75]
    assert exact.extras["accuracy"] == {"binding": 0.5} == share.extras["accuracy"]
    assert "red circle" in exact.extras["found"][1] and "blue triangle" in exact.extras["found"][1]


def test_unknown_captions_and_broken_images_are_invalid_with_a_reason() -> None:
    prompts = ["a photo of a cat", "a red circle", "a red circle"]
    images = pictures(["a red circle"] * 3)
    images[1, 0, 0, 0] = float("nan")
    out = load_reward("compositional")(images, RewardContext(prompts=prompts))
    assert out.valid.tolist() == [False, False, True] and out.values[2] == 1.0
    assert bool(out.values[:2].isnan().all())
    assert "a photo of a cat" in out.extras["reasons"][0] and "NaN" in out.extras["reasons"][1]
    assert out.extras["accuracy"] == {"colours": 1.0} and out.extras["category"] == [None, "colours", "colours"]


def test_words_and_their_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a reader that always reads CAT, so that only the comparison is tested."""
    torch.manual_seed(0)
    SceneReader().save_pretrained(tmp_path)
    monkeypatch.setattr(SceneReader, "read", lambda self, images: ["CAT"] * len(images))
    reward = load_reward("compositional", score="share", reward_model=str(tmp_path))
    prompts = ["the word CAT in red", "the word CAT in blue", "the word COT", "the word DOG", "a circle"]
    images = pictures(["the word CAT in red"] * 4 + ["a circle"])
    out = reward(images, RewardContext(prompts=prompts))
    torch.testing.assert_close(out.values, torch.tensor([1.0, 0.75, 2 / 3, 0.0, 1.0]))
    assert out.extras["exact"].tolist() == [True, False, False, False, True]
    assert out.extras["found"][1] == "the word CAT in red"


@pytest.mark.parametrize(
    ("images", "prompts", "part"),
    [
        (torch.zeros(1, 3, 64, 64), ["a circle"], "32x32 pixels, not 64x64"),
        (torch.zeros(1, 1, 32, 32), ["a circle"], r"\[b 3 h w\]"),
        (torch.full((1, 3, 32, 32), 2.0), ["a circle"], r"in \[0, 1\]"),
        (torch.zeros(2, 3, 32, 32), ["a circle"], "2 images, 1 given"),
        (torch.zeros(1, 3, 32, 32), None, "none given"),
    ],
)
def test_wrong_inputs_are_named(images: torch.Tensor, prompts: list[str] | None, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        load_reward("compositional")(images, RewardContext(prompts=prompts))


def test_unknown_score_is_refused() -> None:
    with pytest.raises(UsageError, match="no score 'soft'"):
        load_reward("compositional", score="soft")
