"""Rewards of a class: log p(label | image) of calibrated classifiers; differentiable.

"classifier" takes any classifiers of ours, one per attribute, and their weighted sum; "digit-class" the bundled one.

For a group of labels ("even", "odd") it is the largest log-probability of its digits, as the experiments of Diffusion
Tree Sampling have it (arXiv 2506.20701, table 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from gencontrol.errors import EnvironmentMissing, UsageError, nearest
from gencontrol.rewards.base import checked
from gencontrol.rewards.compose import WeightedItems
from gencontrol.rewards.inputs import image_batch
from gencontrol.rewards.pretrained import pick_device, weights_digest
from gencontrol.types import RewardContext, RewardOut
from gencontrol.weights import BUNDLED

#: names for several digits at once
GROUPS = {"even": tuple("02468"), "odd": tuple("13579")}


@lru_cache(maxsize=4)
def _classifier(reward_model: str, device: str) -> Any:
    """Load a classifier once per process, folder and device."""
    from gencontrol.models.readers.image_classifier import ImageClassifier

    if reward_model == "bundled":
        folder = BUNDLED / "digits" / "classifier"
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

    title = "log-probability of a digit by the bundled calibrated classifier"
    paper = "arXiv:2506.20701"
    medium = "image"
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


class ClassifierReward:
    """Item reward Σ_a weight_a·log p_a(label_a | image) of calibrated classifiers, one per attribute; at most 0.

    Attributes add because they are taken as independent given the image (CTRL, arXiv 2406.12120); an attribute without
    a label adds nothing.
    """

    title = "log-probability of the asked classes by calibrated classifiers"
    paper = "arXiv:2406.12120"
    medium = "image"
    kind: Literal["item", "set"] = "item"
    differentiable = True

    def __init__(
        self,
        reward_model: Any = "bundled",
        weights: Mapping[str, float] | None = None,
        label: int | str | Mapping[str, int | str] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Load the classifiers.

        Args:
            reward_model: "bundled" (digits, attribute "y"), a folder of an ImageClassifier, a folder with one such
                folder per attribute, an ImageClassifier, or a mapping attribute → classifier or folder.
            weights: of the attributes, 1 where not named.
            label: what is asked for, of one attribute or a mapping; None takes each image's labels from the metadata
                of the context, from the end of its prompt ("… | style=ink, size=3"), or from a prompt that is a class.
            device: None takes the GPU when there is one.

        Raises:
            UsageError: no classifier there, an unknown attribute or label, or a weight that is not positive.
        """
        self.name = "classifier"
        place = pick_device(device)
        self.classifiers = {
            name: (_classifier(str(found), place) if isinstance(found, (str, Path)) else found.to(place))
            for name, found in _parts(reward_model).items()
        }
        self.attributes = {name: tuple(model.config.classes) for name, model in self.classifiers.items()}
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in self.attributes}
        for name in weights or {}:
            if name not in self.attributes or not self.weights[name] > 0:
                known = ", ".join(self.attributes)
                raise UsageError(f"reward 'classifier' has no positive weight for '{name}'; attributes: {known}.")
        if label is not None and not isinstance(label, Mapping):
            label = {next(iter(self.attributes)): label}
        self._fixed = label
        for name, value in (label or {}).items():
            self._place(name, value)

    def _place(self, attribute: str, value: Any) -> int:
        """Column of a label; -1 for None."""
        if attribute not in self.attributes:
            raise UsageError(
                f"reward 'classifier' has no attribute '{attribute}'.{nearest(attribute, self.attributes)} "
                f"Attributes: {', '.join(self.attributes)}."
            )
        names = self.attributes[attribute]
        if value is None:
            return -1
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
            return value
        text = str(value).strip()
        if text in names:
            return names.index(text)
        raise UsageError(f"'{attribute}' has no class {value!r}.{nearest(text, names)} Classes: {', '.join(names)}.")

    def _asked(self, attribute: str, batch: int, context: RewardContext) -> Int64[Tensor, " b"]:
        """Columns that the images are asked for; -1 where nothing is."""
        if self._fixed is not None:
            return torch.full((batch,), self._place(attribute, self._fixed.get(attribute)))
        if attribute in context.metadata:
            values: Sequence[Any] = context.metadata[attribute]
        elif context.prompts is not None:
            values = [self._of_prompt(attribute, prompt) for prompt in context.prompts]
        else:
            values = []
        if len(values) != batch:
            raise UsageError(
                f"reward 'classifier' needs a label of '{attribute}' for each of {batch} images: give label=…, or "
                f"prompts that end with one, e.g. 'a house | {attribute}={self.attributes[attribute][0]}'."
            )
        return torch.tensor([self._place(attribute, value) for value in values], dtype=torch.long)

    def _of_prompt(self, attribute: str, prompt: str) -> str | None:
        from gencontrol.models.conditions.labels import split_prompt

        text, found = split_prompt(prompt)
        if found or len(self.attributes) > 1:
            return found.get(attribute)
        return text

    def __call__(self, samples: Float[Tensor, "b c h w"], context: RewardContext) -> RewardOut:
        """Score images in [0, 1], as pipelines decode them; an image with NaN or infinity is invalid.

        Images larger than a classifier's are shrunk to its size, as `gencontrol pretrain classifier` shrinks its data.

        Raises:
            UsageError: no square images in [0, 1] of at least the classifiers' size, or labels missing or unknown.
        """
        from gencontrol.data.images import shrunk

        first = next(iter(self.classifiers.values()))
        images, finite = image_batch(samples, self.name, channels=first.config.channels)
        images = images.to(next(first.parameters()).device)
        total = torch.zeros(len(images), device=images.device)
        for attribute, model in self.classifiers.items():
            asked = self._asked(attribute, len(images), context).to(images.device)
            if bool((asked >= 0).any()):
                seen = shrunk(images, model.config.size) * 2.0 - 1.0
                chosen = model.log_probs(seen).gather(1, asked.clamp(min=0)[:, None])[:, 0]
                total = total + self.weights[attribute] * torch.where(asked >= 0, chosen, 0.0)
        return checked(self.name, total, len(images), finite)


