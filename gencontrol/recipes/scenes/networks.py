"""Two small convolutional networks for 32x32 scenes: a reader of words, and a judge that no reward uses.

`SceneReader` gives letter probabilities for 16 columns, decoded by CTC (Graves et al. 2006).  `SceneJudge` names the
attributes of a scene; its embedding is the space in which drift is measured, so it must never teach a generator.
Convolutions with group norm and GELU: the same function in training and in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from gencontrol.errors import UsageError
from gencontrol.models.folders import read_config, read_weights, write_model
from gencontrol.recipes.scenes.data.font import LETTERS
from gencontrol.recipes.scenes.data.grammar import COLOURS, SHAPES, SIZES
from gencontrol.recipes.scenes.data.render import SIDE, Scene

COLUMNS = 16
#: attributes of a scene and their number of classes: objects, how many of each shape, colour and size, a word
ATTRIBUTES = {
    "objects": 5,
    **dict.fromkeys(SHAPES, 5),
    **dict.fromkeys(COLOURS, 5),
    **dict.fromkeys(SIZES, 5),
    "word": 2,
}
EMBEDDING = 64


def _stage(inside: int, outside: int, stride: int | tuple[int, int]) -> list[nn.Module]:
    return [nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.GroupNorm(outside // 8, outside), nn.GELU()]


class _SceneNetwork(nn.Module):
    """Shared checks, saving and loading."""

    @staticmethod
    def _scaled(images: Float[Tensor, "b 3 32 32"]) -> Tensor:
        """Centre images in [0, 1]; refuse another shape."""
        if images.shape[1:] != (3, SIDE, SIDE):
            raise UsageError(f"images of shape {list(images.shape[1:])}; scene networks take {[3, SIDE, SIDE]}.")
        return images * 2.0 - 1.0

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors in half precision."""
        weights = {name: value.detach().half() for name, value in self.state_dict().items()}
        write_model(folder, type(self).__name__, {}, weights)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load a folder of `save_pretrained` in single precision, frozen: inputs take gradients, weights do not.

        Raises:
            UsageError: no such folder, another class, or weights that do not fit.
        """
        read_config(folder, cls.__name__)
        with torch.random.fork_rng(devices=[]):  # the initial draw is overwritten; leave the global stream alone
            network = cls()
        try:
            network.load_state_dict({name: tensor.float() for name, tensor in read_weights(folder).items()})
        except (OSError, RuntimeError) as error:
            raise UsageError(f"'{folder}': {str(error).splitlines()[0]} Is the file damaged?") from error
        return network.requires_grad_(False).eval()


class SceneReader(_SceneNetwork):
    """Images [b 3 32 32] in [0, 1] → log-probabilities of blank and 26 letters for 16 columns."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*_stage(3, 24, 1), *_stage(24, 32, 2), *_stage(32, 48, 1), *_stage(48, 64, (2, 1)))
        self.join = nn.Sequential(nn.Conv1d(64 * 8, 96, 3, padding=1), nn.GELU(), nn.Conv1d(96, len(LETTERS) + 1, 1))

    def forward(self, images: Float[Tensor, "b 3 32 32"]) -> Float[Tensor, "b 16 27"]:
        """Return log-probabilities; class 0 is blank, class k the k-th letter."""
        maps = self.trunk(self._scaled(images))
        return F.log_softmax(self.join(maps.flatten(1, 2)).float(), dim=1).transpose(1, 2)

    @torch.no_grad()
    def read(self, images: Float[Tensor, "b 3 32 32"]) -> list[str]:
        """Return the word in each image by best-path decoding; "" where there is none."""
        words = []
        for row in self(images).argmax(-1).tolist():
            kept = [k for k, before in zip(row, [0, *row[:-1]], strict=True) if k and k != before]
            words.append("".join(LETTERS[k - 1] for k in kept))
        return words


class SceneJudge(_SceneNetwork):
    """Images [b 3 32 32] in [0, 1] → embedding [b 64] and logits of every attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*_stage(3, 24, 1), *_stage(24, 32, 2), *_stage(32, 48, 2), *_stage(48, 64, 2))
        self.join = nn.Linear(64 * 16, EMBEDDING)
        self.heads = nn.Linear(EMBEDDING, sum(ATTRIBUTES.values()))

    def embed(self, images: Float[Tensor, "b 3 32 32"]) -> Float[Tensor, "b 64"]:
        """Return the embedding that every attribute is read from; differentiable."""
        return F.gelu(self.join(self.trunk(self._scaled(images)).flatten(1)))

    def forward(self, images: Float[Tensor, "b 3 32 32"]) -> dict[str, Float[Tensor, "b classes"]]:
        """Return the logits of every attribute; for counts, class k means k."""
        parts = self.heads(self.embed(images)).float().split(list(ATTRIBUTES.values()), dim=1)
        return dict(zip(ATTRIBUTES, parts, strict=True))


def attributes_of(scenes: Sequence[Scene]) -> Int64[Tensor, "b a"]:
    """Return the true class of every attribute of ATTRIBUTES."""
    from gencontrol.recipes.scenes.data.render import SPLIT

    rows: list[list[int]] = []
    for scene in scenes:
        paints = [_nearest(colour) for colour in scene.colours]
        shapes = [SHAPES[k] for k in scene.shapes]
        sizes = [SIZES[int(radius >= SPLIT)] for radius in scene.radii]
        counts: list[int] = [len(shapes)]
        counts += [shapes.count(name) for name in SHAPES]
        counts += [paints.count(name) for name in COLOURS]
        counts += [sizes.count(name) for name in SIZES]
        rows.append([*counts, int(bool(scene.word))])
    return torch.tensor(rows)


def _nearest(colour: Any) -> str:
    """Name of the colour of which an object's paint is a darker version."""
    values = torch.as_tensor(colour, dtype=torch.float64)
    table = torch.tensor(list(COLOURS.values()), dtype=torch.float64)
    return list(COLOURS)[int(F.cosine_similarity(values[None], table).argmax())]


def reader_loss(log_probs: Float[Tensor, "b 16 27"], words: Sequence[str]) -> Float[Tensor, " b"]:
    """Return the CTC loss of each image's word ("" allowed)."""
    lengths = torch.tensor([len(word) for word in words])
    letters = [LETTERS.index(letter) + 1 for word in words for letter in word]
    targets = torch.tensor(letters, dtype=torch.long)
    columns = torch.full((len(words),), log_probs.shape[1])
    return F.ctc_loss(log_probs.transpose(0, 1), targets, columns, lengths, reduction="none")


def judge_loss(logits: dict[str, Tensor], truth: Int64[Tensor, "b a"]) -> Float[Tensor, " b"]:
    """Return the mean cross-entropy over the attributes of each image."""
    losses = [F.cross_entropy(part, truth[:, k], reduction="none") for k, part in enumerate(logits.values())]
    return torch.stack(losses, 1).mean(1)
