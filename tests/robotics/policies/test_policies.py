"""Policies: the fast sampler against `sample` and against diffusers, folders, clipping, observations."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gencontrol.data.normalize import Normalizer
from gencontrol.errors import UsageError
from gencontrol.models.denoiser import Denoiser
from gencontrol.process import GaussianProcess
from gencontrol.rng import Keyed
from gencontrol.robotics.policies.chunked import PolicySpec
from gencontrol.robotics.policies.config import DiffusionPolicyConfig, FlowPolicyConfig
from gencontrol.robotics.policies.denoising import ParentModel
from gencontrol.robotics.policies.diffusion import (
    DiffusionPolicy,
    FlowPolicy,
    diffusion_grid,
    squaredcos,
)
from gencontrol.robotics.policies.loading import load_policy
from gencontrol.sampling import sample
from gencontrol.sampling.fast import run, step_noise, step_table
from gencontrol.sampling.steps import Ddim, Heun
from tests.helpers.policy_cases import ACTION, STATE, history, small_policy

NOISE = Keyed(torch.arange(3) + 100)

CASES: list[tuple[str, dict[str, Any]]] = [
    ("flow", {}),
    ("flow", {"clip": 1.0}),
    ("diffusion", {"sampler": "ddim"}),
    ("diffusion", {"sampler": "ddpm", "prediction": "v", "clip": 0.0}),
    ("diffusion", {"sampler": "ddpm", "inference_steps": 100, "prediction": "x0"}),
    ("diffusion", {"sampler": "ddim", "spacing": "trailing", "clip": 0.0}),
]


@pytest.mark.parametrize("backbone", ["unet", "mlp", "transformer"])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_fast_sampler_gives_the_numbers_of_sample(kind: str, options: dict[str, Any], backbone: str) -> None:
    """Float32 rounding grows along the path: 1e-4 of chunks of size 1 and more; a wrong coefficient shows at 1e-2."""
    policy = small_policy(kind, backbone, **options)
    with torch.no_grad():
        cond = policy.encode(history(policy))
        fast = policy.draw(cond, NOISE)
        slow = policy.sampler.draw(policy.denoiser, (3, 8, ACTION), NOISE, cond)
    assert float(fast.std()) > 0.1
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4 * float(slow.abs().max()))


def test_other_steps_go_through_sample() -> None:
    """A Heun sampler is not in the fast loop; it is drawn by `sample`, not ignored."""
    policy = small_policy("flow", "mlp")
    euler = policy.draw(policy.encode(history(policy)), NOISE)
    policy.sampler = dataclasses.replace(policy.sampler, step=Heun())
    cond = policy.encode(history(policy))
    heun = policy.draw(cond, NOISE)
    assert not torch.allclose(heun, euler, atol=1e-3)
    torch.testing.assert_close(
        heun, sample(policy.denoiser, heun.shape, steps=10, step="heun", generator=NOISE, cond=cond)
    )


class _Wave(nn.Module):
    """A bounded function of state and time, as a stand-in of a trained network."""

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """Return the output."""
        return torch.tanh(0.7 * x + t.reshape(-1, 1, 1) - 0.3)


@pytest.mark.parametrize(
    ("spacing", "steps"), [("leading", 100), ("leading", 16), ("leading", 7), ("trailing", 10), ("trailing", 100)]
)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_diffusers_gives_the_same_chunk(
    steps: int, spacing: str, prediction: str, eta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDPMScheduler and DDIMScheduler, squaredcos_cap_v2, clip_sample, on the same start and step noise.

    DDIMScheduler re-derives eps from the clipped x0 when asked to (use_clipped_model_output), DDPMScheduler always.
    Its tables are float32, hence 2e-4 after 100 steps.  Trailing steps are divisors of 100: elsewhere diffusers steps
    to another level (t − 100 // steps) than it visits next.
    """
    from diffusers import DDIMScheduler, DDPMScheduler
    from diffusers.schedulers import scheduling_ddpm

    trailing = spacing == "trailing"
    grid = diffusion_grid(100, steps, trailing=trailing)
    denoiser = Denoiser(_Wave(), GaussianProcess(squaredcos(100)), prediction, eps_floor=-float("inf"))
    table = step_table(denoiser, grid, Ddim(eta), limit=1.0)
    shape = (3, 8, ACTION)
    start, noise = NOISE.normal(shape), step_noise(table, shape, NOISE)
    times = torch.tensor(table.times)
    ours = run(table, lambda x, t: denoiser.network(x, t.expand(3)), list(times), start.clone(), noise)

    common: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True, "timestep_spacing": spacing}
    names = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
    kind = DDPMScheduler if eta else DDIMScheduler
    scheduler = kind(num_train_timesteps=100, prediction_type=names[prediction], **common)
    scheduler.set_timesteps(steps)
    draws = itertools.chain(noise or (), itertools.repeat(torch.zeros(shape)))  # it draws for the last step too
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, **k: next(draws))
    extra = {} if eta else {"use_clipped_model_output": True}
    x = start
    for k in scheduler.timesteps:
        output = denoiser.network(x, ((k + 1) / 100).expand(3))
        x = scheduler.step(output, k, x, **extra).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-4)


