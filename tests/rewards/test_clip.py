"""`clip` against transformers' own processor and model: pixels, scores, gradients, cached texts, refusals."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from gencontrol.errors import EnvironmentMissing, UsageError
from gencontrol.rewards import Reward, load_reward, load_rewards
from gencontrol.rewards.image.clip_features import ImagePrep
from gencontrol.types import RewardContext
from tests.helpers.fixtures_clip import as_pil, pictures, write_clip

PROMPTS = ["a red cat", "blue dog", "two small circles above"]
CONTEXT = RewardContext(PROMPTS)
#: one step of eight bits after normalisation by the smallest deviation, 1/255/0.2613 = 0.0150; Pillow rounds twice
STEP = 0.018


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


def reference(folder: Path, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels of transformers' processor, and the model's own logits / scale (cosines) for PROMPTS."""
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pixels = torch.as_tensor(
        CLIPImageProcessorPil.from_pretrained(folder)(as_pil(images), return_tensors="pt")["pixel_values"]
    )
    tokens = CLIPTokenizer.from_pretrained(folder)(PROMPTS, padding=True, truncation=True, return_tensors="pt")
    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(pixel_values=pixels, **tokens).logits_per_image
    return pixels, (logits / model.logit_scale.exp()).diagonal()


@pytest.mark.parametrize(("height", "width"), [(40, 40), (31, 57), (64, 33), (12, 17), (97, 45), (24, 24)])
def test_pixels_and_scores_equal_the_reference(folder: Path, height: int, width: int) -> None:
    images = pictures(3, height, width)
    reward = load_reward("clip", model=folder)
    pixels, cosines = reference(folder, images)
    mine = reward.embeddings.backend.prep(images)
    assert mine.shape == pixels.shape and float((mine - pixels).abs().max()) < (1e-6 if height == 24 else STEP)
    torch.testing.assert_close(reward(images, CONTEXT).values, cosines, atol=2e-3, rtol=0)
    if height == 24:  # no resize, no rounding: the same numbers
        torch.testing.assert_close(reward(images, CONTEXT).values, cosines, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{"size": 32}, {"squash": True}])
def test_other_processors(tmp_path: Path, options: dict[str, int | bool]) -> None:
    folder = write_clip(tmp_path, **options)  # type: ignore[arg-type]
    images = pictures(3, 50, 37)
    pixels, cosines = reference(folder, images)
    reward = load_reward("clip", model=folder)
    assert float((reward.embeddings.backend.prep(images) - pixels).abs().max()) < STEP
    torch.testing.assert_close(reward(images, CONTEXT).values, cosines, atol=2e-3, rtol=0)


def test_ways_to_fit_an_image() -> None:
    """Squash equals the crop on squares, and padding keeps everything: its border is black, its inside the picture."""
    plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    square, wide = torch.rand(2, 3, 40, 40), torch.full((1, 3, 20, 40), 0.5)
    crop, squash = ImagePrep(16, 16, **plain), ImagePrep(16, 16, resize="squash", **plain)
    pad = ImagePrep(16, 16, resize="pad", **plain)
    torch.testing.assert_close(crop(square), squash(square))
    torch.testing.assert_close(crop(square), pad(square))
    padded = pad(wide)
    assert float(padded[0, :, :4].abs().max()) == 0 and float(padded[0, :, 12:].abs().max()) == 0
    torch.testing.assert_close(padded[0, :, 4:12], torch.full((3, 8, 16), 0.5))
    assert float(crop(wide).min()) == pytest.approx(0.5) and float(squash(wide).min()) == pytest.approx(0.5)
    for bad in ({"resize": "stretch"}, {"filter": "lanczos"}, {"shortest": 8}):
        with pytest.raises(UsageError):
            ImagePrep(16, 16, **bad)


