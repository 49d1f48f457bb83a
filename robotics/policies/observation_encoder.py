"""Observations to the condition of a policy's network: normalised states and encoded images of the whole history."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gencontrol.data.normalize import Normalizer
from gencontrol.errors import UsageError
from gencontrol.models.networks.vision import ImageEncoder
from gencontrol.robotics.policies.chunked import PolicySpec


def image_keys(spec: PolicySpec) -> list[str]:
    """Return the keys of images: observations of shape [h w 3]; everything else is a state."""
    return [key for key, shape in spec.observations.items() if len(shape) == 3]


class ObservationEncoder(nn.Module):
    """The states of a history in a row, normalised, then the features of its images; one encoder per camera.

    Args:
        spec: keys, shapes and length of the history.
        normalizers: of the states; the normaliser of a state has its shape.
        crop: side of the crop over the side of an image.
        features: numbers per image.

    Raises:
        UsageError: an image that is not [h w 3] with at least 16 pixels, or a state without a normaliser.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, spec: PolicySpec, normalizers: Mapping[str, Normalizer], crop: float, features: int) -> None:
        super().__init__()
        self.images = image_keys(spec)
        self.states = [key for key in spec.observations if key not in self.images]
        for key in self.states:
            if key not in normalizers:
                raise UsageError(f"there is no normaliser for the observation '{key}'; fit one to its data.")
            if tuple(normalizers[key].shift.shape) != tuple(spec.observations[key]):
                raise UsageError(f"the normaliser of '{key}' does not have its shape {spec.observations[key]}.")
        for key in self.images:
            if spec.observations[key][-1] != 3:
                raise UsageError(f"observation '{key}' has shape {spec.observations[key]}; images are [h w 3].")
        flat = [normalizers[key] for key in self.states]
        empty = [torch.empty(0)]
        self.register_buffer("shift", torch.cat([one.shift.flatten() for one in flat] or empty), persistent=False)
        self.register_buffer("scale", torch.cat([one.scale.flatten() for one in flat] or empty), persistent=False)
        try:
            self.cameras = nn.ModuleList(
                ImageEncoder((spec.observations[key][0], spec.observations[key][1]), crop, features)
                for key in self.images
            )
        except ValueError as error:
            raise UsageError(f"{error}.") from error
        self.channels = spec.n_obs * (len(self.shift) + features * len(self.images))

    def forward(
        self, observation: Mapping[str, Tensor], places: Float[Tensor, "b 2"] | None = None
    ) -> Float[Tensor, "b c"]:
        """Return the condition.

        Args:
            observation: key → [b n_obs ...] in the environment's units.
            places: of the random crops, see `ImageEncoder`; None crops in the middle.
        """
        parts = []
        if self.states:
            rows = [observation[key].flatten(2).to(self.shift.dtype) for key in self.states]
            joined = rows[0] if len(rows) == 1 else torch.cat(rows, dim=2)
            parts.append(((joined - self.shift) / self.scale).flatten(1))
        for key, camera in zip(self.images, self.cameras, strict=True):
            parts.append(camera(observation[key], places).flatten(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
