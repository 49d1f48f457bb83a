"""robomimic checkpoints without robomimic: behaviour cloning on states, and its diffusion policy on states.

A checkpoint (`.pth`) is a torch file; it is read with weights_only=True, which builds tensors and plain values and runs
nothing.  BC, BC-Gaussian and BC-GMM are policies of one action (robomimic 0.3.0's own actions are reproduced in the
tests); the diffusion policy (robomimic ≥ 0.4, not on PyPI) becomes a denoiser, its U-Net loaded by parameter names
(FOUND: source read).  Observations are joined in the order of `shape_metadata.all_shapes`, as robomimic does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gencontrol.data.normalize import Normalizer
from gencontrol.errors import UsageError
from gencontrol.rng import Keyed
from gencontrol.robotics.policies.chunked import ChunkedPolicy, PolicySpec
from gencontrol.robotics.policies.denoising import History
from gencontrol.robotics.policies.foreign import ForeignPolicy, diffusers_sampler, named_schedule, noise_model
from gencontrol.robotics.policies.foreign_nets import ConditionalUnet1d

_KEYS = ("model", "config", "algo_name", "shape_metadata")
#: robomimic's evaluation noise around the mean of a mixture component ("low_noise_eval")
_LOW_NOISE = 1e-4


class Observations(nn.Module):
    """States of a history in a row, scaled by the checkpoint's statistics where it has them."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], statistics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.shapes, self.statistics = dict(shapes), dict(statistics)

    @property
    def size(self) -> int:
        """Numbers per time step."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    def forward(self, history: History) -> Float[Tensor, "b c"]:
        """Return the observations key → [b n_obs ...] as one vector per row."""
        parts = []
        for key in self.shapes:
            value = torch.as_tensor(np.asarray(history[key])).float()
            if key in self.statistics:
                offset, scale = self.statistics[key]
                value = (value - offset) / scale
            parts.append(value.flatten(2))
        return torch.cat(parts, dim=2).flatten(1)


class ClonedPolicy(ChunkedPolicy):
    """robomimic's BC, BC-Gaussian or BC-GMM: one action per observation, in [−1, 1] before unnormalising.

    Args:
        spec: horizon, n_obs and n_action are 1.
        observations: to the network's input.
        body: the perceptron.
        heads: "action", or "mean", or "mean" [modes·A] and "logits" [modes].
        action_normalizer: between the network's actions and the environment's.
    """

    def __init__(
        self,
        spec: PolicySpec,
        observations: Observations,
        body: nn.Sequential,
        heads: Mapping[str, nn.Linear],
        action_normalizer: Normalizer,
    ) -> None:
        super().__init__()
        self.spec, self.observations, self.body = spec, observations, body
        self.heads, self.action_normalizer = dict(heads), action_normalizer

    def sample_chunk(self, observation: History, noise: Keyed) -> Float[Tensor, "b 1 action"]:
        """Return one action per row; a mixture's mode is drawn from the row's stream.

        Args:
            observation: key → [b 1 ...].
            noise: one stream per row.
        """
        h = self.body(self.observations(observation))
        if "action" in self.heads:
            action = self.heads["action"](h).tanh()
        elif "logits" not in self.heads:
            action = self.heads["mean"](h).clamp(-9.0, 9.0).tanh()
        else:
            shares = self.heads["logits"](h).softmax(-1).double().cumsum(-1)
            mode = (noise.uniform((len(h), 1)) > shares).sum(1).clamp(max=shares.shape[1] - 1)
            means = self.heads["mean"](h).unflatten(1, (shares.shape[1], -1)).tanh()
            jitter = Keyed(noise.keys, noise.counter + 1).normal((len(h), means.shape[-1]))
            action = means[torch.arange(len(h)), mode] + _LOW_NOISE * jitter
        return self.action_normalizer.denormalize(action)[:, None]


def load_robomimic(path: str | Path) -> ClonedPolicy | ForeignPolicy:
    """Load a robomimic checkpoint.

    Raises:
        UsageError: no such file, one that holds more than tensors and plain values, or a policy without an adapter.
    """
    place = Path(path)
    checkpoint = _read(place)
    try:  # robomimic keeps its configuration as a JSON text
        config = json.loads(checkpoint["config"])
        modalities = config["observation"]["modalities"]
        algo, name = config["algo"], checkpoint["algo_name"]
    except (TypeError, ValueError, KeyError) as error:
        raise UsageError(
            f"the config in '{place}' is no robomimic configuration; save the checkpoint again."
        ) from error
    wanted = [key for keys in modalities["obs"].values() for key in keys]
    others = [key for kind, keys in modalities["obs"].items() if kind != "low_dim" for key in keys]
    others += [key for keys in modalities.get("goal", {}).values() for key in keys]
    if others:
        raise UsageError(
            f"'{place}' reads {', '.join(others)}; its adapter reads states alone (no images or goals). Run it with "
            f"robomimic, or train a policy here on the same data."
        )
    found = checkpoint["shape_metadata"]["all_shapes"]
    shapes = {key: tuple(int(n) for n in shape) for key, shape in found.items() if key in wanted}
    statistics = {
        key: _offset_scale(entry, place) for key, entry in (checkpoint.get("obs_normalization_stats") or {}).items()
    }
    observations = Observations(shapes, statistics)
    size = int(checkpoint["shape_metadata"]["ac_dim"])
    parts = [_offset_scale(entry, place) for entry in (checkpoint.get("action_normalization_stats") or {}).values()]
    ends = [torch.cat([part[i].reshape(-1) for part in parts]) for i in (0, 1)] if parts else None
    normalizer = Normalizer(*ends) if ends else Normalizer(torch.zeros(size), torch.ones(size))
    model = checkpoint["model"]
    if name == "diffusion_policy":
        return _diffusion(place, algo, model, observations, shapes, size, normalizer)
    if name != "bc":
        raise UsageError(f"'{place}' is a robomimic '{name}' policy; read are 'bc' and 'diffusion_policy'.")
    for part in ("rnn", "transformer", "vae"):
        if algo.get(part, {}).get("enabled", False):
            raise UsageError(f"'{place}' is a BC policy with {part}, which has no adapter; run it with robomimic.")
    for part in ("gaussian", "gmm"):
        if algo.get(part, {}).get("enabled", False) and not algo[part].get("low_noise_eval", True):
            raise UsageError(f"'{place}': {part} without low_noise_eval has no adapter; run it with robomimic.")
    spec = PolicySpec(shapes, size, horizon=1, n_obs=1, n_action=1)
    body, heads = _cloned(place, model.get("nets", model))
    return ClonedPolicy(spec, observations, body, heads, normalizer)


def _read(place: Path) -> dict[str, Any]:
    """Read the file without running anything in it."""
    if not place.is_file():
        raise UsageError(f"there is no checkpoint '{place}'; give a robomimic .pth file.")
    try:
        found = torch.load(place, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; all mean that nothing usable is in the file
        raise UsageError(
            f"'{place}' cannot be read without running code in it ({' '.join(str(error).split())[:120]}). If you trust "
            f"it, rewrite it where robomimic is: c = torch.load(p, weights_only=False); "
            f"torch.save({{k: c[k] for k in {_KEYS}}}, p)."
        ) from error
    missing = [key for key in _KEYS if not isinstance(found, Mapping) or key not in found]
    if missing:
        raise UsageError(f"'{place}' is no robomimic checkpoint: it has no {', '.join(missing)}.")
    return dict(found)


def _offset_scale(entry: Mapping[str, Any], place: Path) -> tuple[Tensor, Tensor]:
    """Statistics of a key: mean and std (0.3), offset and scale (since 0.4)."""
    for low, high in (("mean", "std"), ("offset", "scale")):
        if low in entry and high in entry:
            offset, scale = (torch.as_tensor(entry[name]).float().squeeze(0) for name in (low, high))
            return offset, scale
    raise UsageError(f"'{place}' has statistics {', '.join(entry)}; expected mean and std, or offset and scale.")


def _cloned(place: Path, weights: Mapping[str, Tensor]) -> tuple[nn.Sequential, dict[str, nn.Linear]]:
    """Rebuild the perceptron and its heads from the weights' names.

    Raises:
        UsageError: other parameters are there.
    """
    layers: dict[int, nn.Linear] = {}
    heads: dict[str, nn.Linear] = {}
    known = 0
    for name, value in weights.items():
        body = re.fullmatch(r"policy\.nets\.mlp\._model\.(\d+)\.weight", name)
        head = re.fullmatch(r"policy\.nets\.decoder\.nets\.(action|mean|scale|logits)\.weight", name)
        if body or head:
            linear = nn.Linear(value.shape[1], value.shape[0])
            linear.load_state_dict({"weight": value, "bias": weights[name.replace(".weight", ".bias")]})
            known += 2
            if body:
                layers[int(body[1])] = linear
            elif head:
                heads[head[1]] = linear
    if known != len(weights) or not layers or not {"action", "mean"} & set(heads):
        odd = next((name for name in weights if ".mlp._model." not in name and ".decoder." not in name), "nothing else")
        raise UsageError(f"'{place}' has parameters that a BC perceptron has not ({odd}); run it with robomimic.")
    stack = [part for index in sorted(layers) for part in (layers[index], nn.ReLU())]
    return nn.Sequential(*stack).eval().requires_grad_(False), heads


def unet_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of Diffusion Policy's ConditionalUnet1D under the names of ours (those of LeRobot)."""
    found = {}
    for name, value in weights.items():
        renamed = re.sub(r"\.blocks\.([01])\.", lambda m: f".conv{int(m[1]) + 1}.", name)
        found[re.sub(r"^((?:down|up)_modules\.\d+\.2)\.conv\.", r"\1.", renamed)] = value
    return found


