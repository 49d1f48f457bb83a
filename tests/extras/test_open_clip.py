"""The real open_clip package, with random checkpoints of a tiny architecture, through our loader."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("open_clip") is None:
    pytest.skip("open_clip_torch is not installed (make test-extras)", allow_module_level=True)

from safetensors.torch import save_file

from gencontrol.errors import UsageError
from gencontrol.rewards import load_reward
from gencontrol.types import RewardContext
from tests.helpers.fixtures_clip import as_pil, pictures
from tests.helpers.fixtures_models import seeded

pytestmark = pytest.mark.extras
PROMPTS = ["a red cat", "blue dog", "two small circles"]
NAME = "gencontrol-tiny"
STEP = 0.018  # one step of eight bits after normalisation; Pillow rounds twice
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """Folder with w.pt, w.safetensors and an open_clip folder; the model; its own preprocessing."""
    import open_clip

    folder: Path = tmp_path_factory.mktemp("open_clip")
    (folder / f"{NAME}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / f"{NAME}.json")
    with seeded(0):
        model, _, preprocess = open_clip.create_model_and_transforms(NAME)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "w.pt")
    save_file(state, folder / "w.safetensors")
    inner = folder / "folder"
    inner.mkdir()
    settings = {"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (inner / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": settings}))
    save_file(state, inner / "open_clip_model.safetensors")
    return folder, model.eval(), preprocess


def cosines(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    import open_clip

    tokens = open_clip.get_tokenizer(NAME)(PROMPTS)
    with torch.no_grad():
        return (model.encode_image(pixels, normalize=True) * model.encode_text(tokens, normalize=True)).sum(-1)


@pytest.mark.parametrize(("height", "width"), [(48, 48), (40, 61), (61, 40)])
@pytest.mark.parametrize("file", ["w.pt", "w.safetensors"])
def test_checkpoint_files_equal_the_package(tiny: tuple[Path, Any, Any], file: str, height: int, width: int) -> None:
    folder, model, preprocess = tiny
    images = pictures(3, height, width)
    pixels = torch.stack([preprocess(picture) for picture in as_pil(images)])
    reward = load_reward("clip", model=folder / file, architecture=NAME)
    assert float((reward.embeddings.backend.prep(images) - pixels).abs().max()) < STEP
    values = reward(images, RewardContext(PROMPTS)).values
    torch.testing.assert_close(values, cosines(model, pixels), atol=2e-3, rtol=0)


def test_hps_pads_as_its_authors_do(tiny: tuple[Path, Any, Any]) -> None:
    """hpsv2 resizes the longer edge and fills with black before the normalisation."""
    from open_clip.transform import image_transform

    folder, model, _ = tiny
    reward = load_reward("hps", model=folder / "w.pt", architecture=NAME)
    prep = reward.embeddings.backend.prep
    padded = image_transform(32, is_train=False, mean=prep.mean, std=prep.std, resize_mode="longest", fill_color=0)
    images = pictures(3, 40, 61)
    pixels = torch.stack([padded(picture) for picture in as_pil(images)])
    torch.testing.assert_close(reward(images, RewardContext(PROMPTS)).values, cosines(model, pixels), atol=2e-3, rtol=0)


def test_folder_with_its_own_settings(tiny: tuple[Path, Any, Any]) -> None:
    folder, model, _ = tiny
    reward = load_reward("clip", model=folder / "folder")
    prep = reward.embeddings.backend.prep
    assert (prep.resize, prep.mean, prep.std) == ("squash", (0.5,) * 3, (0.25,) * 3)
    images = pictures(3, 32, 32)
    values = reward(images, RewardContext(PROMPTS)).values
    torch.testing.assert_close(values, cosines(model, (images - 0.5) / 0.25), atol=1e-5, rtol=0)
    moved = images.requires_grad_(True)
    reward(moved, RewardContext(PROMPTS)).values.sum().backward()
    assert moved.grad is not None and float(moved.grad.abs().sum()) > 0


def test_refusals(tiny: tuple[Path, Any, Any]) -> None:
    file = tiny[0] / "w.pt"
    for options, text in (
        ({"architecture": "ViT-B-32"}, "cannot load"),
        ({"architecture": "ViT-B32"}, "Did you mean 'ViT-B-32'"),
        ({"model": "open_clip:ViT-B-33"}, "no architecture 'ViT-B-33'"),
        ({"model": "open_clip:ViT-B-32"}, "cannot load 'ViT-B-32'"),
    ):
        with pytest.raises(UsageError, match=text):
            load_reward("clip", **{"model": file, **options})
