"""The OCR reward: edit distance, what a prompt asks for, the bundled reader's accuracy, engines and bad input."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from gencontrol.errors import EnvironmentMissing, UsageError
from gencontrol.recipes.scenes.data import parse
from gencontrol.recipes.scenes.data.corpus import HELD_OUT_WORDS, sample_captions
from gencontrol.recipes.scenes.data.render import arrange, render
from gencontrol.recipes.scenes.data.words import damage
from gencontrol.recipes.scenes.networks import SceneReader
from gencontrol.rewards import load_reward
from gencontrol.rewards.image.ocr import ENGINE_SIDE, asked_text, edit_distance, rapid_engine, scene_reader, similarity
from gencontrol.types import RewardContext


def test_edit_distance() -> None:
    cases = {
        ("", ""): 0,
        ("CAT", ""): 3,
        ("CAT", "CAT"): 0,
        ("CAT", "COT"): 1,
        ("CAT", "ACT"): 2,
        ("KITTEN", "SITTING"): 3,
    }
    assert {pair: edit_distance(*pair) for pair in cases} == cases
    assert all(edit_distance(b, a) == value for (a, b), value in cases.items())
    assert similarity("CAT", "COAT") == 0.75 and similarity("", "CAT") == 0.0 and similarity("XYZQ", "CAT") == 0.0


def test_asked_text() -> None:
    assert asked_text("the word CAT in red") == "CAT" == asked_text(" the word CAT")
    assert asked_text('a sign that says "Hello World" at night') == "Hello World"
    assert asked_text("a sign that says “Hello”") == "Hello"
    assert [asked_text(t) for t in ("a red circle", "the word cat", "the word CATS-", "the word ABCDE", '" "')] == [
        None
    ] * 5


def words(prompts: list[str], seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(render([arrange(parse(prompt), rng) for prompt in prompts]))


def test_bundled_reader_reads_held_out_words_clean_and_damaged() -> None:
    prompts = [f"the word {word}" for word in HELD_OUT_WORDS]
    images = words(prompts)
    reward = load_reward("ocr")
    clean = reward(images, RewardContext(prompts=prompts))
    assert clean.values.mean() >= 0.99 and clean.extras["exact"].float().mean() >= 0.97  # measured: see the card
    draw = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    harmed = damage(images, torch.full((len(images),), 0.5), torch.full((len(images),), 0.05), draw)
    assert reward(harmed, RewardContext(prompts=prompts)).extras["exact"].float().mean() >= 0.90


def test_bundled_reader_reads_nothing_where_nothing_is_written() -> None:
    prompts = sample_captions(60, kind="binding")
    read = scene_reader().read(words(prompts))
    assert np.mean([text == "" for text in read]) >= 0.95


def test_invalid_items_have_reasons() -> None:
    prompts = ["a red circle", "the word CAT", "the word CAT"]
    images = words(["the word CAT"] * 3)
    images[1] = float("inf")
    out = load_reward("ocr")(images, RewardContext(prompts=prompts))
    assert out.valid.tolist() == [False, False, True] and out.values[2] == 1.0 and bool(out.values[:2].isnan().all())
    assert "asks for no text" in out.extras["reasons"][0] and "NaN" in out.extras["reasons"][1]
    assert out.extras["read"] == [None, None, "CAT"] and out.extras["asked"] == [None, "CAT", "CAT"]
    with pytest.raises(UsageError, match="3 images, 1 given"):
        load_reward("ocr")(images, RewardContext(prompts=["the word CAT"]))


def test_engine_reads_enlarged_images_and_folds_case(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def read(image: np.ndarray) -> str:
        seen.append(image.shape)
        assert image.dtype == np.uint8
        return "hel lo"

    monkeypatch.setattr("gencontrol.rewards.image.ocr.rapid_engine", lambda: read)
    out = load_reward("ocr")(torch.zeros(2, 3, 48, 64), RewardContext(prompts=['a sign "HELLO"', 'a sign "HELP"']))
    zoom = -(-ENGINE_SIDE // 48)
    assert seen == [(48 * zoom, 64 * zoom, 3)] * 2
    torch.testing.assert_close(out.values, torch.tensor([1.0, 0.6]))


def test_engine_gets_bgr_and_may_find_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class RapidOCR:
        def __call__(self, image: np.ndarray) -> tuple[list[list[object]] | None, None]:
            return ([[None, "RED", 0.9], [None, "SKY", 0.8]] if image[0, 0, 2] == 255 else None), None

    module = types.ModuleType("rapidocr_onnxruntime")
    module.RapidOCR = RapidOCR  # type: ignore[attr-defined]  # a stand-in module
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", module)
    rapid_engine.cache_clear()
    images = torch.zeros(2, 3, 400, 400)
    images[0, 0] = 1.0
    out = load_reward("ocr", engine="rapidocr")(images, RewardContext(prompts=['"red sky"'] * 2))
    rapid_engine.cache_clear()
    assert out.values.tolist() == [1.0, 0.0] and out.extras["read"] == ["RED SKY", ""] and bool(out.valid.all())


def test_missing_engine_names_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    rapid_engine.cache_clear()
    with pytest.raises(EnvironmentMissing, match=r'pip install "gencontrol\[ocr\]"'):
        load_reward("ocr", engine="rapidocr")
    with pytest.raises(EnvironmentMissing, match="larger than 32x32"):
        load_reward("ocr")(torch.zeros(1, 3, 64, 64), RewardContext(prompts=['"A"']))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="no engine 'tesseract'"):
        load_reward("ocr", engine="tesseract")
    with pytest.raises(UsageError, match="scene networks take"):
        load_reward("ocr", engine="scenes")(torch.zeros(1, 3, 16, 16), RewardContext(prompts=["the word A"]))


def test_best_path_decoding() -> None:
    """Repeated columns are one letter, a blank between equal letters keeps both."""
    path = [0, 1, 1, 0, 1, 2, 2, 0, 0, 26, 0, 0, 0, 0, 0, 0]
    table = torch.full((1, 16, 27), -9.0)
    table[0, torch.arange(16), torch.tensor(path)] = 0.0

    class Fixed(SceneReader):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return table

    with torch.random.fork_rng(devices=[]):
        assert Fixed().read(torch.zeros(1, 3, 32, 32)) == ["AABZ"]