def _diffusion(
    place: Path,
    algo: Mapping[str, Any],
    model: Mapping[str, Any],
    observations: Observations,
    shapes: Mapping[str, tuple[int, ...]],
    size: int,
    normalizer: Normalizer,
) -> ForeignPolicy:
    """robomimic's diffusion policy; the averaged weights where there are any."""
    weights = model.get("ema") or model["nets"]
    prefix = "policy.noise_pred_net."
    part = unet_names({key.removeprefix(prefix): v for key, v in weights.items() if key.startswith(prefix)})
    horizon = algo["horizon"]
    n_obs = int(horizon["observation_horizon"])
    try:
        levels = 1 + max(int(key.split(".")[1]) for key in part if key.startswith("down_modules."))
        dims = [part[f"down_modules.{level}.0.conv1.block.0.weight"] for level in range(levels)]
        step_dim = part["diffusion_step_encoder.3.weight"].shape[0]
        unet = ConditionalUnet1d(
            size, observations.size * n_obs, [w.shape[0] for w in dims], dims[0].shape[2], 8, step_dim, scaled=True
        )
        unet.load_state_dict(part)
    except (KeyError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())[:200]
        raise UsageError(f"the weights in '{place}' are not robomimic's U-Net on states: {text}") from error
    kind = "ddpm" if algo["ddpm"]["enabled"] else "ddim"
    options = algo[kind]
    if kind == "ddim" and (not options.get("set_alpha_to_one", True) or options.get("steps_offset", 0)):
        raise UsageError(f"'{place}': DDIM without set_alpha_to_one, or with steps_offset, has no adapter.")
    schedule = named_schedule(options["beta_schedule"], int(options["num_train_timesteps"]), 1e-4, 0.02)
    denoiser = noise_model(unet.eval().requires_grad_(False), schedule=schedule, prediction=options["prediction_type"])
    steps = int(options["num_inference_timesteps"])
    sampler = diffusers_sampler(kind.upper(), steps, 1.0 if options["clip_sample"] else None)
    spec = PolicySpec(shapes, size, int(horizon["prediction_horizon"]), n_obs, int(horizon["action_horizon"]))
    return ForeignPolicy(spec, denoiser, normalizer, sampler, observations)
