"""The loop: reproducibility per item, callbacks, paths, gradients, grids and errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gencontrol.errors import UsageError
from gencontrol.models import Denoiser, GaussianMixture
from gencontrol.process import VP, Cosine, Edm, GaussianProcess, Linear, MaskedProcess, Table
from gencontrol.rng import item_generators
from gencontrol.sampling import Path, cfg, compose, ddim, inpaint, make_step, sample, sde
from gencontrol.sampling.grids import make_grid


class Affine(nn.Module):
    """A small network with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.3))

    def forward(self, xt: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        out = self.gain * xt * (1 + t.reshape(-1, *[1] * (xt.ndim - 1)))
        return out if cond is None else out + cond


def denoiser(prediction: str = "velocity", schedule=None) -> Denoiser:
    return Denoiser(Affine(), GaussianProcess(schedule or Linear()), prediction)


@pytest.mark.parametrize("step", ["euler", "sde", "dpmpp2m"])
def test_a_sample_does_not_depend_on_its_batch(step: str, fenced_rng: None) -> None:
    many = sample(denoiser(), (5, 2, 3), steps=4, step=step, generator=item_generators(1, "a", range(5)))
    for item in (0, 3):
        one = sample(denoiser(), (1, 2, 3), steps=4, step=step, generator=item_generators(1, "a", [item]))
        torch.testing.assert_close(many[item : item + 1], one, rtol=1e-6, atol=1e-6)
    again = sample(denoiser(), (5, 2, 3), steps=4, step=step, generator=item_generators(1, "a", range(5)))
    assert torch.equal(many, again)


def test_single_euler_step_of_rectified_flow_is_x_minus_velocity() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    found = sample(denoiser(), (3, 4), steps=1, x_init=x)
    torch.testing.assert_close(found, x - 0.6 * x)


def test_path_holds_states_times_and_log_probs() -> None:
    path = sample(denoiser(), (2, 3), steps=5, step="sde", generator=torch.Generator().manual_seed(0), keep_path=True)
    assert isinstance(path, Path)
    assert path.states.shape == (6, 2, 3) and path.log_probs.shape == (5, 2)
    assert path.times == pytest.approx((1.0, 0.8, 0.6, 0.4, 0.2, 0.0))
    assert torch.equal(path.x, path.states[-1])
    for k in range(5):
        again = sde().log_prob(denoiser(), path.states[k], path.states[k + 1], path.times[k], path.times[k + 1])
        torch.testing.assert_close(path.log_probs[k], again)
    quiet = sample(denoiser(), (2, 3), steps=5, x_init=path.states[0], keep_path=True)
    assert quiet.log_probs is None


def test_the_loop_can_resume_from_any_state() -> None:
    path = sample(denoiser(), (2, 3), steps=6, generator=torch.Generator().manual_seed(0), keep_path=True)
    rest = sample(denoiser(), (2, 3), x_init=path.states[2], times=path.times[2:])
    assert torch.equal(rest, path.x)


def test_callback_sees_every_step_and_may_replace() -> None:
    seen = []

    def watch(index: int, t: float, x: Tensor) -> Tensor | None:
        seen.append((index, round(t, 6), tuple(x.shape)))
        return torch.zeros_like(x) if index == 1 else None

    path = sample(denoiser(), (2, 3), steps=3, x_init=torch.ones(2, 3), callback=watch, keep_path=True)
    assert seen == [(0, 0.666667, (2, 3)), (1, 0.333333, (2, 3)), (2, 0.0, (2, 3))]
    assert torch.equal(path.states[2], torch.zeros(2, 3)) and torch.equal(path.x, torch.zeros(2, 3))


def test_gradients_flow_through_the_last_steps_alone() -> None:
    model, x = denoiser(), torch.ones(1, 2)
    assert not sample(model, (1, 2), steps=4, x_init=x).requires_grad

    def gradient(count: int) -> float:
        out = sample(model, (1, 2), steps=4, x_init=x, grad_steps=count)
        return float(torch.autograd.grad(out.sum(), model.network.gain)[0])

    # x_k+1 = x_k·(1 - g·(1 + t_k)/4): the derivative of a product over the steps that keep their graph
    factors = [1 - 0.3 * (1 + t) / 4 for t in (1.0, 0.75, 0.5, 0.25)]
    product = factors[0] * factors[1] * factors[2] * factors[3]
    for count in (1, 2, 4):
        rates = [-(1 + t) / 4 / f for t, f in zip((1.0, 0.75, 0.5, 0.25), factors)]
        assert gradient(count) == pytest.approx(2 * product * sum(rates[4 - count :]), rel=1e-5)
    with torch.no_grad():
        assert not sample(model, (1, 2), steps=4, x_init=x, grad_steps=4).requires_grad


def test_inference_mode_around_the_loop() -> None:
    with torch.inference_mode():
        assert sample(denoiser(), (2, 3), steps=3, step="heun", generator=torch.Generator()).is_inference()


def test_condition_reaches_the_network() -> None:
    x, cond = torch.zeros(2, 3), torch.tensor([[1.0], [-1.0]])
    found = sample(denoiser(), (2, 3), steps=1, x_init=x, cond=cond)
    torch.testing.assert_close(found, -cond.expand(2, 3))


@pytest.mark.parametrize("schedule", [Linear(), Linear(3.0), Cosine(), VP(), Edm(), Table.from_sigmas([0.1, 1.0, 9.0])])
@pytest.mark.parametrize("times", ["uniform", "logsnr", "karras"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_grids_decrease_from_one_to_zero(schedule, times: str, steps: int) -> None:
    grid = make_grid(schedule, steps, times)
    assert len(grid) == steps + 1 and grid[0] == 1.0 and grid[-1] == 0.0
    assert all(a > b for a, b in zip(grid, grid[1:]))


def test_grids_are_uniform_in_their_coordinate() -> None:
    schedule = VP()
    inner = torch.tensor(make_grid(schedule, 20, "logsnr")[1:-1], dtype=torch.float64)
    gaps = schedule.logsnr(inner).diff()
    torch.testing.assert_close(gaps, gaps[:1].expand_as(gaps))
    inner = torch.tensor(make_grid(schedule, 20, "karras")[1:-1], dtype=torch.float64)
    gaps = torch.exp(-schedule.logsnr(inner) / 14).diff()
    torch.testing.assert_close(gaps, gaps[:1].expand_as(gaps))
    # on Edm all of Karras' grid is uniform in t
    assert make_grid(Edm(), 10, "karras") == pytest.approx(make_grid(Edm(), 10, "uniform"), abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"steps": 0}, "steps"),
        ({}, "steps"),
        ({"steps": 3, "step": "eulr"}, "euler"),
        ({"steps": 3, "step": "ancestral"}, "masked"),
        ({"steps": 3, "times": "karas"}, "karras"),
        ({"steps": 3, "times": [1.0, 0.5, 0.0]}, "2 steps"),
        ({"times": [0.5, 0.5, 0.0]}, "decreasing"),
        ({"times": [1.5, 0.0]}, "decreasing"),
        ({"steps": 3, "x_init": torch.zeros(1, 3)}, "x_init"),
        ({"steps": 3, "generator": [torch.Generator()]}, "generators"),
        ({"steps": 3, "grad_steps": -1}, "grad_steps"),
    ],
)
def test_wrong_requests_are_refused(arguments: dict, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        sample(denoiser(), (2, 3), **arguments)


def test_defaults_follow_the_process() -> None:
    assert type(make_step(None, GaussianProcess(Linear()))).__name__ == "Euler"
    assert type(make_step(None, MaskedProcess(3, 3))).__name__ == "Ancestral"
    with pytest.raises(UsageError, match="gaussian"):
        make_step("euler", MaskedProcess(3, 3))


def test_step_objects_are_accepted() -> None:
    model = GaussianMixture(torch.zeros(1, 2), torch.eye(2)[None], torch.ones(1), GaussianProcess(Linear()))
    x = torch.ones(2, 2)
    by_name, by_object = (sample(model, (2, 2), steps=3, step=s, x_init=x) for s in ("ddim", ddim()))
    assert torch.equal(by_name, by_object)


@pytest.mark.parametrize("step", ["euler", "heun", "ddim", "sde", "dpmpp2m"])
@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "velocity", "edm"])
@pytest.mark.parametrize("schedule", [Linear(), Cosine(), VP(), Edm()])
def test_every_type_on_every_schedule_stays_finite(step: str, prediction: str, schedule) -> None:
    out = sample(denoiser(prediction, schedule), (2, 3), steps=3, step=step, generator=torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(out).all()) and out.dtype == torch.float32


class Reads(TorchDispatchMode):
    """Counts reads of a tensor's value by Python (item, bool, float): each would stall an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("step", ["euler", "heun", "ddim", ddim(eta=1.0), "sde", "dpmpp2m"], ids=str)
@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "edm"])
def test_the_loop_reads_no_tensor(step, prediction: str) -> None:
    one, two = denoiser(prediction), denoiser(prediction, VP())
    model = inpaint(
        cfg(compose([one, two], [0.5, 0.5]), 2.0, torch.zeros(1, 1)), torch.zeros(1, 3), torch.ones(1, 3) > 0
    )
    sample(model, (2, 3), steps=3, step=step, cond=torch.ones(2, 1), generator=torch.Generator())  # fills the cache
    with Reads() as reads:
        sample(model, (2, 3), steps=3, step=step, cond=torch.ones(2, 1), generator=torch.Generator())
    assert reads.count == 0
    with Reads() as reads:
        float(torch.ones(()))
    assert reads.count == 1