def test_schedule_is_that_of_diffusers() -> None:
    """alphas_cumprod of squaredcos_cap_v2 to the float32 rounding of a product of 100 factors."""
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    ours = torch.tensor(squaredcos(100).a) ** 2
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)
    assert float(ours[-1]) == pytest.approx(2.43e-7, rel=2e-3)  # docs/methods/gpc.md#noise-levels


def test_keyed_draws_are_the_single_draws() -> None:
    """`draws` is one hash for what the loop of `sample` draws one by one."""
    many = NOISE.draws([1, 4]).normal((6, 2, 3))
    assert torch.equal(many[:3], Keyed(NOISE.keys, 1).normal((3, 2, 3)))
    assert torch.equal(many[3:], Keyed(NOISE.keys, 4).normal((3, 2, 3)))


@pytest.mark.parametrize(("kind", "backbone"), [("flow", "unet"), ("diffusion", "mlp"), ("diffusion", "transformer")])
def test_saved_policy_is_the_same_to_the_bit(kind: str, backbone: str, tmp_path: Path) -> None:
    """Weights, normalisers, limits and options come back."""
    policy = small_policy(kind, backbone, image=True, inference_steps=5)
    policy.save_pretrained(tmp_path / "policy")
    again = load_policy(tmp_path / "policy")
    assert type(again) is type(policy) and again.config == policy.config and again.spec == policy.spec
    seen = history(policy)
    assert torch.equal(policy.sample_chunk(seen, NOISE), again.sample_chunk(seen, NOISE))


def test_a_run_folder_is_a_policy(tmp_path: Path) -> None:
    """`final/` is found; a run without it says what to do."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(UsageError, match="not finished"):
        load_policy(tmp_path / "run")
    small_policy("flow", "mlp").save_pretrained(tmp_path / "run" / "final")
    assert isinstance(load_policy(tmp_path / "run"), FlowPolicy)


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        ("no config", "config.json|no policy"),
        ("no weights", "no model.safetensors"),
        ("cut weights", "model.safetensors' is damaged"),
        ("bad json", "config.json' is damaged"),
        ("other class", "not a policy"),
        ("other size", "other shape"),
        ("unknown option", "no option 'colour'"),
        ("no normaliser", "normaliser"),
    ],
)
def test_damaged_folders_say_so_in_one_line(harm: str, text: str, tmp_path: Path) -> None:
    """Each kind of damage is one UsageError that names the file."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "policy"
    small_policy("flow", "mlp").save_pretrained(folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    table = json.loads(config.read_text())
    match harm:
        case "no config":
            config.unlink()
        case "no weights":
            weights.unlink()
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:200])
        case "bad json":
            config.write_text("{")
        case "other class":
            config.write_text(json.dumps({**table, "_class_name": "Transformer"}))
        case "other size":
            config.write_text(json.dumps({**table, "policy": {**table["policy"], "width": 48}}))
        case "unknown option":
            config.write_text(json.dumps({**table, "policy": {**table["policy"], "colour": 1}}))
        case _:
            tensors = {k: v for k, v in load_file(weights).items() if "normalizer.state" not in k}
            save_file(tensors, weights)
    with pytest.raises(UsageError, match=text) as caught:
        load_policy(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value) or harm == "no normaliser"


