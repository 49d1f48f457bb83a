"""Does the image show what the caption says?  An exact check on the bundled scenes, in GenEval's categories.

The caption is read by the grammar of `gencontrol.recipes.scenes.data`, the objects are found by its exact analysis
(tests state its accuracy), words by the bundled reader.  After GenEval (Ghosh et al. 2023, arXiv 2310.11513), with one
thing stricter: an object that nobody asked for makes the image wrong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.rewards.base import checked
from gencontrol.rewards.image.ocr import edit_distance, scene_reader
from gencontrol.rewards.inputs import image_batch
from gencontrol.rewards.pretrained import one_prompt_each
from gencontrol.types import RewardContext, RewardOut

if TYPE_CHECKING:
    from gencontrol.recipes.scenes.data import SceneSpec
    from gencontrol.recipes.scenes.data.check import Verdict


class Compositional:
    """Item reward: 1 where the scene is exactly what the caption says, else 0; or the satisfied share of its demands.

    `extras`: "exact" [b] bool, "category" (one name per item, None where the caption is unknown), "accuracy"
    {category: share of exact images}, "found" (what was seen, as text), "reasons" {item: why it has no score}.
    """

    title = "whether the picture shows what the caption says: objects, colours, numbers, positions"
    paper = "arXiv:2310.11513"
    medium = "image"
    kind: Literal["item", "set"] = "item"
    differentiable = False
    name = "compositional"

    def __init__(self, score: Literal["exact", "share"] = "exact", reward_model: str | Path = "bundled") -> None:
        """Choose the score.

        Args:
            score: "exact" 0 or 1, or "share" of the named properties, relations and counts, in [0, 1].
            reward_model: "bundled" or the folder of a SceneReader; loaded at the first word caption.

        Raises:
            UsageError: another score.
        """
        if score not in ("exact", "share"):
            raise UsageError(f"reward 'compositional' has no score '{score}'; give 'exact' or 'share'.")
        self._exact, self._reward_model = score == "exact", str(reward_model)

    def __call__(self, samples: Float[Tensor, "b 3 32 32"], context: RewardContext) -> RewardOut:
        """Check images in [0, 1] against the prompts; a prompt outside the grammar makes its item invalid.

        Raises:
            UsageError: no images of 32x32 RGB in [0, 1], or not one prompt for each.
        """
        from gencontrol.recipes.scenes.data import CaptionError, category, parse

        images, finite = scene_images(samples, self.name)
        prompts = one_prompt_each(context.prompts, len(images), self.name, "image")
        values, reasons, found = [float("nan")] * len(images), dict[int, str](), [""] * len(images)
        exact, names = torch.zeros(len(images), dtype=torch.bool), list[str | None]([None] * len(images))
        read = self._words(images, prompts)
        for index, prompt in enumerate(prompts):
            try:
                spec = parse(prompt)
            except CaptionError as error:
                reasons[index] = str(error)
                continue
            names[index] = category(spec)
            if not finite[index]:
                reasons[index] = "the image has NaN or infinite pixels"
                continue
            verdict, found[index] = _look(spec, images[index], read.get(index, ""))
            exact[index] = verdict.exact
            values[index] = float(verdict.exact) if self._exact else verdict.share
        out = checked(self.name, values, len(images), finite.cpu())
        extras = {
            "exact": exact,
            "category": names,
            "accuracy": accuracy_by_category(exact, names, out.valid),
            "found": found,
            "reasons": reasons,
        }
        device = samples.device if isinstance(samples, Tensor) else "cpu"
        return RewardOut(out.values.to(device), out.valid.to(device), extras)

    def _words(self, images: Float[Tensor, "b 3 32 32"], prompts: Sequence[str]) -> dict[int, str]:
        """Words in the images whose prompts ask for one."""
        rows = [index for index, prompt in enumerate(prompts) if " ".join(prompt.split()).startswith("the word ")]
        if not rows:
            return {}
        return dict(zip(rows, scene_reader(self._reward_model).read(images[rows]), strict=True))


def scene_images(samples: Tensor, name: str) -> tuple[Float[Tensor, "b 3 32 32"], Tensor]:
    """Return images on the CPU and which are finite.

    Raises:
        UsageError: another size than 32x32, which the exact analysis is made for.
    """
    images, finite = image_batch(samples, name)
    if tuple(images.shape[2:]) != (32, 32):
        raise UsageError(
            f"reward '{name}' looks at scenes of 32x32 pixels, not {images.shape[2]}x{images.shape[3]}; it is made for "
            "the bundled text-to-image model."
        )
    return images.detach().cpu(), finite.cpu()


def accuracy_by_category(exact: Tensor, names: Sequence[str | None], valid: Tensor) -> dict[str, float]:
    """Share of exact images of each category that occurs among the valid items."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for right, name, good in zip(exact.tolist(), names, valid.tolist(), strict=True):
        if good and name is not None:
            hits[name].append(right)
    return {name: sum(values) / len(values) for name, values in sorted(hits.items())}


def _look(spec: SceneSpec, image: Float[Tensor, "3 32 32"], read: str) -> tuple[Verdict, str]:
    """Verdict on one image, and what was seen."""
    from gencontrol.recipes.scenes.data.check import Verdict, judge
    from gencontrol.recipes.scenes.data.detect import detect, main_colour

    pixels = image.numpy()
    if spec.word is None:
        objects = detect(pixels)
        return judge(spec, objects), ", ".join(map(str, objects)) or "nothing"
    colour = main_colour(pixels)
    spelled = 1.0 - edit_distance(read, spec.word) / max(len(read), len(spec.word))
    right = spec.word_colour is None or colour == spec.word_colour
    share = spelled if spec.word_colour is None else (len(spec.word) * spelled + right) / (len(spec.word) + 1)
    return Verdict(read == spec.word and right, share), f"the word {read or '(none)'} in {colour or 'no colour'}"
