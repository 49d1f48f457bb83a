"""LeRobot policies without lerobot: folders of its DiffusionPolicy, and the convention of its flow policies.

A folder holds config.json, model.safetensors and, since 0.4, policy_preprocessor.json and policy_postprocessor.json
with their statistics; older ones keep them as buffers among the weights.  All noise levels, clipping and normalisers
are those of LeRobot 0.4.4 (FOUND: source read; its action chunks are reproduced in the tests).

Its flow policies (pi0, pi0.5, SmolVLA) have x_t = t·noise + (1 − t)·actions, output noise − actions and step t from 1
to 0 (FOUND): `FLOW`.  Their language models are not rebuilt here; load them with lerobot, and give
`velocity_model(predict, **FLOW)` to a `ForeignPolicy`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gencontrol.data.normalize import Normalizer
from gencontrol.errors import UsageError
from gencontrol.robotics.policies.chunked import PolicySpec
from gencontrol.robotics.policies.denoising import History
from gencontrol.robotics.policies.foreign import ForeignPolicy, diffusers_sampler, named_schedule, noise_model
from gencontrol.robotics.policies.foreign_nets import ConditionalUnet1d, RgbEncoder

#: convention of LeRobot's flow policies, for `velocity_model`
FLOW: dict[str, Any] = {"time_at_noise": 1.0, "velocity_sign": 1}
STATE, ENVIRONMENT, ACTION = "observation.state", "observation.environment_state", "action"
_LAYERS = {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99")}
_MODES = {**_LAYERS, "QUANTILE10": ("q10", "q90")}


@dataclass(frozen=True)
class Scaling:
    """LeRobot's normalisation of one feature; its forward map adds eps where its inverse does not.

    Args:
        mode: "IDENTITY", "MEAN_STD", "MIN_MAX", "QUANTILES" or "QUANTILE10".
        low, high: mean and std, or the two ends; empty for IDENTITY.
        eps: added to a standard deviation, and in place of a range of 0.
    """

    mode: str
    low: Tensor
    high: Tensor
    eps: float = 1e-8

    def normalize(self, x: Tensor) -> Tensor:
        """Return the normalised values."""
        if self.mode == "IDENTITY":
            return x
        if self.mode == "MEAN_STD":
            return (x - self.low) / (self.high + self.eps)
        return 2 * (x - self.low) / self._span - 1

    def inverse(self, size: int) -> Normalizer:
        """Return the inverse as a normaliser of actions."""
        if self.mode == "IDENTITY":
            return Normalizer(torch.zeros(size), torch.ones(size))
        if self.mode == "MEAN_STD":
            return Normalizer(self.low, self.high.clamp_min(self.eps))
        return Normalizer(self.low + self._span / 2, self._span / 2)

    @property
    def _span(self) -> Tensor:
        span = self.high - self.low
        return torch.where(span == 0, torch.full_like(span, self.eps), span)


class LeRobotEncoder(nn.Module):
    """Observations to the U-Net's condition: per time step state, image features, environment state, all in a row."""

    def __init__(self, config: Mapping[str, Any], scalings: Mapping[str, Scaling], rename: Mapping[str, str]) -> None:
        super().__init__()
        features = config["input_features"]
        self.images = [key for key, feature in features.items() if feature["type"] == "VISUAL"]
        self.states = [key for key in (STATE, ENVIRONMENT) if key in features]
        self.scalings, self.rename = dict(scalings), dict(rename)
        self.separate = bool(config.get("use_separate_rgb_encoder_per_camera", False))
        self.channels = sum(int(features[key]["shape"][0]) for key in self.states)
        if self.images:
            first = features[self.images[0]]["shape"]
            resize, crop = (tuple(config[k]) if config.get(k) else None for k in ("resize_shape", "crop_shape"))
            encoders = [
                RgbEncoder(
                    config["vision_backbone"],
                    (first[0], first[1], first[2]),
                    resize,
                    crop,
                    config["spatial_softmax_num_keypoints"],
                    group_norm=config["use_group_norm"],
                )
                for _ in (self.images if self.separate else self.images[:1])
            ]
            self.channels += encoders[0].out.out_features * len(self.images)
            self.rgb_encoder: nn.Module = nn.ModuleList(encoders) if self.separate else encoders[0]

    def forward(self, history: History) -> Float[Tensor, "b c"]:
        """Return the condition for key → [b n_obs ...]."""
        parts = [self._value(history, STATE)]
        for index, key in enumerate(self.images):
            image = self._value(history, key)
            encoder = self.rgb_encoder[index] if self.separate else self.rgb_encoder  # type: ignore[index]
            parts.append(encoder(image.flatten(0, 1)).unflatten(0, image.shape[:2]))
        if ENVIRONMENT in self.states:
            parts.append(self._value(history, ENVIRONMENT))
        return torch.cat(parts, dim=-1).flatten(1)

    def _value(self, history: History, key: str) -> Tensor:
        """One feature, normalised; images become [b n c h w] in [0, 1] first."""
        value = torch.as_tensor(np.asarray(history[self.rename.get(key, key)]))
        if key in self.images:
            value = value.movedim(-1, -3) / (255.0 if value.dtype == torch.uint8 else 1.0)
        return self.scalings[key].normalize(value.float())