def test_user_code_is_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """package.module:make_policy is called; what is no policy is refused."""
    (tmp_path / "my_robot_code.py").write_text(
        "class P:\n    def reset(self, rows=None, seeds=None): pass\n"
        "    def select_action(self, observation, rows=None): return 1\n\n\nclass Q:\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_policy("my_robot_code:P").select_action({}) == 1
    with pytest.raises(UsageError, match="without reset"):
        load_policy("my_robot_code:Q")
    with pytest.raises(UsageError, match="no policy at"):
        load_policy(tmp_path / "nowhere")


def test_actions_beyond_the_data_are_clipped_and_counted() -> None:
    """Without x0 clipping a chunk leaves the data's limits; it is brought back and the numbers are counted."""
    policy = small_policy("flow", "mlp")
    wild = torch.tensor([[[0.0, 2.0, -0.5], [-3.0, 0.9, 1.0]]])  # normalised; limits are ±1
    made = policy.finish(wild)
    assert torch.equal(made, torch.tensor([[[1.0, 3.0, 0.0], [-1.0, 2.8, 3.0]]]))
    assert (policy.clipped, policy.drawn) == (2, 6)
    free = small_policy("flow", "mlp", limits="none")
    assert float(free.finish(wild).max()) == 5.0 and free.drawn == 0


def test_chunks_do_not_depend_on_the_batch() -> None:
    """Row by row and together: the same noise, the same chunk, to the rounding of another matrix product."""
    policy = small_policy("diffusion", "unet", image=True, sampler="ddpm")
    seen = history(policy)
    together = policy.sample_chunk(seen, NOISE)
    for row in range(3):
        alone = policy.sample_chunk({k: v[row : row + 1] for k, v in seen.items()}, Keyed(NOISE.keys[row : row + 1]))
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=2e-4)


def test_select_action_takes_gymnasium_observations() -> None:
    """One observation gives [A], two give [2 A]; the queue serves n_action steps before the next chunk."""
    policy = small_policy("diffusion", "mlp", image=True)
    seen = {"state": np.zeros(STATE, np.float32), "eye": np.zeros((24, 32, 3), np.uint8)}
    policy.reset()
    actions = [policy.select_action(seen) for _ in range(5)]
    assert actions[0].shape == (ACTION,) and policy.drawn == 2 * 8 * ACTION
    policy.reset(seeds=[0])
    assert np.array_equal(policy.select_action(seen), actions[0])
    assert policy.select_action({k: np.stack([v, v]) for k, v in seen.items()}).shape == (2, ACTION)
    with pytest.raises(UsageError, match="no 'eye'"):
        policy.select_action({"state": seen["state"]})


def test_policies_are_parents_of_compositions() -> None:
    """The contract of composition, and one schedule object, so that equal policies need no conversion."""
    first, second = small_policy("diffusion", "mlp"), small_policy("diffusion", "unet")
    assert isinstance(first, ParentModel)
    assert first.denoiser.process.schedule is second.denoiser.process.schedule


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: small_policy("flow", "resnet"), "backbone = 'resnet'"),
        (lambda: small_policy("flow", "unet", width=12), "no multiple of 8"),
        (lambda: small_policy("flow", "unet", depth=5), "no multiple of 16"),
        (lambda: small_policy("flow", "transformer", width=40), "no multiple of 32"),
        (lambda: DiffusionPolicyConfig(prediction="velocity"), "prediction = 'velocity'"),  # type: ignore[arg-type]
        (lambda: DiffusionPolicyConfig(inference_steps=101), "at most as many"),
        (lambda: FlowPolicyConfig(crop=0.0), "crop"),
        (lambda: FlowPolicyConfig(limits="env"), "limits = 'env'"),  # type: ignore[arg-type]
        (lambda: DiffusionPolicy(*_parts(), FlowPolicyConfig(), _norms(1)), "takes a DiffusionPolicyConfig"),
        (lambda: DiffusionPolicy(*_parts(), DiffusionPolicyConfig(), _norms(2)), "must be there and have 1"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, text: str) -> None:
    """One line that names the option; configurations raise ValueError, which `build` turns into a UsageError."""
    with pytest.raises((UsageError, ValueError), match=text):
        make()


def _parts() -> tuple[PolicySpec]:
    return (PolicySpec({"state": (1,)}, 1, 8, 1, 4),)


def _norms(size: int) -> dict[str, Normalizer]:
    one = Normalizer(torch.zeros(1), torch.ones(1))
    return {"state": one, "action": Normalizer(torch.zeros(size), torch.ones(size))}
