"""robomimic checkpoints, loaded without robomimic, against actions of the real package (0.3.0, recorded)."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from gencontrol.errors import UsageError
from gencontrol.rng import Keyed, row_keys
from gencontrol.robotics.compose import ComposedPolicy
from gencontrol.robotics.policies.foreign import DiffusersDdim, ForeignPolicy
from gencontrol.robotics.policies.foreign_nets import ConditionalUnet1d
from gencontrol.robotics.policies.loading import load_policy
from gencontrol.robotics.policies.robomimic import ClonedPolicy, load_robomimic, unet_names
from tests.helpers.composition_parents import noise

HERE = Path(__file__).resolve().parents[2] / "fixtures" / "robomimic_policy"


def recorded() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Actions by kind [draws 3 4] and observations [3 ...]."""
    found = dict(np.load(HERE / "record.npz"))
    seen = {key.removeprefix("seen."): found.pop(key) for key in list(found) if key.startswith("seen.")}
    return found, seen


@pytest.mark.parametrize("kind", ["plain", "gaussian"])
def test_actions_are_those_of_robomimic(kind: str) -> None:
    """float32 on both sides; "gaussian" has observation statistics too."""
    actions, seen = recorded()
    policy = load_robomimic(HERE / f"{kind}.pth")
    assert isinstance(policy, ClonedPolicy)
    assert policy.spec.observations == {"object": (5,), "robot0_eef_pos": (3,)} and policy.spec.action_dim == 4
    np.testing.assert_allclose(policy.select_action(seen), actions[kind][0], rtol=0, atol=2e-6)


def test_a_mixture_draws_robomimics_modes_as_often() -> None:
    """400 draws each of 3 observations: the same modes (to the noise of 1e-4), shares within 4 standard errors."""
    actions, seen = recorded()
    policy = load_robomimic(HERE / "gmm.pth")
    draws = 400
    for row in range(3):
        keys = Keyed(row_keys(0, "gmm", torch.arange(draws)))
        observation = {key: np.repeat(value[row][None, None], draws, 0) for key, value in seen.items()}
        ours, theirs = policy.sample_chunk(observation, keys)[:, 0], torch.from_numpy(actions["gmm"][:, row])
        modes = theirs[:1]
        for action in theirs:  # their modes, found one by one
            if float((modes - action).abs().amax(1).min()) > 5e-3:
                modes = torch.cat([modes, action[None]])
        distance = torch.cdist(ours, modes, p=float("inf"))
        shares = [float((torch.cdist(x, modes).argmin(1) == 0).float().mean()) for x in (ours, theirs)]
        assert abs(shares[0] - shares[1]) < 4 * (2 * 0.25 / draws) ** 0.5
        rare = float((distance.amin(1) > 5e-3).float().mean())  # modes that they happened not to draw
        assert rare < 0.02


def unet_checkpoint(path: Path, **changes) -> ConditionalUnet1d:
    """A diffusion policy checkpoint as robomimic 0.5 writes it, with our network's weights under its names."""
    net = ConditionalUnet1d(2, 2 * 5, [8, 16], kernel=5, step_dim=16)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    names = {}
    for name, value in net.state_dict().items():
        name = name.replace(".conv1.", ".blocks.0.").replace(".conv2.", ".blocks.1.")
        for side in ("down_modules", "up_modules"):
            name = name.replace(f"{side}.0.2.", f"{side}.0.2.conv.")
        names[f"policy.noise_pred_net.{name}"] = value
    stale = {name: torch.zeros_like(value) for name, value in names.items()}
    ddim = {
        "enabled": True,
        "num_train_timesteps": 100,
        "num_inference_timesteps": 10,
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": True,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "prediction_type": "epsilon",
    }
    algo = {
        "horizon": {"observation_horizon": 2, "action_horizon": 4, "prediction_horizon": 8},
        "ddpm": {**ddim, "enabled": False},
        "ddim": ddim,
    }
    config = {"algo": algo, "observation": {"modalities": {"obs": {"low_dim": ["b", "a"], "rgb": []}, "goal": {}}}}
    content = {
        "model": {"nets": stale, "ema": names},
        "config": json.dumps(config),
        "algo_name": "diffusion_policy",
        "shape_metadata": {"ac_dim": 2, "all_shapes": {"a": [2], "b": [3]}},
        "action_normalization_stats": {"actions": {"offset": [[0.5, -1.0]], "scale": [[2.0, 0.25]]}},
        **changes,
    }
    torch.save(content, path)
    return net


