"""What pipelines return: frozen dataclasses read by attribute, by key or by index."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from gencontrol.errors import nearest


@dataclass(frozen=True)
class PipelineOutput:
    """Base of all outputs: `out.audios`, `out["audios"]` and `out[0]` are the same object."""

    def __getitem__(self, key: str | int | slice) -> Any:
        """Return a field by its name, or fields by position.

        Raises:
            KeyError: no field of this name (the nearest one is suggested).
            IndexError: no field at this position.
        """
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(f"no output '{key}'.{nearest(key, self.keys())} Outputs: {', '.join(self.keys())}.")
            return self.to_tuple()[self.keys().index(key)]
        return self.to_tuple()[key]

    def __len__(self) -> int:
        """Number of fields."""
        return len(dataclasses.fields(self))

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, as a mapping does (and as diffusers' outputs do)."""
        return iter(self.keys())

    def keys(self) -> tuple[str, ...]:
        """Names of the fields, in order."""
        return tuple(field.name for field in dataclasses.fields(self))

    def to_tuple(self) -> tuple[Any, ...]:
        """Values of the fields, in order."""
        return tuple(self.__dict__[name] for name in self.keys())


@dataclass(frozen=True)
class AudioPipelineOutput(PipelineOutput):
    """Sounds of one call.

    Args:
        audios: [b n] (mono models) or [b c n], in [-1, 1], as a tensor or an array; latents [b *d] for
            `output_type="latent"`.
        sampling_rate: Hz.
    """

    audios: Tensor | np.ndarray
    sampling_rate: int


@dataclass(frozen=True)
class ImagePipelineOutput(PipelineOutput):
    """Images of one call.

    Args:
        images: PIL images; or [b c h w] (tensor) or [b h w c] (array, as diffusers has it), in [0, 1]; or, for
            `output_type="latent"`, the model's own clean samples.
    """

    images: list[Any] | Tensor | np.ndarray
