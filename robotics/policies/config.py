"""Options of the policies that are trained here."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from gencontrol.config import Count, Natural, NonNegative, options

Norm = Literal["min_max", "quantiles", "mean_std", "identity"]
#: backbone → (width, depth) where the option is 0
SIZES = {"unet": (64, 3), "transformer": (128, 4), "mlp": (256, 3)}


@options
class ChunkSizes:
    """Sizes of history and chunk, see `PolicySpec`.

    Args:
        horizon: actions in a chunk, counted from the oldest observation in the history.
        n_obs: observations in the history.
        n_action: actions executed of a chunk, at most horizon − n_obs + 1.
    """

    horizon: Count = 16
    n_obs: Count = 2
    n_action: Count = 8


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
    width: Natural = 0
    depth: Natural = 0
    inference_steps: Count = 10
    clip: NonNegative = 1.0
    limits: Literal["data", "none"] = "data"
    action_norm: Norm = "min_max"
    state_norm: Norm = "min_max"
    crop: Annotated[float, Gt(0), Le(1)] = 0.9
    image_features: Count = 64

    @property
    def sizes(self) -> tuple[int, int]:
        """Width and depth of the network."""
        width, depth = SIZES[self.backbone]
        return self.width or width, self.depth or depth


@options
class DiffusionPolicyConfig(PolicyConfig):
    """Options of `DiffusionPolicy`; the defaults of Diffusion Policy (docs/methods/gpc.md#policy-defaults, FOUND) but
    for the steps.

    Args:
        prediction: what the network outputs: "eps", "v" or "x0".
        train_steps: noise levels of squaredcos_cap_v2.
        sampler: "ddim" (deterministic) or "ddpm".
        spacing: which levels inference visits, as diffusers names it: "leading" starts a little below pure noise (the
            default of Diffusion Policy, robomimic and LeRobot), "trailing" at it.
    """

    prediction: Literal["eps", "v", "x0"] = "eps"
    train_steps: Annotated[int, Ge(2)] = 100
    sampler: Literal["ddim", "ddpm"] = "ddim"
    spacing: Literal["leading", "trailing"] = "leading"

    def __post_init__(self) -> None:
        if self.inference_steps > self.train_steps:
            raise ValueError(
                f"{self.inference_steps} inference steps of {self.train_steps} noise levels; give at most as many"
            )


@options
class FlowPolicyConfig(PolicyConfig):
    """Options of `FlowPolicy`: rectified flow, velocity, Euler; the clean prediction is not clipped by default."""

    clip: NonNegative = 0.0
