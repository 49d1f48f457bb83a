"""`digit-class`: labels and groups, prompts, gradients, invalid images, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gencontrol.errors import UsageError
from gencontrol.models.readers.image_classifier import build_image_classifier
from gencontrol.recipes.digits.data import CLASSES, load_digit_images
from gencontrol.rewards import Reward, load_reward, load_rewards
from gencontrol.types import RewardContext

NONE = RewardContext()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("pipe")
    build_image_classifier(0, CLASSES).save_pretrained(path / "classifier")
    return path


def images(n: int = 5) -> torch.Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_value_is_the_log_probability(folder: Path) -> None:
    expected = build_image_classifier(0, CLASSES).log_probs(images() * 2 - 1).detach()
    reward = load_reward("digit-class", label=3, reward_model=folder)
    assert isinstance(reward, Reward) and reward.kind == "item" and reward.differentiable
    torch.testing.assert_close(reward(images(), NONE).values, expected[:, 3])
    inner = load_reward("digit-class", label="3", reward_model=folder / "classifier")
    assert torch.equal(inner(images(), NONE).values, reward(images(), NONE).values)
    for label, columns in (("even", [0, 2, 4, 6, 8]), ("odd", [1, 3, 5, 7, 9])):
        out = load_reward("digit-class", label=label, reward_model=folder)(images(), NONE)
        torch.testing.assert_close(out.values, expected[:, columns].amax(1))
    asked = load_reward("digit-class", reward_model=folder)
    out = asked(images(), RewardContext(prompts=["0", "9", "odd", "4", " Even"]))
    odd, even = expected[2, 1::2].amax(), expected[4, 0::2].amax()
    torch.testing.assert_close(out.values, torch.stack([expected[0, 0], expected[1, 9], odd, expected[3, 4], even]))


def test_gradients_and_invalid_images(folder: Path) -> None:
    reward = load_reward("digit-class", label=1, reward_model=folder)
    x = images().requires_grad_(True)
    reward(x, NONE).values.sum().backward()
    assert x.grad is not None and bool((x.grad.flatten(1).norm(dim=1) > 0).all())
    broken = images()
    broken[2, 0, 0, 0] = float("nan")
    out = reward(broken, NONE)
    assert out.valid.tolist() == [True, True, False, True, True] and bool(out.values[2].isnan())
    torch.testing.assert_close(out.values[[0, 4]], reward(images(), NONE).values[[0, 4]])
    assert reward(images(0), NONE).values.shape == (0,)


@pytest.mark.parametrize("label", [10, -1, "ten", "eve", ""])
def test_wrong_label_is_one_clear_error(label: int | str, folder: Path) -> None:
    with pytest.raises(UsageError, match="has no label.*Labels: 0, 1, .*odd") as caught:
        load_reward("digit-class", label=label, reward_model=folder)
    assert "\n" not in str(caught.value)
    assert ("Did you mean 'even'?" in str(caught.value)) == (label == "eve")


def test_refusals(folder: Path, tmp_path: Path) -> None:
    reward = load_reward("digit-class", label=1, reward_model=folder)
    for wrong in (images() * 2 - 1, images()[:, 0], [1.0], torch.zeros(2, 1, 8, 8, dtype=torch.uint8)):
        with pytest.raises(UsageError, match=r"in \[0, 1\]"):
            reward(wrong, NONE)
    with pytest.raises(UsageError, match=r"takes \[1, 8, 8\]"):
        reward(torch.zeros(1, 1, 9, 9), NONE)
    asked = load_reward("digit-class", reward_model=folder)
    with pytest.raises(UsageError, match="or 5 prompts"):
        asked(images(), NONE)
    with pytest.raises(UsageError, match="no label 'a cat'"):
        asked(images(1), RewardContext(prompts=["a cat"]))
    with pytest.raises(UsageError, match="no folder of an ImageClassifier"):
        load_reward("digit-class", label=1, reward_model=tmp_path)


def test_bundled_reward_knows_the_digits() -> None:
    test = load_digit_images("test")
    seven = load_rewards(["digit-class"])((test.images + 1) / 2, RewardContext(prompts=["7"] * len(test))).values
    assert float(seven[test.labels == 7].mean()) > -0.5 and float(seven[test.labels != 7].mean()) < -4.0
    even = load_reward("digit-class", label="even")((test.images + 1) / 2, NONE).values
    assert float(((even > -0.7) == (test.labels % 2 == 0)).float().mean()) > 0.96


def test_larger_images_are_shrunk() -> None:
    """Constant images keep their value, gradients reach every pixel, smaller ones are refused."""
    from gencontrol.rewards.image.classifier import ClassifierReward
    from tests.helpers.fixtures_scenes import classifier

    reward = ClassifierReward(reward_model={"tone": classifier(("dark", "bright"), 8)}, label="dark", device="cpu")
    levels = torch.tensor([0.2, 0.7]).view(2, 1, 1, 1)
    small, large = (reward(levels.expand(2, 3, side, side), RewardContext()).values for side in (8, 20))
    torch.testing.assert_close(large, small, atol=1e-5, rtol=1e-5)
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reward(pixels, RewardContext()).values.sum().backward()
    assert pixels.grad is not None and bool((pixels.grad.abs().sum(1) > 0).all())
    with pytest.raises(UsageError, match="give larger squares"):
        reward(torch.full((1, 3, 6, 6), 0.5), RewardContext())
