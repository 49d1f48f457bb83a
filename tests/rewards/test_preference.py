"""`pickscore`, `hps`, `aesthetic` and the JPEG rewards: their formulas on one tiny backbone, heads, refusals."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gencontrol.errors import UsageError
from gencontrol.rewards import load_reward, load_rewards
from gencontrol.types import RewardContext
from tests.helpers.fixtures_clip import as_pil, pictures, write_clip

PROMPTS = ["a red cat", "blue dog", "two small circles above"]
CONTEXT = RewardContext(PROMPTS)
SIZES = (32, 24, 12, 8, 4, 1)  # the improved predictor's five maps, on 32 numbers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


def head(sizes: tuple[int, ...] = SIZES) -> dict[str, torch.Tensor]:
    """Keys of the published file: maps at 0, 2, 4, 6, 7, dropouts between."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for index, (start, end) in zip((0, 2, 4, 6, 7), zip(sizes, sizes[1:])):
        tensors[f"layers.{index}.weight"] = torch.randn(end, start, generator=generator) / start**0.5
        tensors[f"layers.{index}.bias"] = torch.randn(end, generator=generator)
    return tensors


def test_pickscore_and_hps_are_the_clip_cosine(folder: Path) -> None:
    """PickScore multiplies by the logit scale; HPS pads, which on squares is the same pixels."""
    images = pictures(3)
    clip = load_reward("clip", model=folder)
    cosine, scale = clip(images, CONTEXT).values, clip.embeddings.backend.logit_scale
    assert scale == pytest.approx(1 / 0.07, rel=1e-3)
    pick, hps = load_reward("pickscore", model=folder), load_reward("hps", model=folder)
    torch.testing.assert_close(pick(images, CONTEXT).values, scale * cosine)
    torch.testing.assert_close(
        load_reward("pickscore", model=folder, logit_scale=False)(images, CONTEXT).values, cosine
    )
    torch.testing.assert_close(hps(images, CONTEXT).values, cosine, atol=1e-5, rtol=0)
    wide = pictures(3, 30, 60)
    assert float((hps(wide, CONTEXT).values - clip(wide, CONTEXT).values).abs().max()) > 1e-4
    same = load_reward("clip", model=folder, resize="pad")(wide, CONTEXT).values
    torch.testing.assert_close(hps(wide, CONTEXT).values, same)
    assert pick.embeddings.backend is hps.embeddings.backend is clip.embeddings.backend
    total = load_rewards(["clip:0.5", "pickscore:0.1"], reward_model=folder)
    torch.testing.assert_close(total(images, CONTEXT).values, (0.5 + 0.1 * scale) * cosine)


def test_processor_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    """PickScore's repository has neither tokenizer nor image settings."""
    from transformers import CLIPModel

    CLIPModel.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="model"):
        load_reward("pickscore", model=tmp_path)
    images = pictures(3)
    borrowed = load_reward("pickscore", model=tmp_path, processor=folder)(images, CONTEXT).values
    torch.testing.assert_close(borrowed, load_reward("pickscore", model=folder)(images, CONTEXT).values)


def test_aesthetic_head(folder: Path, tmp_path: Path) -> None:
    """The head is applied to unit embeddings without activations, as the published weights want it."""
    tensors = head()
    save_file(tensors, tmp_path / "head.safetensors")
    reward = load_reward("aesthetic", model=folder, head=tmp_path / "head.safetensors")
    images = pictures(4)
    seen = load_reward("clip", model=folder)(images, RewardContext(["x"] * 4)).extras["image_embeddings"]
    expected = seen.double()
    for index in (0, 2, 4, 6, 7):
        expected = expected @ tensors[f"layers.{index}.weight"].double().T + tensors[f"layers.{index}.bias"].double()
    torch.testing.assert_close(reward(images, RewardContext()).values.double(), expected[:, 0], atol=1e-5, rtol=0)
    moved = images.requires_grad_(True)
    reward(moved, RewardContext()).values.sum().backward()
    assert moved.grad is not None and float(moved.grad.abs().sum()) > 0
    linear = {"weight": torch.randn(1, 32), "bias": torch.randn(1)}
    save_file(linear, tmp_path / "linear.safetensors")
    simple = load_reward("aesthetic", model=folder, head=tmp_path / "linear.safetensors")
    torch.testing.assert_close(
        simple(images.detach(), RewardContext()).values, (seen @ linear["weight"].T + linear["bias"])[:, 0]
    )


def test_aesthetic_head_beside_the_model(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "both")
    with pytest.raises(UsageError, match="needs its head"):
        load_reward("aesthetic", model=folder)
    save_file(head(), folder / "aesthetic_head.safetensors")
    assert load_rewards(["aesthetic"], reward_model=folder)(pictures(2), RewardContext()).valid.all()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t | {"extra": torch.zeros(1)}, "'extra'"),
        (lambda t: {k: v for k, v in t.items() if k != "layers.4.bias"}, "do not follow each other"),
        (lambda t: {k: v for k, v in t.items() if not k.startswith("layers.4")}, "do not follow each other"),
        (lambda t: {k: v for k, v in t.items() if not k.startswith("layers.7")}, "ends in 4 numbers"),
        (lambda t: head((16, 24, 12, 8, 4, 1)), "embeddings of 16 numbers"),
        (lambda t: {"bias": torch.zeros(1)}, "do not follow each other"),
    ],
)
def test_wrong_heads(folder: Path, tmp_path: Path, change: object, text: str) -> None:
    save_file(change(head()), tmp_path / "head.safetensors")  # type: ignore[operator]
    with pytest.raises(UsageError, match=text):
        load_reward("aesthetic", model=folder, head=tmp_path / "head.safetensors")


def test_pickled_and_damaged_heads(folder: Path, tmp_path: Path) -> None:
    torch.save(head(), tmp_path / "head.pth")
    with pytest.raises(UsageError, match="convert it once: python -c"):
        load_reward("aesthetic", model=folder, head=tmp_path / "head.pth")
    (tmp_path / "head.safetensors").write_bytes(b"\x10" + b"\x00" * 7 + b"{")
    with pytest.raises(UsageError, match="not a whole safetensors file"):
        load_reward("aesthetic", model=folder, head=tmp_path / "head.safetensors")
    with pytest.raises(UsageError, match="does not exist"):
        load_reward("aesthetic", model=folder, head=tmp_path / "none.safetensors")


def test_hps_needs_its_weights() -> None:
    with pytest.raises(UsageError, match=r"HPS_v2\.1_compressed\.pt"):
        load_reward("hps")


def test_jpeg_sizes() -> None:
    """The very bytes of Pillow at quality 95; noise is larger than a plain picture; signs are opposite."""
    images = torch.cat([pictures(2), torch.rand(1, 3, 40, 40), torch.full((1, 3, 40, 40), 0.4)])
    small, large = load_reward("compressibility"), load_reward("incompressibility")
    sizes = []
    for picture in as_pil(images):
        picture.save(buffer := io.BytesIO(), format="JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    torch.testing.assert_close(large(images, RewardContext()).values, torch.tensor(sizes))
    torch.testing.assert_close(small(images, RewardContext()).values, -torch.tensor(sizes))
    assert sizes[2] > sizes[0] > sizes[3] and not small.differentiable
    images[1] = float("nan")
    assert small(images, RewardContext()).valid.tolist() == [True, False, True, True]
    with pytest.raises(UsageError, match=r"\[0, 1\]"):
        small(images[:1] - 1, RewardContext())
