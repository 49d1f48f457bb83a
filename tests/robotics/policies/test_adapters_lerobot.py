"""LeRobot's DiffusionPolicy, loaded without lerobot, against action chunks that lerobot 0.4.4 drew (recorded).

Tolerance 2e-5 in actions of range about ±3: float32 on both sides, sums in another order; LeRobot keeps its noise
levels in float32, ours are exact.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.robotics.compose import ComposedPolicy
from gencontrol.robotics.policies.foreign import ForeignPolicy, velocity_model
from gencontrol.robotics.policies.lerobot import FLOW, load_lerobot
from gencontrol.sampling import State, clip_x0
from tests.fixtures.lerobot_policy_recipe import VARIANTS, weights_of
from tests.helpers.composition_parents import noise

HERE = Path(__file__).resolve().parents[2] / "fixtures" / "lerobot_policy"
TOLERANCE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(scope="module")
def record() -> dict[str, Tensor]:
    return load_file(str(HERE / "record.safetensors"))


def changed(folder: Path, **options) -> Path:
    """A copy of the state policy with other options in its config."""
    shutil.copytree(HERE / "state", folder)
    config = json.loads((folder / "config.json").read_text())
    defaults = {"num_inference_steps": None, "clip_sample": True, "prediction_type": "epsilon"}
    modes = options.pop("normalization_mapping", config["normalization_mapping"])
    (folder / "config.json").write_text(json.dumps({**config, **defaults, **options, "normalization_mapping": modes}))
    return folder


def seen(record: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {key.removeprefix("history."): v.numpy() for key, v in record.items() if key.startswith("history.")}


def drawn(policy: ForeignPolicy, history, recorded: Tensor) -> Tensor:
    """The chunk for recorded noise: entry 0 is the start, entry k + 1 the noise of step k."""
    grid = policy.denoiser.process.times(policy.sampler.steps)
    model = policy.denoiser if policy.sampler.clip is None else clip_x0(policy.denoiser, policy.sampler.clip)
    state, cond = State(recorded[0]), policy.encode(history)
    with torch.inference_mode():
        for k, (t, t_next) in enumerate(zip(grid, grid[1:])):
            state = policy.sampler.step(model, state, t, t_next, cond, recorded[min(k + 1, len(recorded) - 1)])
    return policy.finish(state.x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_are_those_of_lerobot(variant: str, record: dict[str, Tensor], tmp_path: Path) -> None:
    policy = load_lerobot(changed(tmp_path / "policy", **VARIANTS[variant]))
    found = drawn(policy, seen(record), record["noise"])
    torch.testing.assert_close(found, record[f"chunk.{variant}"], **TOLERANCE)


def test_actions_of_an_episode_are_those_of_lerobot(record: dict[str, Tensor]) -> None:
    """History, queue and normalisers over six steps; the sampler's start is lerobot's recorded noise."""
    policy = load_lerobot(HERE / "state")
    calls = iter((10, 14))

    def sample_chunk(observation, keys):
        start = record["noise"][next(calls)]
        x = policy.sampler.draw(policy.denoiser, tuple(start.shape), keys, policy.encode(observation), start)
        return policy.finish(x)

    policy.sample_chunk = sample_chunk
    keys = ("observation.state", "observation.environment_state")
    for step in range(6):
        action = policy.select_action({key: record[f"seen.{key}"][step].numpy() for key in keys})
        torch.testing.assert_close(torch.from_numpy(action), record["actions"][step], **TOLERANCE)


def test_a_camera_policy_is_lerobots(record: dict[str, Tensor], tmp_path: Path) -> None:
    """ResNet-18 with GroupNorm, resized and cropped images, spatial softmax."""
    folder = tmp_path / "policy"
    shutil.copytree(HERE / "image", folder)
    shapes = json.loads((folder / "shapes.json").read_text())
    weights = {name: weights_of(name, tuple(shape)) for name, shape in shapes.items()}
    weights["diffusion.rgb_encoder.pool.pos_grid"] = record["image.grid"]
    save_file(weights, str(folder / "model.safetensors"))
    policy = load_lerobot(folder, rename={"observation.images.top": "camera", "observation.state": "state"})
    assert policy.spec.observations == {"state": (3,), "camera": (40, 44, 3)}
    camera = record["image.top"].movedim(2, -1).numpy()
    found = drawn(policy, {"state": record["image.state"].numpy(), "camera": camera}, record["noise"])
    torch.testing.assert_close(found, record["image.chunk"], **TOLERANCE)
    condition = policy.encode({"state": record["image.state"].numpy(), "camera": camera})
    assert float(condition.unflatten(1, (2, -1))[..., 3:].std(0).max()) > 0.005  # the images differ and are seen
    torch.testing.assert_close(condition, record["image.condition"], **TOLERANCE)


def test_the_contract_is_read_from_the_folder() -> None:
    policy = load_lerobot(HERE / "state")
    assert (policy.spec.horizon, policy.spec.n_obs, policy.spec.n_action) == (8, 2, 4)
    assert policy.sampler_steps == 10 and policy.denoiser.prediction == "eps"
    # min_max: the ends of the action are ±1
    stats = load_file(str(HERE / "state" / "policy_postprocessor_step_0_unnormalizer_processor.safetensors"))
    ends = torch.stack([stats["action.min"], stats["action.max"]])
    torch.testing.assert_close(policy.action_normalizer.normalize(ends), torch.tensor([[-1.0], [1.0]]).expand(2, 2))


def test_it_composes_and_weight_one_is_the_policy() -> None:
    policy = load_lerobot(HERE / "state")
    flow = ForeignPolicy(policy.spec, velocity_model(lambda x, t, c: -x, **FLOW), policy.action_normalizer)
    history = {key: np.zeros((2, 2, *shape), np.float32) for key, shape in policy.spec.observations.items()}
    alone = policy.sample_chunk(history, noise(2))
    assert torch.equal(ComposedPolicy([policy, flow], [1.0, 0.0]).sample_chunk(history, noise(2)), alone)
    mixed = ComposedPolicy([policy, flow], [0.5, 0.5]).sample_chunk(history, noise(2))
    assert bool(torch.isfinite(mixed).all()) and float((mixed - alone).abs().max()) > 1e-3


def test_statistics_of_older_folders_are_among_the_weights(record: dict[str, Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(HERE / "state", folder)
    weights = load_file(str(folder / "model.safetensors"))
    for side, prefix in (("pre", "normalize_inputs"), ("post", "unnormalize_outputs")):
        for file in folder.glob(f"policy_{side}processor*.safetensors"):
            for key, value in load_file(str(file)).items():
                name, _, statistic = key.rpartition(".")
                weights[f"{prefix}.buffer_{name.replace('.', '_')}.{statistic}"] = value
    for file in folder.glob("policy_*"):
        file.unlink()
    with pytest.raises(UsageError, match="no statistics min and max of 'observation.state'"):
        load_lerobot(folder)
    save_file(weights, str(folder / "model.safetensors"))
    found = drawn(load_lerobot(folder), seen(record), record["noise"])
    torch.testing.assert_close(found, record["chunk.ddim_clipped"], **TOLERANCE)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"type": "smolvla"}, "velocity_model"),
        ({"down_dims": [8, 8]}, "do not fit its config"),
        ({"beta_schedule": "sigmoid"}, "beta schedule"),
        ({"normalization_mapping": {"STATE": "ODD", "ENV": "ODD", "ACTION": "ODD"}}, "normalisation 'ODD'"),
    ],
)
def test_what_cannot_be_read_is_refused(change, match: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=match):
        load_lerobot(changed(tmp_path / "policy", **change))


def test_a_damaged_or_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not there"):
        load_lerobot(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        load_lerobot(tmp_path)


def test_the_flow_convention_steps_from_noise_to_actions() -> None:
    """x = t·noise + (1 − t)·action with velocity noise − action: an exact network carries noise to the action."""
    policy = load_lerobot(HERE / "state")
    action = torch.full((8, 2), 0.25)
    model = velocity_model(lambda x, t, c: (x - action) / t[:, None, None], **FLOW)
    flow = ForeignPolicy(policy.spec, model, policy.action_normalizer)
    history = {key: np.zeros((1, 2, *shape), np.float32) for key, shape in policy.spec.observations.items()}
    found = policy.action_normalizer.normalize(flow.sample_chunk(history, noise(1)))
    torch.testing.assert_close(found[0], action, rtol=0, atol=1e-5)
