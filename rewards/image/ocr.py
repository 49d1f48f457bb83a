"""Rendered text: 1 − normalised edit distance between what an image says and what the prompt asks for, in [0, 1].

32x32 scenes are read by the bundled network (`SceneReader`, accuracy in its card); larger images by a real engine,
RapidOCR (PaddleOCR's networks on onnxruntime), on text enlarged to at least 320 pixels.  The score is that of the OCR
rewards of Flow-GRPO (arXiv 2505.05470, §4).  For engines, case and white space do not count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from gencontrol.errors import EnvironmentMissing, UsageError
from gencontrol.rewards.base import checked, guarded
from gencontrol.rewards.inputs import image_batch
from gencontrol.rewards.pretrained import one_prompt_each
from gencontrol.types import RewardContext, RewardOut
from gencontrol.weights import bundled_path

#: smallest side of an image that an engine is given, pixels
ENGINE_SIDE = 320
_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


def edit_distance(a: str, b: str) -> int:
    """Return the least number of inserted, deleted or replaced characters that turn one text into the other."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]


def similarity(read: str, asked: str) -> float:
    """Return 1 − edit distance / length of the longer text; 0 when nothing was read."""
    return 1.0 - edit_distance(read, asked) / max(len(read), len(asked), 1)


def asked_text(prompt: str) -> str | None:
    """Return the text that a prompt asks for: of "the word CAT …", or the first in double quotes; None if none."""
    match = re.match(r"\s*the word ([A-Z]{1,4})\b(?!\S)", prompt)
    if match:
        return match[1]
    quoted = _QUOTED.search(prompt)
    return None if quoted is None else (quoted[1] or quoted[2]).strip() or None


@lru_cache(maxsize=4)
def scene_reader(reward_model: str = "bundled") -> Any:
    """Load a SceneReader once per process and folder."""
    from gencontrol.recipes.scenes.networks import SceneReader

    if reward_model != "bundled":
        return SceneReader.from_pretrained(reward_model)
    remedy = "install gencontrol from its wheel or a full checkout, or name a folder as reward_model"
    return SceneReader.from_pretrained(bundled_path("scene_reader/config.json", "scene reader", remedy).parent)


@lru_cache(maxsize=1)
def rapid_engine() -> Callable[[np.ndarray], str]:
    """Return (image [h w 3] uint8) → its text in reading order, by RapidOCR.

    Raises:
        EnvironmentMissing: the package is not installed.
    """
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:
        raise EnvironmentMissing(
            "reward 'ocr' reads images larger than 32x32 with RapidOCR: pip install \"gencontrol[ocr]\"."
        ) from error
    engine = RapidOCR()

    def read(image: np.ndarray) -> str:
        lines, _ = engine(np.ascontiguousarray(image[:, :, ::-1]))  # it expects BGR
        return " ".join(line[1] for line in lines or [])

    return read


class OcrReward:
    """Item reward: 1 − edit distance / length of the longer text, in [0, 1]; a prompt that asks for no text is invalid.

    `extras`: "read" and "asked" (texts, None where the item is invalid), "exact" [b] bool, "reasons" {item: why not}.
    """

    title = "whether the rendered word can be read"
    paper = "arXiv:2505.05470"
    medium = "image"
    kind: Literal["item", "set"] = "item"
    differentiable = False
    name = "ocr"

    def __init__(
        self, engine: Literal["auto", "scenes", "rapidocr"] = "auto", reward_model: str | Path = "bundled"
    ) -> None:
        """Choose who reads.

        Args:
            engine: "scenes" the bundled network, "rapidocr" the engine, "auto" the first for 32x32 pixels, else the
                second.
            reward_model: "bundled" or the folder of a SceneReader.

        Raises:
            UsageError: another engine.
            EnvironmentMissing: `engine="rapidocr"` without the package.
        """
        if engine not in ("auto", "scenes", "rapidocr"):
            raise UsageError(f"reward 'ocr' has no engine '{engine}'; give auto, scenes or rapidocr.")
        self._engine, self._reward_model = engine, str(reward_model)
        if engine == "rapidocr":
            rapid_engine()

    def __call__(self, samples: Float[Tensor, "b 3 h w"], context: RewardContext) -> RewardOut:
        """Read images in [0, 1] and compare with the prompts.

        Raises:
            UsageError: no RGB images in [0, 1], not one prompt for each, or `engine="scenes"` on another size.
            EnvironmentMissing: an engine is needed and not installed.
        """
        images, finite = image_batch(samples, self.name)
        count = len(images)
        asked = [asked_text(prompt) for prompt in one_prompt_each(context.prompts, count, self.name, "image")]
        reasons = {
            i: "the prompt asks for no text; write 'the word CAT', or the text in double quotes"
            for i, text in enumerate(asked)
            if text is None
        }
        reasons |= {i: "the image has NaN or infinite pixels" for i, good in enumerate(finite.tolist()) if not good}
        rows = [i for i in range(count) if i not in reasons]
        read: list[str | None] = [None] * count
        values, exact = [float("nan")] * count, torch.zeros(count, dtype=torch.bool)
        if rows:
            texts, plain = self._read(images.detach()[rows].cpu())
            for i, text in zip(rows, texts, strict=True):
                wish = asked[i] or ""
                a, b = (text, wish) if plain else (_folded(text), _folded(wish))
                read[i], values[i], exact[i] = text, similarity(a, b), a == b
        out = checked(self.name, values, count)
        extras = {"read": read, "asked": asked, "exact": exact, "reasons": reasons}
        return RewardOut(out.values.to(images.device), out.valid.to(images.device), extras)

    def _read(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Sequence[str], bool]:
        """Texts, and whether they are the scenes' capital letters, which are compared as they are."""
        if self._engine == "scenes" or (self._engine == "auto" and tuple(images.shape[2:]) == (32, 32)):
            return scene_reader(self._reward_model).read(images), True
        read = rapid_engine()
        zoom = max(1, -(-ENGINE_SIDE // min(images.shape[2:])))
        large = F.interpolate(images, scale_factor=zoom, mode="bicubic").clamp(0, 1) if zoom > 1 else images
        pixels = (large.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
        return [guarded(self.name, partial(read, image)) for image in pixels], False


def _folded(text: str) -> str:
    """Text without case and white space."""
    return "".join(text.split()).casefold()
