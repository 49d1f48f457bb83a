"""Class label to image: labels, outputs, folders, noise streams, refusals; then what the bundled digits are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL.Image import Image

from gencontrol.errors import EnvironmentMissing, UsageError
from gencontrol.models.networks.image_transformer import PatchConfig, PatchTransformer, backbone_config
from gencontrol.models.networks.transformer import Transformer
from gencontrol.models.readers.image_classifier import build_image_classifier, calibration_error
from gencontrol.pipelines import ClassToImagePipeline, ImagePipelineOutput, ProcessSpec
from gencontrol.process import Linear
from gencontrol.recipes.digits.data import CLASSES, load_digit_images
from gencontrol.recipes.digits.quality import mmd2, moment_noise


def tiny(patch: int = 4, classes: int = 10) -> ClassToImagePipeline:
    cut = PatchConfig(patch=patch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = PatchTransformer(cut, Transformer(backbone_config(cut, classes=classes, dim=16, depth=1, heads=2)))
        for layer in (network.backbone.out, network.backbone.modulation):
            torch.nn.init.normal_(layer.weight, std=0.2)
    spec = ProcessSpec(steps=3, guidance_scale=1.0)
    return ClassToImagePipeline(transformer=network, classifier=build_image_classifier(0, CLASSES), process=spec)


@pytest.fixture(scope="module")
def pipe() -> ClassToImagePipeline:
    return tiny()


def latents(pipe: ClassToImagePipeline, labels: Any = (1, 2), **call: Any) -> torch.Tensor:
    images = pipe(labels, output_type="latent", **{"seed": 0, **call}).images
    assert isinstance(images, torch.Tensor)
    return images


def test_labels_are_numbers_names_or_nothing(pipe: ClassToImagePipeline) -> None:
    cond = pipe.encode([3, "3", " 7 ", None, ""])
    assert cond["drop"].tolist() == [False, False, False, True, True]
    assert cond["pooled"][:3].argmax(1).tolist() == [3, 3, 7] and not bool(cond["pooled"][3:].any())
    assert {key: value.shape for key, value in pipe.uncond().items()} == {"pooled": (1, 10), "drop": (1,)}
    xt = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(pipe.denoiser(xt, 0.5, pipe.encode([None, None])).x0, pipe.denoiser(xt, 0.5).x0)


def test_outputs(pipe: ClassToImagePipeline, fenced_rng: None) -> None:
    out = pipe([1, "2"], 2, seed=0)
    assert isinstance(out, ImagePipelineOutput) and out.images is out[0] is out["images"]
    assert len(out.images) == 4 and all(isinstance(i, Image) and i.size == (8, 8) and i.mode == "L" for i in out.images)
    tensor = pipe([1, "2"], 2, seed=0, output_type="pt").images
    array = pipe([1, "2"], 2, seed=0, output_type="np").images
    assert tensor.shape == (4, 1, 8, 8) and 0 <= float(tensor.min()) and float(tensor.max()) <= 1
    assert isinstance(array, np.ndarray) and array.shape == (4, 8, 8, 1)
    np.testing.assert_array_equal(array[..., 0], tensor[:, 0].numpy())
    np.testing.assert_array_equal(np.asarray(out.images[3]), (tensor[3, 0] * 255).round().to(torch.uint8).numpy())
    torch.testing.assert_close(tensor, pipe.decode(latents(pipe, [1, 1, 2, 2])))
    (plain,) = pipe([1], seed=0, return_dict=False)
    assert len(plain) == 1 and len(pipe(seed=0).images) == 1  # no label: one unconditional image


def test_each_image_has_its_own_noise(pipe: ClassToImagePipeline) -> None:
    whole = latents(pipe, [4, 5, 6])
    rows = [torch.Generator().manual_seed(k) for k in (0, 1)]
    # rounding of a batched against a single product, through three steps
    torch.testing.assert_close(latents(pipe, [4, 5])[0], whole[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        latents(pipe, [4, 4], seed=[7, 9])[1], latents(pipe, 4, seed=[9])[0], atol=1e-4, rtol=1e-4
    )
    noise = torch.stack([torch.randn(1, 8, 8, generator=g) for g in rows])
    again = [torch.Generator().manual_seed(k) for k in (0, 1)]
    assert torch.equal(latents(pipe, latents=noise), latents(pipe, seed=None, generator=again))


def test_guidance_moves_labelled_images_only(pipe: ClassToImagePipeline) -> None:
    mixed = [3, None]
    free, guided = latents(pipe, mixed), latents(pipe, mixed, guidance_scale=4.0)
    assert (guided[0] - free[0]).abs().max() > 1e-3
    torch.testing.assert_close(guided[1], free[1], atol=1e-4, rtol=1e-4)
    assert torch.equal(latents(pipe, [None], guidance_scale=4.0), latents(pipe, [None]))


def test_decode_maps_and_has_gradients(pipe: ClassToImagePipeline) -> None:
    x0 = torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 1, 5).requires_grad_(True)
    image = pipe.decode(x0)
    assert image.flatten().tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    image.sum().backward()
    assert x0.grad is not None and x0.grad[0, 0, 0, 2] == 0.5 and x0.grad[0, 0, 0, 0] == 0.0
    assert pipe.artefacts("a", image[0].detach())["a.png"].startswith(b"\x89PNG")


def test_saved_and_loaded_is_the_same(pipe: ClassToImagePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    again = ClassToImagePipeline.from_pretrained(tmp_path)
    assert torch.equal(latents(again), latents(pipe)) and again.class_names == CLASSES
    assert not any(p.requires_grad for p in again.classifier.parameters())
    again.save_pretrained(tmp_path)
    assert torch.equal(latents(ClassToImagePipeline.from_pretrained(tmp_path)), latents(pipe))
    shared = ClassToImagePipeline.from_pipe(again)
    assert shared.transformer is again.transformer and shared.spec == again.spec
    shared.register_modules(transformer=tiny(patch=2).transformer)
    assert shared.denoiser.network is shared.transformer is not again.transformer
    half = ClassToImagePipeline.from_pretrained(tmp_path, dtype="bf16")
    assert half.dtype == torch.bfloat16 and next(half.classifier.parameters()).dtype == torch.float32
    assert latents(half).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ({"class_labels": 10}, "label 10 is unknown"),
        ({"class_labels": -1}, "from 0 to 9"),
        ({"class_labels": "three"}, "'three' is unknown"),
        ({"class_labels": True}, "True is unknown"),
        ({"class_labels": []}, "empty list"),
        ({"class_labels": 1, "output_type": "pill"}, "Did you mean 'pil'"),
        ({"class_labels": 1, "num_images_per_label": 0}, "at least 1"),
        ({"class_labels": 1, "guidance_scale": -1.0}, "guidance_scale"),
        ({"class_labels": [1, 2], "seed": [0]}, "1 seeds for 2 samples"),
        ({"class_labels": 1, "latents": torch.zeros(1, 64)}, r"needs \(1, 1, 8, 8\)"),
    ],
)
def test_a_wrong_argument_is_one_sentence(pipe: ClassToImagePipeline, call: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        pipe(**call)
    assert "\n" not in str(caught.value)


def test_wrong_folders(pipe: ClassToImagePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gencontrol

    with pytest.raises(UsageError, match="TextToAudioPipeline"):
        ClassToImagePipeline.from_pretrained(Path(gencontrol.__file__).parent / "bundled" / "text_to_audio")
    with pytest.raises(UsageError, match=r"\(1, 8, 5\) and \(1, 8, 10\)"):
        tiny(classes=5)
    pipe.save_pretrained(tmp_path)
    (tmp_path / "classifier" / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="ImageClassifier"):
        ClassToImagePipeline.from_pretrained(tmp_path)
    monkeypatch.setattr("gencontrol.weights.BUNDLED", tmp_path / "bundled")
    with pytest.raises(EnvironmentMissing, match="'digits' is not in this installation"):
        ClassToImagePipeline.from_pretrained("bundled-digits")


# ---- the bundled weights; measured values and their tolerances: gencontrol/bundled/digits/README.md -----------------


@pytest.fixture(scope="module")
def digits() -> ClassToImagePipeline:
    return ClassToImagePipeline.from_pretrained("bundled-digits")


def test_bundled_model_is_small_and_a_flow(digits: ClassToImagePipeline) -> None:
    assert isinstance(digits.denoiser.process.schedule, Linear) and digits.latent_shape == (1, 8, 8)
    assert sum(p.numel() for p in digits.network.parameters()) < 1_000_000
    folder = Path(__file__).parents[2] / "gencontrol" / "bundled" / "digits"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 5e6


def test_bundled_classifier_is_right_and_calibrated(digits: ClassToImagePipeline) -> None:
    test = load_digit_images("test")
    with torch.no_grad():
        log_probs = digits.classifier.log_probs(test.images)
    assert float((log_probs.argmax(1) == test.labels).float().mean()) >= 0.96
    assert calibration_error(log_probs, test.labels) < 0.02  # 36 items in a bin of accuracy 0.99: sd about 0.016 each


@pytest.mark.parametrize("step", ["heun", "euler"])
def test_conditional_samples_are_judged_right(digits: ClassToImagePipeline, step: str) -> None:
    labels = torch.arange(10).repeat_interleave(20)
    made = digits(list(range(10)), 20, num_inference_steps=20, seed=3, output_type="pt", step=step).images
    with torch.no_grad():
        right = digits.classifier(made * 2 - 1).argmax(1) == labels
    assert float(right.float().mean()) >= 0.9


def test_unconditional_samples_are_close_to_the_data(digits: ClassToImagePipeline) -> None:
    """Nearer to the test images than half the distance of a Gaussian with the data's mean and covariance."""
    test = load_digit_images("test").images
    made = digits([None] * 400, num_inference_steps=20, seed=4, output_type="pt").images * 2 - 1
    gaussian = mmd2(moment_noise(load_digit_images("train").images, 400), test)
    # of 400 against 360 equal-law images the estimate has an sd of about 0.001 (measured on splits of the data)
    assert mmd2(made, test) < 0.5 * gaussian and gaussian > 0.01
    with torch.no_grad():
        shares = digits.classifier(made).argmax(1).bincount(minlength=10) / 400
    assert 0.04 < float(shares.min()) and float(shares.max()) < 0.18  # 0.1 ± 4 sd of 0.015