def test_the_diffusion_policy_is_a_denoiser_with_the_averaged_weights(tmp_path: Path) -> None:
    net = unet_checkpoint(tmp_path / "model.pth").eval()
    policy = load_robomimic(tmp_path / "model.pth")
    assert isinstance(policy, ForeignPolicy)
    assert (policy.spec.horizon, policy.spec.n_obs, policy.spec.n_action) == (8, 2, 4)
    assert policy.sampler.step == DiffusersDdim(1.0) and policy.sampler_steps == 10
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(3, *shape, generator=generator) for shape in ((8, 2), (2, 2), (2, 3)))
    cond = policy.encode({"a": a.numpy(), "b": b.numpy()})
    assert torch.equal(cond, torch.cat([a, b], 2).flatten(1))  # in the order of all_shapes
    with torch.no_grad():
        expected = net(x, torch.full((3,), 39.0), cond)
        torch.testing.assert_close(policy.denoiser(x, 0.4, cond).eps, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(policy.action_normalizer.denormalize(torch.ones(2)), torch.tensor([2.5, -0.75]))
    other = load_robomimic(tmp_path / "model.pth")
    seen = {"a": a.numpy(), "b": b.numpy()}
    mixed = ComposedPolicy([policy, other], [0.5, 0.5]).sample_chunk(seen, noise(3))
    torch.testing.assert_close(mixed, policy.sample_chunk(seen, noise(3)), rtol=0, atol=1e-5)


def test_names_of_the_original_u_net_are_mapped() -> None:
    one = torch.zeros(1)
    names = {
        "down_modules.0.1.blocks.1.block.0.weight": "down_modules.0.1.conv2.block.0.weight",
        "up_modules.1.2.conv.bias": "up_modules.1.2.bias",
        "final_conv.0.block.1.weight": "final_conv.0.block.1.weight",
        "mid_modules.0.cond_encoder.1.weight": "mid_modules.0.cond_encoder.1.weight",
    }
    assert list(unet_names(dict.fromkeys(names, one))) == list(names.values())


class Evil:
    """Pickles as a call."""

    def __reduce__(self):
        return (print, ("code was run",))


def test_a_file_with_code_is_not_run(tmp_path: Path, capsys) -> None:
    torch.save({"model": Evil()}, tmp_path / "bad.pth")
    with pytest.raises(UsageError, match="weights_only=False"):
        load_robomimic(tmp_path / "bad.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(UsageError, match="without running code"):
        load_robomimic(tmp_path / "plain.pth")
    assert "code was run" not in capsys.readouterr().out


def bc(path: Path, **algo) -> Path:
    """The recorded BC checkpoint with other options."""
    found = torch.load(HERE / "plain.pth", weights_only=True)
    config = json.loads(found["config"])
    for part, options in algo.items():
        config["algo"][part] = {**config["algo"][part], **options}
    torch.save({**found, "config": json.dumps(config)}, path)
    return path


@pytest.mark.parametrize("part", ["rnn", "transformer", "vae"])
def test_networks_without_an_adapter_are_refused(part: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{part}.*run it with robomimic"):
        load_robomimic(bc(tmp_path / "model.pth", **{part: {"enabled": True}}))


def test_images_and_noisy_evaluation_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="low_noise_eval"):
        load_robomimic(bc(tmp_path / "model.pth", gmm={"enabled": True, "low_noise_eval": False}))
    found = torch.load(HERE / "plain.pth", weights_only=True)
    config = json.loads(found["config"])
    config["observation"]["modalities"]["obs"]["rgb"] = ["agentview_image"]
    torch.save({**found, "config": json.dumps(config)}, tmp_path / "image.pth")
    with pytest.raises(UsageError, match="agentview_image.*states alone"):
        load_robomimic(tmp_path / "image.pth")


@pytest.mark.parametrize(
    "change, match",
    [
        ({"algo_name": "td3_bc"}, "td3_bc"),
        ({"model": {"nets": {}, "ema": None}}, "not robomimic's U-Net"),
        ({"config": None}, "no robomimic checkpoint|config"),
    ],
)
def test_other_checkpoints_are_refused(change, match: str, tmp_path: Path) -> None:
    unet_checkpoint(tmp_path / "model.pth", **change)
    with pytest.raises(UsageError, match=match):
        load_robomimic(tmp_path / "model.pth")


def test_load_policy_finds_the_adapters() -> None:
    assert isinstance(load_policy(HERE / "plain.pth"), ClonedPolicy)
    assert isinstance(load_policy(HERE.parent / "lerobot_policy" / "state"), ForeignPolicy)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint"):
        load_robomimic(tmp_path / "model.pth")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "model.pth")
    with pytest.raises(UsageError, match="no model, config, algo_name, shape_metadata"):
        load_robomimic(tmp_path / "model.pth")
