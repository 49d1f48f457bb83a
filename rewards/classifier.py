"""Reward of a class: log p(label | image) of the bundled calibrated digit classifier; differentiable.

For a group of labels ("even", "odd") it is the largest log-probability of its digits, as the experiments of Diffusion
Tree Sampling have it (arXiv 2506.20701, table 1).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gencontrol.errors import EnvironmentMissing, UsageError, nearest
from gencontrol.rewards.base import checked
from gencontrol.rewards.inputs import image_batch
from gencontrol.rewards.pretrained import pick_device
from gencontrol.types import RewardContext, RewardOut

#: names for several digits at once
GROUPS = {"even": tuple("02468"), "odd": tuple("13579")}


@lru_cache(maxsize=4)
def _classifier(reward_model: str, device: str) -> Any:
    """Load a classifier once per process, folder and device."""
    from gencontrol.models.image_classifier import ImageClassifier

    if reward_model == "bundled":
        import gencontrol

        folder = Path(gencontrol.__file__).parent / "bundled" / "digits" / "classifier"
        if not (folder / "config.json").is_file():
            raise EnvironmentMissing(
                f"the bundled digit classifier is not in this installation ({folder}); install gencontrol from its "
                "wheel or a full checkout, or name a folder as reward_model."
            )
    else:
        folder = Path(reward_model).expanduser()
        folder = folder / "classifier" if (folder / "classifier" / "config.json").is_file() else folder
    return ImageClassifier.from_pretrained(folder).to(device)


class DigitClassReward:
    """Item reward: calibrated log p(label | image), at most 0; for "even" and "odd" the maximum over their digits."""

    kind: Literal["item", "set"] = "item"
    differentiable = True

    def __init__(
        self,
        label: int | str | None = None,
        reward_model: str | Path = "bundled",
        device: str | torch.device | None = None,
    ) -> None:
        """Choose what is asked for.

        Args:
            label: 0 to 9 or its text, "even" or "odd"; None takes each image's label from its prompt.
            reward_model: "bundled", a folder of an ImageClassifier, or of a pipeline that has one in classifier/.
            device: None takes the GPU when there is one.

        Raises:
            UsageError: a label that the classifier does not know, or a folder that holds none.
            EnvironmentMissing: the bundled weights are not installed.
        """
        self.name = "digit-class"
        self.classifier = _classifier(str(reward_model), pick_device(device))
        self._groups = self._table()
        self._fixed = None if label is None else self._members(label)

    def _table(self) -> dict[str, list[int]]:
        """Name of each label or group → columns of the classifier."""
        classes = self.classifier.config.classes
        singles = {name: [column] for column, name in enumerate(classes)}
        groups = {name: [classes.index(d) for d in digits if d in classes] for name, digits in GROUPS.items()}
        return singles | {name: columns for name, columns in groups.items() if columns}

    def _members(self, label: int | str) -> Bool[Tensor, " classes"]:
        """Mask of the classes that a label names."""
        text = label.strip().lower() if isinstance(label, str) else str(label)
        if text not in self._groups:
            raise UsageError(
                f"reward 'digit-class' has no label {label!r}.{nearest(text, self._groups)} "
                f"Labels: {', '.join(self._groups)}."
            )
        mask = torch.zeros(len(self.classifier.config.classes), dtype=torch.bool)
        mask[self._groups[text]] = True
        return mask

    def _asked(self, batch: int, context: RewardContext) -> Bool[Tensor, "b classes"]:
        """Mask of the classes that each image should show."""
        if self._fixed is not None:
            return self._fixed.expand(batch, -1)
        if context.prompts is None or len(context.prompts) != batch:
            raise UsageError(
                f"reward 'digit-class' without a label reads it from the prompts; give label=…, or {batch} prompts."
            )
        return torch.stack([self._members(prompt) for prompt in context.prompts])

    def __call__(self, samples: Float[Tensor, "b 1 s s"], context: RewardContext) -> RewardOut:
        """Score images in [0, 1], as pipelines decode them; an image with NaN or infinity is invalid.

        Raises:
            UsageError: no images in [0, 1] of the classifier's shape, or a prompt that names no label.
        """
        images, finite = image_batch(samples, self.name, channels=1)
        device = next(self.classifier.parameters()).device
        log_probs = self.classifier.log_probs(images.to(device) * 2.0 - 1.0)
        asked = self._asked(len(samples), context).to(device)
        return checked(self.name, log_probs.masked_fill(~asked, float("-inf")).amax(1), len(samples), finite)