def test_gradient_reaches_the_image_and_matches_differences(folder: Path) -> None:
    """Central differences along the gradient; 1 % because the arithmetic is float32."""
    reward = load_reward("clip", model=folder)
    assert isinstance(reward, Reward) and reward.kind == "item" and reward.differentiable
    images = (pictures(3, 40, 32) * 0.6 + 0.2).requires_grad_(True)
    reward(images, CONTEXT).values.sum().backward()
    grad = images.grad
    assert grad is not None and bool((grad.flatten(1).norm(dim=1) > 0).all())
    with torch.no_grad():
        way = grad / grad.norm()
        up, down = (float(reward(images + s * 0.05 * way, CONTEXT).values.double().sum()) for s in (1, -1))
    assert (up - down) / 0.1 == pytest.approx(float(grad.norm()), rel=0.01)
    assert not reward(images.detach(), CONTEXT).values.requires_grad
    for parameter in reward.embeddings.backend._model.parameters():
        assert parameter.grad is None


def test_batches_texts_and_sharing(folder: Path) -> None:
    small = load_reward("clip", model=folder, batch_size=2)
    whole = load_rewards(["clip"], reward_model=folder)
    images = pictures(5)
    context = RewardContext(["red", "blue", "red", "red", "dog"])
    torch.testing.assert_close(small(images, context).values, whole(images, context).values, atol=1e-6, rtol=0)
    assert small.embeddings.backend is whole.embeddings.backend
    with mock.patch.object(small.embeddings.backend, "text") as encode:
        small(images, context)
        encode.assert_not_called()
    scaled = load_reward("clip", model=folder, logit_scale=True)
    torch.testing.assert_close(
        scaled(images, context).values, small(images, context).values * small.embeddings.backend.logit_scale
    )
    assert small(images[:0], RewardContext([])).values.shape == (0,)
    half = load_reward("clip", model=folder, precision="bf16")(images, context).values
    torch.testing.assert_close(half, whole(images, context).values, atol=0.03, rtol=0)  # 8 bits of mantissa


def test_inputs(folder: Path) -> None:
    reward = load_reward("clip", model=folder)
    images = pictures(3)
    from_pil = reward(as_pil(images), CONTEXT)
    torch.testing.assert_close(from_pil.values, reward(images, CONTEXT).values, atol=1e-6, rtol=0)
    broken = images.clone()
    broken[1, 0, 0, 0] = float("inf")
    out = reward(broken, CONTEXT)
    assert out.valid.tolist() == [True, False, True] and bool(out.values[1].isnan())
    torch.testing.assert_close(out.values[[0, 2]], from_pil.values[[0, 2]], atol=1e-6, rtol=0)
    for wrong in (images * 2 - 1, images * 255, images[:, :1], images[0], images.to(torch.uint8), [1.0], None, []):
        with pytest.raises(UsageError, match=r"\[0, 1\]"):
            reward(wrong, CONTEXT)
    with pytest.raises(UsageError, match="2 sizes"):
        reward(as_pil(images[:1]) + as_pil(pictures(1, 20, 20)), RewardContext(PROMPTS[:2]))
    for prompts, text in ((None, "none given"), (PROMPTS[:2], "2 given")):
        with pytest.raises(UsageError, match=text):
            reward(images, RewardContext(prompts))


def test_wrong_models(folder: Path, tmp_path: Path) -> None:
    def error(**options: object) -> str:
        with pytest.raises(UsageError) as caught:
            load_reward("clip", **{"model": folder, **options})
        return str(caught.value)

    assert "offline" in error(model="nobody/nothing")
    assert "architecture=NAME" in error(model=_file(tmp_path / "weights.pt"))
    assert "does not exist" in error(model=tmp_path / "absent.pt")
    assert "leave it out" in error(architecture="ViT-B-32")
    assert "precision" in error(precision="int8")
    assert "resize" in error(resize="zoom") and "batch_size" in error(batch_size=0)
    assert "no option 'sclae'" in error(sclae=2)
    copy = write_clip(tmp_path / "copy", edge=32)
    (copy / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text())
    assert "24×24" in error(model=copy) and "32×32" in error(model=copy)
    (copy / "model.safetensors").write_bytes(b"rubbish")
    assert "cannot be loaded" in error(model=copy)
    (copy / "config.json").write_text('{"model_type": "bert"}')
    assert "expected a CLIP model" in error(model=copy)
    with (
        mock.patch.dict("sys.modules", {"open_clip": None}),
        pytest.raises(EnvironmentMissing, match=r"gencontrol\[image\]"),
    ):
        load_reward("clip", model=_file(tmp_path / "w.pt"), architecture="ViT-B-32")


def _file(path: Path) -> Path:
    path.write_bytes(b"")
    return path
