"""Labels of a new condition: names and numbers of values, their tensors, their embeddings, and labels in prompts.

A label tensor is int64 [b attributes] with -1 for "not given", or for kind "vector" float32 [b size] with NaN.  In text
a prompt may end with its labels: "a red cube | style=ink, size=3".  Sampling, scoring and evaluation then need nothing
but prompts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from gencontrol.errors import UsageError, nearest

#: a label of one sample: a value or its name, a mapping attribute → value, numbers of a vector, or None
Label = int | str | Mapping[str, Any] | Sequence[float] | None

_BAR = " | "


@dataclass(frozen=True)
class ConditionConfig:
    """What a condition is and where it enters; see `gencontrol.models.conditions.base.add_condition`.

    Args:
        name: key in the condition mapping.
        kind: of the labels.
        attributes: (attribute, names of its values); one attribute, called like the condition, unless kind is "multi".
        size: numbers of a "vector", else 0.
        inject, embed, width, depth, shape, half: as in `add_condition`.
    """

    name: str
    kind: Literal["categorical", "vector", "multi"]
    attributes: tuple[tuple[str, tuple[str, ...]], ...]
    size: int
    inject: Literal["time", "residual"]
    embed: int
    width: int
    depth: int
    shape: tuple[int, ...]
    half: bool = False

    def __post_init__(self) -> None:
        if self.inject not in ("time", "residual"):
            raise UsageError(f"inject is '{self.inject}'; a condition enters by 'time' or 'residual'.")
        if min(self.embed, self.width, self.depth) < 1:
            raise UsageError("embed, width and depth of a control are at least 1.")
        for attribute, values in self.attributes:
            if len(values) < 2 or len(set(values)) != len(values):
                raise UsageError(
                    f"condition '{attribute}' has the values {list(values)}; two different ones are needed."
                )

    @classmethod
    def of(
        cls,
        name: str,
        kind: Literal["categorical", "vector", "multi"],
        cardinality: int | Sequence[str] | Mapping[str, int | Sequence[str]],
        *,
        inject: Literal["time", "residual"],
        embed: int,
        width: int,
        depth: int,
        shape: tuple[int, ...],
        half: bool = False,
    ) -> ConditionConfig:
        """Build from the public arguments.

        Raises:
            UsageError: kind and cardinality do not fit.
        """
        attributes: tuple[tuple[str, tuple[str, ...]], ...] = ()
        size = 0
        if kind == "vector":
            if not isinstance(cardinality, int) or cardinality < 1:
                raise UsageError(f"a vector condition needs its length as cardinality, not {cardinality!r}.")
            size = cardinality
        elif kind == "multi":
            if not isinstance(cardinality, Mapping) or not cardinality:
                raise UsageError("kind 'multi' needs a mapping as cardinality, e.g. {'style': 4, 'size': 3}.")
            attributes = tuple((key, _names(value)) for key, value in cardinality.items())
        elif kind == "categorical":
            if isinstance(cardinality, Mapping):
                raise UsageError("a mapping of attributes is kind 'multi'.")
            attributes = ((name, _names(cardinality)),)
        else:
            raise UsageError(f"kind is '{kind}'; known: categorical, vector, multi.")
        return cls(name, kind, attributes, size, inject, embed, width, depth, shape, half)


def _names(values: int | Sequence[str]) -> tuple[str, ...]:
    return tuple(str(i) for i in range(values)) if isinstance(values, int) else tuple(values)


class Labels:
    """Encoding of a condition's labels."""

    def __init__(self, config: ConditionConfig) -> None:
        self.config = config
        self.attributes = dict(config.attributes)

    def encode(self, labels: Label | Sequence[Label], batch: int | None = None) -> Tensor:
        """Return the label tensor of one label for `batch` samples, or (batch None) of a list with one per sample.

        Raises:
            UsageError: a value or attribute that the condition does not have; the nearest name is given.
        """
        if batch is not None:
            return self._row(labels).expand(batch, -1)  # type: ignore[arg-type]  # one label, by the docstring
        assert isinstance(labels, Sequence)
        if not len(labels):
            raise UsageError(f"condition '{self.config.name}': an empty list of labels.")
        return torch.stack([self._row(label) for label in labels])  # type: ignore[arg-type]  # a list of labels, by the docstring

    def _row(self, label: Label) -> Tensor:
        if self.config.kind == "vector":
            if label is None:
                return torch.full((self.config.size,), float("nan"))
            row = torch.as_tensor(label, dtype=torch.float32).flatten()
            if len(row) != self.config.size or not bool(row.isfinite().all()):
                raise UsageError(f"condition '{self.config.name}' takes {self.config.size} finite numbers.")
            return row
        if not isinstance(label, Mapping):
            label = {} if label is None else {next(iter(self.attributes)): label}
            if label and len(self.attributes) > 1:
                raise UsageError(
                    f"condition '{self.config.name}' has the attributes {', '.join(self.attributes)}; give a mapping."
                )
        for key in label:
            if key not in self.attributes:
                raise UsageError(
                    f"condition '{self.config.name}' has no attribute '{key}'.{nearest(key, self.attributes)} "
                    f"Attributes: {', '.join(self.attributes)}."
                )
        return torch.tensor([self.place(key, label.get(key)) for key in self.attributes])

    def place(self, attribute: str, value: Any) -> int:
        """Return the number of a value; -1 for None.

        Raises:
            UsageError: no such value.
        """
        names = self.attributes[attribute]
        if value is None:
            return -1
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
            return value
        if isinstance(value, str) and value.strip() in names:
            return names.index(value.strip())
        hint = nearest(value, names) if isinstance(value, str) else ""
        raise UsageError(f"'{attribute}' has no value {value!r}.{hint} Values: {', '.join(names)}.")

    def given(self, labels: Tensor) -> Bool[Tensor, " b"]:
        """Which rows have any label."""
        return ~labels.isnan().any(1) if self.config.kind == "vector" else (labels >= 0).any(1)

    def embedding(self, width: int, *, zero: bool) -> nn.ModuleList:
        """Return the embeddings, one per attribute, [values width] each; zero or drawn from the global generator."""
        layers: list[nn.Module] = (
            [nn.Linear(self.config.size, width, bias=False)]
            if self.config.kind == "vector"
            else [nn.Embedding(len(names), width) for names in self.attributes.values()]
        )
        if zero:
            for layer in layers:
                nn.init.zeros_(layer.weight)  # type: ignore[arg-type]  # both kinds have a weight
        return nn.ModuleList(layers)

    def vectors(self, embed: nn.ModuleList, labels: Tensor) -> Float[Tensor, "b e"]:
        """Return the sum of the embeddings of the given attributes; one that is not given adds exactly 0."""
        if self.config.kind == "vector":
            return embed[0](torch.nan_to_num(labels, 0.0))
        if labels.shape[1] != len(embed):
            raise UsageError(f"labels have {labels.shape[1]} columns; the condition has {len(embed)} attributes.")
        total: Tensor | float = 0.0
        for column, table in enumerate(embed):
            rows = labels[:, column]
            total = total + table(rows.clamp(min=0)) * (rows >= 0)[:, None]
        assert isinstance(total, Tensor)
        return total

    def combinations(self, *, excluded: Sequence[Sequence[int]] = (), most: int = 4096) -> Int64[Tensor, "m a"]:
        """Return all label rows with every attribute given, without the excluded ones.

        Raises:
            UsageError: a vector condition, more than `most` rows, an excluded row that is none, or nothing left.
        """
        if self.config.kind == "vector":
            raise UsageError("a vector condition has no list of values; its labels must be given.")
        sizes = [len(names) for names in self.attributes.values()]
        if torch.tensor(sizes).prod() > most:
            raise UsageError(f"{len(sizes)} attributes have more than {most} combinations; train on fewer attributes.")
        rows = list(itertools.product(*[range(size) for size in sizes]))
        for row in excluded:
            if tuple(row) not in rows:
                raise UsageError(
                    f"held-out combination {list(row)} does not exist; attributes: {list(self.attributes)}."
                )
        kept = [row for row in rows if row not in {tuple(r) for r in excluded}]
        if not kept:
            raise UsageError("all combinations of labels are held out; leave some to train on.")
        return torch.tensor(kept)

    def text(self, row: Int64[Tensor, " a"]) -> str:
        """Return a row as text, "style=ink, size=3"."""
        pairs = zip(self.attributes.items(), row.tolist(), strict=True)
        return ", ".join(f"{key}={names[value]}" for (key, names), value in pairs if value >= 0)


def join_prompt(prompt: str, labels: str) -> str:
    """Return a prompt that carries labels."""
    return f"{prompt}{_BAR}{labels}"


def split_prompt(text: str) -> tuple[str, dict[str, str]]:
    """Return the prompt and the labels that it ends with: "a cube | size=3" → ("a cube", {"size": "3"})."""
    prompt, bar, tail = text.rpartition(_BAR)
    if not bar and "=" not in text:
        return text, {}
    pairs = [part.partition("=") for part in tail.split(",")]
    if not all(equals for _, equals, _ in pairs):
        return text, {}
    return prompt, {key.strip(): value.strip() for key, _, value in pairs}