def load_lerobot(folder: str | Path, *, rename: Mapping[str, str] | None = None) -> ForeignPolicy:
    """Load a LeRobot diffusion policy.

    Args:
        folder: what its `save_pretrained` wrote.
        rename: LeRobot's name of an observation → its name in the environment, e.g.
            {"observation.state": "agent_pos"}.

    Raises:
        UsageError: not such a folder, a policy type without an adapter, or missing weights or statistics.
    """
    place = Path(folder)
    config = _json(place / "config.json")
    if config.get("type") != "diffusion":
        raise UsageError(
            f"'{place}' holds a LeRobot policy of type '{config.get('type')}'; only 'diffusion' is read. Load a flow "
            f"policy with lerobot and wrap it: ForeignPolicy(spec, velocity_model(predict, **adapters_lerobot.FLOW))."
        )
    from safetensors.torch import load_file

    weights = load_file(str(_there(place / "model.safetensors")))
    scalings = _scalings(place, config, weights)
    names = dict(rename or {})
    encoder = LeRobotEncoder(config, scalings, names)
    action = int(config["output_features"][ACTION]["shape"][0])
    n_obs = int(config["n_obs_steps"])
    unet = ConditionalUnet1d(
        action,
        encoder.channels * n_obs,
        config["down_dims"],
        config["kernel_size"],
        config["n_groups"],
        config["diffusion_step_embed_dim"],
        scaled=config["use_film_scale_modulation"],
    )
    _load(unet, weights, "diffusion.unet.", place)
    if encoder.images:
        _load(encoder.rgb_encoder, weights, "diffusion.rgb_encoder.", place)
    schedule = named_schedule(
        config["beta_schedule"], config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    )
    shapes = {}
    for key, feature in config["input_features"].items():
        shape = tuple(int(n) for n in feature["shape"])
        # images have their channels last in our environments
        shapes[names.get(key, key)] = (*shape[1:], shape[0]) if feature["type"] == "VISUAL" else shape
    spec = PolicySpec(
        shapes,
        action,
        horizon=int(config["horizon"]),
        n_obs=n_obs,
        n_action=int(config["n_action_steps"]),
    )
    denoiser = noise_model(unet.eval(), schedule=schedule, prediction=config["prediction_type"])
    steps = int(config.get("num_inference_steps") or config["num_train_timesteps"])
    clip = float(config["clip_sample_range"]) if config["clip_sample"] else None
    sampler = diffusers_sampler(config["noise_scheduler_type"], steps, clip)
    normalizer = scalings[ACTION].inverse(action)
    return ForeignPolicy(spec, denoiser, normalizer, sampler, encoder.eval().requires_grad_(False))


def _scalings(place: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Scaling]:
    """Read the normalisation of every feature.

    Raises:
        UsageError: statistics are missing.
    """
    pre, eps = _processor(place, "policy_preprocessor.json", "normalizer_processor")
    post, _ = _processor(place, "policy_postprocessor.json", "unnormalizer_processor")
    found = {}
    for group, side in ((config["input_features"], pre), (config["output_features"], post)):
        for key, feature in group.items():
            mode = config["normalization_mapping"].get(feature["type"], "IDENTITY")
            if mode == "IDENTITY":
                found[key] = Scaling(mode, torch.empty(0), torch.empty(0), eps)
                continue
            if mode not in _MODES:
                raise UsageError(
                    f"'{place}': normalisation '{mode}' of '{key}' is unknown; known: {', '.join(_MODES)}."
                )
            # before 0.4 the statistics were buffers among the weights
            part = "unnormalize_outputs" if key == ACTION else "normalize_inputs"
            old = f"{part}.buffer_{key.replace('.', '_')}"
            ends = [side.get(f"{key}.{name}", weights.get(f"{old}.{name}")) for name in _MODES[mode]]
            if ends[0] is None or ends[1] is None:
                raise UsageError(
                    f"'{place}' has no statistics {' and '.join(_MODES[mode])} of '{key}'; save the policy with its "
                    f"processors (preprocessor.save_pretrained, postprocessor.save_pretrained)."
                )
            found[key] = Scaling(mode, ends[0].float(), ends[1].float(), eps)
    return found


def _processor(place: Path, name: str, step: str) -> tuple[dict[str, Tensor], float]:
    """Statistics and eps of a processor's normalising step; nothing where the file is not there (before 0.4)."""
    if not (place / name).exists():
        return {}, 1e-8
    from safetensors.torch import load_file

    for entry in _json(place / name).get("steps", []):
        if entry.get("registry_name") == step and entry.get("state_file"):
            state = load_file(str(_there(place / entry["state_file"])))
            return state, float(entry.get("config", {}).get("eps", 1e-8))
    return {}, 1e-8


def _load(module: nn.Module, weights: Mapping[str, Tensor], prefix: str, place: Path) -> None:
    """Load a part of the weights.

    Raises:
        UsageError: a parameter is missing, left over or of another shape.
    """
    part = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    try:
        module.load_state_dict(part)
    except RuntimeError as error:
        text = " ".join(str(error).split())[:200]
        raise UsageError(f"the weights in '{place}' do not fit its config: {text}") from error


def _there(path: Path) -> Path:
    """The path, if it exists."""
    if not path.is_file():
        raise UsageError(f"'{path}' is not there; give a folder that LeRobot's save_pretrained wrote.")
    return path


def _json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(_there(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"'{path}' is damaged ({error}); copy the policy again.") from error
    if not isinstance(found, dict):
        raise UsageError(f"'{path}' holds no object; copy the policy again.")
    return found
