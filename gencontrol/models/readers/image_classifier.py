"""A small calibrated classifier of small images: log p(class | image), smooth in the pixels.

Convolutions with group norm and GELU (no batch statistics, no dropout: the same function in training and in use), one
temperature that divides the logits, chosen on held-out images (Guo et al. 2017; Platt's targets), kept in config.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from gencontrol.errors import UsageError
from gencontrol.files import replacing

#: ends of the search for the temperature
TEMPERATURES = (0.02, 50.0)


@dataclass(frozen=True)
class ImageClassifierConfig:
    """Sizes of an `ImageClassifier`.

    Args:
        classes: names of the classes.
        channels, size: of the image; `size` is even.
        width: channels of the first layers, a multiple of 8; the later ones have twice as many.
        hidden: width of the last hidden layer.
        temperature: > 0, divides the logits.
        held_out: share of images it did not learn from that it recognised; None where that was not measured.
    """

    classes: tuple[str, ...]
    channels: int = 1
    size: int = 8
    width: int = 24
    hidden: int = 64
    temperature: float = 1.0
    held_out: float | None = None

    def __post_init__(self) -> None:
        if not self.classes or self.size % 2 or self.width % 8 or min(self.channels, self.hidden) < 1:
            raise ValueError("classes, an even size, a width that 8 divides, channels and hidden ≥ 1 are needed")
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature} is not positive")


class ImageClassifier(nn.Module):
    """Images [b c s s] in [-1, 1] → logits and calibrated log-probabilities of the classes."""

    def __init__(self, config: ImageClassifierConfig) -> None:
        """Build the network with weights drawn from torch's global generator (seed it for a fixed start)."""
        super().__init__()
        self.config = config
        w = config.width
        self.trunk = nn.Sequential(
            *_stage(config.channels, w, 1), *_stage(w, w, 1), *_stage(w, 2 * w, 2), *_stage(2 * w, 2 * w, 1)
        )
        self.head = nn.Sequential(
            nn.Linear(2 * w * (config.size // 2) ** 2, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, len(config.classes)),
        )

    def forward(self, x0: Float[Tensor, "b c s s"]) -> Float[Tensor, "b classes"]:
        """Return logits, before the temperature.

        Raises:
            UsageError: images of another shape.
        """
        shape = (self.config.channels, self.config.size, self.config.size)
        if tuple(x0.shape[1:]) != shape:
            raise UsageError(f"images of shape {list(x0.shape[1:])}; this classifier takes {list(shape)}.")
        return self.head(self.trunk(x0).flatten(1))

    def log_probs(self, x0: Float[Tensor, "b c s s"]) -> Float[Tensor, "b classes"]:
        """Return calibrated log p(class | image), float32, with gradients."""
        return F.log_softmax(self(x0).float() / self.config.temperature, dim=-1)

    def calibrate(self, x0: Float[Tensor, "n c s s"], labels: Int64[Tensor, " n"]) -> float:
        """Choose the temperature on images that the weights were not trained on, and return it."""
        with torch.no_grad():
            temperature = fit_temperature(self(x0), labels)
        self.config = replace(self.config, temperature=temperature)
        return temperature

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json (with the temperature) and model.safetensors."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        table = {"_class_name": "ImageClassifier", **asdict(self.config)}
        (folder / "config.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        with replacing(folder / "model.safetensors") as staged:
            save_file(weights, str(staged), metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ImageClassifier:
        """Load a folder written by `save_pretrained`, frozen: its parameters take no gradients, its input does.

        Raises:
            UsageError: no such folder or files, an unknown configuration key, or weights that do not fit it.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            table = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            table.pop("_class_name", None)
            config = ImageClassifierConfig(**{**table, "classes": tuple(table["classes"])})
            weights = {name: value.float() for name, value in load_file(str(folder / "model.safetensors")).items()}
            with torch.device("meta"):
                model = cls(config)
            model.load_state_dict(weights, assign=True)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(
                f"'{folder}' is no folder of an ImageClassifier (config.json, model.safetensors): {reason}"
            ) from error
        for parameter in model.parameters():  # mapped memory is not aligned, and changes with its file
            parameter.data = parameter.data.clone()
        return model.requires_grad_(False).eval()


def build_image_classifier(seed: int, classes: Sequence[str]) -> ImageClassifier:
    """A freshly initialised classifier; a pure function of its arguments (the global generator is put back)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ImageClassifier(ImageClassifierConfig(tuple(classes)))


def _stage(inside: int, outside: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.GroupNorm(outside // 8, outside), nn.GELU()]


def fit_temperature(logits: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"]) -> float:
    """Return the temperature in [0.02, 50] of least cross-entropy, by golden sections in its logarithm.

    The targets give 1/(n + 2) of each item's mass to the other classes (Platt 1999, §2.2): without it, n items that are
    all right would ask for certainty.  The loss is convex in 1/T, so it has one minimum over log T (Guo et al. 2017).
    """
    wide, (n, classes) = logits.detach().double(), logits.shape
    spread = 1.0 / (n + 2)
    # F.cross_entropy's smoothing gives e/classes to every class, the true one too
    smoothing = spread * classes / (classes - 1)

    def loss(log_t: float) -> float:
        return float(F.cross_entropy(wide / math.exp(log_t), labels, label_smoothing=smoothing))

    low, high, ratio = *map(math.log, TEMPERATURES), (5**0.5 - 1) / 2
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) <= loss(right):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


def calibration_error(log_probs: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"], bins: int = 10) -> float:
    """Return the expected calibration error: mean |accuracy − confidence| over equally filled bins of confidence.

    Bins of equal mass (Nixon et al. 2019): with a good classifier, bins of equal width leave nearly all items in one.
    """
    confidence, predicted = log_probs.double().exp().max(dim=1)
    right = (predicted == labels).double()[confidence.argsort(stable=True)]
    gaps = [
        abs(float(r.mean() - c.mean())) * len(r)
        for r, c in zip(right.tensor_split(bins), confidence.sort(stable=True).values.tensor_split(bins))
        if len(r)
    ]
    return sum(gaps) / len(labels)