def _parts(reward_model: Any) -> dict[str, Any]:
    """Attribute → classifier or folder."""
    if isinstance(reward_model, Mapping):
        if not reward_model:
            raise UsageError("reward 'classifier' got an empty mapping of classifiers; name at least one.")
        return dict(reward_model)
    if isinstance(reward_model, (str, Path)) and str(reward_model) != "bundled":
        folder = Path(reward_model).expanduser()
        single = (folder / "config.json").is_file() or (folder / "classifier" / "config.json").is_file()
        if not single and folder.is_dir():
            found = {entry.name: entry for entry in sorted(folder.iterdir()) if (entry / "config.json").is_file()}
            if found:
                return dict(found)
    return {"y": reward_model}


def _classifier_rewards(reward: Any) -> list[tuple[ClassifierReward, float]]:
    """The classifier rewards in a reward, with the weights of the sums they stand in."""
    if isinstance(reward, ClassifierReward):
        return [(reward, 1.0)]
    if isinstance(reward, WeightedItems):
        parts = zip(reward.parts, reward.weights, strict=True)
        return [(inner, outer * w) for part, outer in parts for inner, w in _classifier_rewards(part)]
    return []


def attributes_of(reward: Any) -> dict[str, tuple[str, ...]]:
    """Attributes and class names of all classifiers in a reward; empty where it has none.

    Raises:
        UsageError: two classifiers of one attribute with other classes.
    """
    found: dict[str, tuple[str, ...]] = {}
    for part, _ in _classifier_rewards(reward):
        for name, classes in part.attributes.items():
            if found.setdefault(name, classes) != classes:
                raise UsageError(f"two classifiers of '{name}' have different classes; give them different names.")
    return found


def classifiers_of(reward: Any) -> list[tuple[str, Any]]:
    """Attribute and classifier of every classifier in a reward, in order."""
    return [(name, model) for part, _ in _classifier_rewards(reward) for name, model in part.classifiers.items()]


def fingerprint(reward: Any) -> list[str]:
    """Digest of every classifier's weights with its temperature and weight, in order."""
    return [
        f"{name}:{weights_digest(model)}:{model.config.temperature:.6g}:{part.weights[name] * outer:g}"
        for part, outer in _classifier_rewards(reward)
        for name, model in part.classifiers.items()
    ]
