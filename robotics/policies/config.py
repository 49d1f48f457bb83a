"""Options of the policies that are trained here."""

from __future__ import annotations

import math
from typing import Literal

from gencontrol.config import options
from gencontrol.errors import UsageError

#: backbone → (width, depth) where the option is 0
SIZES = {"unet": (64, 3), "transformer": (128, 4), "mlp": (256, 3)}


@options
class PolicyConfig:
    """What diffusion and flow policies have in common.

    Args:
        backbone: "unet" (one-dimensional, FiLM), "transformer" or "mlp".
        width: channels of the U-Net's first level, of the transformer's tokens or of the hidden layers; 0 is 64, 128
            or 256.
        depth: levels of the U-Net, blocks or hidden layers; 0 is 3, 4 or 3.
        inference_steps: network calls per chunk.
        clip: the clean prediction is clipped to ± this in normalised units at every step; 0 never clips.
        limits: "data" clips chunks to the smallest and largest action of the training data (counted), "none" not.
        action_norm, state_norm: "min_max", "quantiles", "mean_std" or "identity".
        crop: side of the random crop of images over their side, in (0, 1]; evaluation takes the centre.
        image_features: numbers that one image becomes.
    """

    backbone: Literal["unet", "transformer", "mlp"] = "unet"
    width: int = 0
    depth: int = 0
    inference_steps: int = 10
    clip: float = 1.0
    limits: Literal["data", "none"] = "data"
    action_norm: str = "min_max"
    state_norm: str = "min_max"
    crop: float = 0.9
    image_features: int = 64

    def __post_init__(self) -> None:
        """Refuse what no network could have."""
        if self.backbone not in SIZES:
            raise UsageError(f"backbone '{self.backbone}' is unknown; choose from {', '.join(SIZES)}.")
        if self.limits not in ("data", "none"):
            raise UsageError(f"limits '{self.limits}' is unknown; choose data or none.")
        if min(self.width, self.depth) < 0 or min(self.inference_steps, self.image_features) < 1:
            raise UsageError("width and depth of at least 0, inference_steps and image_features of at least 1 needed.")
        if not (0.0 <= self.clip < math.inf and 0.0 < self.crop <= 1.0):
            raise UsageError(f"clip {self.clip} and crop {self.crop}: clip ≥ 0 and crop in (0, 1] are needed.")

    @property
    def sizes(self) -> tuple[int, int]:
        """Width and depth of the network."""
        width, depth = SIZES[self.backbone]
        return self.width or width, self.depth or depth


@options
class DiffusionPolicyConfig(PolicyConfig):
    """Options of `DiffusionPolicy`; the defaults of Diffusion Policy (gpc.md §6, FOUND) but for the steps.

    Args:
        prediction: what the network outputs: "eps", "v" or "x0".
        train_steps: noise levels of squaredcos_cap_v2.
        sampler: "ddim" (deterministic) or "ddpm".
        spacing: which levels inference visits, as diffusers names it: "leading" starts a little below pure noise (the
            default of Diffusion Policy, robomimic and LeRobot), "trailing" at it.
    """

    prediction: Literal["eps", "v", "x0"] = "eps"
    train_steps: int = 100
    sampler: Literal["ddim", "ddpm"] = "ddim"
    spacing: Literal["leading", "trailing"] = "leading"

    def __post_init__(self) -> None:
        """Check the further options."""
        super().__post_init__()
        for name, known in (
            ("prediction", ("eps", "v", "x0")),
            ("sampler", ("ddim", "ddpm")),
            ("spacing", ("leading", "trailing")),
        ):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} '{getattr(self, name)}' is unknown; choose from {', '.join(known)}.")
        if self.train_steps < 2 or self.inference_steps > self.train_steps:
            raise UsageError(
                f"{self.inference_steps} inference steps of {self.train_steps} noise levels; give at most as many."
            )


@options
class FlowPolicyConfig(PolicyConfig):
    """Options of `FlowPolicy`: rectified flow, velocity, Euler; the clean prediction is not clipped by default."""

    clip: float = 0.0
