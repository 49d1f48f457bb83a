"""Controls against closed forms, and how often they call the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gencontrol.models import Denoiser, EnumerableTokens, GaussianMixture
from gencontrol.models.denoiser import TokenPred
from gencontrol.process import VP, Cosine, Edm, GaussianProcess, Linear, MaskedProcess, Table
from gencontrol.rng import Keyed
from gencontrol.sampling import State, cfg, clip_x0, compose, inpaint, own_conditions, retime, sample, score_shift, sde

SCHEDULES = {
    "linear": Linear(),
    "shifted": Linear(3.0),
    "cosine": Cosine(),
    "vp": VP(),
    "edm": Edm(),
    "table": Table.from_alphas_cumprod([0.99, 0.8, 0.5, 0.2, 0.05]),
}
TIMES = [0.15, 0.5, 0.8, torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)]


def mixture(schedule, shift: float = 0.0) -> GaussianMixture:
    means = torch.tensor([[1.0 + shift, 0.5], [-1.0, -0.5 + shift]])
    covariances = torch.tensor([[[0.5, 0.2], [0.2, 0.3]], [[0.2, -0.1], [-0.1, 0.6]]])
    return GaussianMixture(means, covariances, torch.tensor([0.3, 0.7]), GaussianProcess(schedule))


def one(schedule, mean: list[float], covariance: list[list[float]]) -> GaussianMixture:
    return GaussianMixture(torch.tensor([mean]), torch.tensor([covariance]), torch.ones(1), GaussianProcess(schedule))


def points() -> Tensor:
    return torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Counting(nn.Module):
    """Counts calls and remembers batch sizes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.process, self.batches = model, model.process, []

    def forward(self, xt: Tensor, t, cond=None):
        self.batches.append(len(xt))
        return self.model(xt, t, cond)


def reached(source: str, target: str, t) -> bool:
    """Whether the source schedule has the target's signal-to-noise ratio at t."""
    inside = SCHEDULES[target].logsnr(torch.as_tensor(t, dtype=torch.float64))
    ends = SCHEDULES[source].logsnr(torch.tensor([1.0, 0.0], dtype=torch.float64))
    return bool((inside >= ends[0]).all() & (inside <= ends[1]).all())


PAIRS = [(s, g, t) for s in SCHEDULES for g in SCHEDULES for t in TIMES if reached(s, g, t)]


@pytest.mark.parametrize(("source", "target", "t"), PAIRS, ids=str)
def test_retimed_mixture_is_the_mixture_of_the_other_process(source: str, target: str, t) -> None:
    process = GaussianProcess(SCHEDULES[target])
    found, expected = retime(mixture(SCHEDULES[source]), process)(points(), t), mixture(SCHEDULES[target])(points(), t)
    for name in ("x0", "eps", "velocity", "score"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("source", SCHEDULES)
def test_retimed_ends_are_finite_and_near(source: str) -> None:
    found, expected = (
        model(points(), 1.0).x0
        for model in (retime(mixture(SCHEDULES[source]), GaussianProcess(Linear())), mixture(Linear()))
    )
    # the noisiest ratio that the source reaches: a/s = 0.23 for the table, below 0.02 for the others
    torch.testing.assert_close(found, expected, rtol=0, atol=0.6 if source == "table" else 0.1)


def test_retimed_denoiser_samples_like_the_original() -> None:
    model = mixture(VP())
    x = sample(
        retime(model, GaussianProcess(Linear())),
        (2000, 2),
        steps=40,
        step="heun",
        generator=torch.Generator().manual_seed(0),
    )
    exact = model.weights @ model.means
    # standard error of a mean of 2000 draws with variance about 1.5: 0.027
    torch.testing.assert_close(x.double().mean(0), exact, rtol=0, atol=0.1)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("t", TIMES, ids=["0.15", "0.5", "0.8", "per-item"])
def test_cfg_extrapolates_the_score(name: str, t) -> None:
    model = Counting(mixture(SCHEDULES[name]))
    cond = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 2.0]], dtype=torch.float64)
    found = cfg(model, 2.5, torch.ones(1, 2, dtype=torch.float64))(points(), t, cond)
    assert model.batches == [6]
    free, given = model.model(points(), t), model.model(points(), t, cond)
    for coordinate in ("x0", "eps", "score", "velocity"):
        a, b = getattr(free, coordinate), getattr(given, coordinate)
        torch.testing.assert_close(getattr(found, coordinate), a + 2.5 * (b - a), rtol=1e-7, atol=1e-7)


def test_cfg_of_gaussians_is_the_gaussian_of_the_closed_form() -> None:
    # both laws N(m, v) at time t share v: the guided score is that of N(m_u + w(m_c - m_u), v)
    means, covariance = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 0.4 * torch.eye(2).repeat(2, 1, 1)
    model = GaussianMixture(means, covariance, torch.ones(2), GaussianProcess(Cosine()))
    only = lambda k: torch.nn.functional.one_hot(torch.tensor([k] * 3), 2).double()  # noqa: E731
    found = cfg(model, 3.0, only(0)[:1])(points(), 0.4, only(1))
    expected = one(Cosine(), [-2.0, 3.0], [[0.4, 0.0], [0.0, 0.4]])(points(), 0.4)
    torch.testing.assert_close(found.x0, expected.x0, rtol=1e-9, atol=1e-9)


def test_cfg_edges() -> None:
    model = Counting(mixture(Linear()))
    cond, empty = torch.tensor([[1.0, 0.0]] * 3), torch.ones(1, 2)
    assert torch.equal(cfg(model, 1.0, empty)(points(), 0.5, cond).x0, model.model(points(), 0.5, cond).x0)
    assert model.batches == [3]
    two = cfg(model, 2.0, None)(points(), 0.5, cond)
    assert model.batches[1:] == [3, 3]
    torch.testing.assert_close(two.x0, cfg(model, 2.0, empty)(points(), 0.5, cond).x0)
    torch.testing.assert_close(cfg(model, 0.0, empty)(points(), 0.5, cond).x0, model.model(points(), 0.5).x0)
    with pytest.raises(ValueError, match="finite"):
        cfg(model, float("nan"), empty)


def test_cfg_of_nested_conditions() -> None:
    class Net(nn.Module):
        def forward(self, xt: Tensor, t: Tensor, cond) -> Tensor:
            return xt * cond["a"] + cond["b"]["c"].sum(1, keepdim=True)

    model = Denoiser(Net(), GaussianProcess(Linear()), "velocity")
    cond = {"a": torch.full((3, 1), 2.0), "b": {"c": torch.ones(3, 4)}}
    uncond = {"a": torch.zeros(1, 1), "b": {"c": torch.zeros(1, 4)}}
    x = points().float()
    torch.testing.assert_close(cfg(model, 1.5, uncond)(x, 0.5, cond).velocity, 1.5 * (2 * x + 4))


def tokens(seed: int) -> EnumerableTokens:
    table = torch.rand(3, 3, generator=torch.Generator().manual_seed(seed)) ** 2
    return EnumerableTokens(table, MaskedProcess(3, 3))


def test_cfg_and_compose_of_tokens() -> None:
    model, x = tokens(0), torch.tensor([[3, 1], [3, 3]])
    factor = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(1))
    found = cfg(model, 2.0, torch.ones(1, 3, 3))(x, 0.5, factor)
    free, given = model(x, 0.5).log_probs, model(x, 0.5, factor).log_probs
    # the visible position is a sure token: -inf stays -inf
    assert bool((torch.isneginf(found.logits) == torch.isneginf(given)).all())
    torch.testing.assert_close(found.log_probs[1], torch.log_softmax(2 * given[1] - free[1], -1))
    other = tokens(5)
    mixed = compose([model, other], [0.25, 0.75])(x, 0.5)
    expected = torch.log_softmax(0.25 * model(x, 0.5).log_probs[1] + 0.75 * other(x, 0.5).log_probs[1], -1)
    torch.testing.assert_close(mixed.log_probs[1], expected)


@pytest.mark.parametrize("name", SCHEDULES)
def test_composed_gaussians_have_the_product_score(name: str) -> None:
    # convex mix of scores of N(m1, S1) and N(m2, S2): precision Σ w·S⁻¹, mean its weighted solution
    schedule, t, weights = SCHEDULES[name], 0.5, (0.3, 0.7)
    models = one(schedule, [1.0, 0.0], [[0.5, 0.1], [0.1, 0.4]]), one(schedule, [-1.0, 2.0], [[0.2, 0.0], [0.0, 0.9]])
    c = schedule.at(t)
    precisions = [torch.linalg.inv(c.a**2 * m.covariances[0] + c.s**2 * torch.eye(2)) for m in models]
    precision = sum(w * p for w, p in zip(weights, precisions))
    mean = torch.linalg.solve(
        precision, sum(w * p @ (c.a * m.means[0]) for w, p, m in zip(weights, precisions, models))
    )
    found = compose(models, weights)(points(), t)
    torch.testing.assert_close(found.score, -(points() - mean) @ precision, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("other", ["cosine", "vp", "edm"])
@pytest.mark.parametrize("t", TIMES, ids=["0.15", "0.5", "0.8", "per-item"])
def test_composition_meets_at_equal_ratio_in_the_first_process(other: str, t) -> None:
    first, same = mixture(Linear()), mixture(Linear(), shift=1.0)
    composed = compose([first, mixture(SCHEDULES[other], shift=1.0)], [0.4, 0.6])
    assert composed.process is first.process
    expected = compose([first, same], [0.4, 0.6])(points(), t)
    torch.testing.assert_close(composed(points(), t).x0, expected.x0, rtol=1e-7, atol=1e-7)


def test_composition_skips_zero_weights_and_keeps_modules() -> None:
    models = [Counting(mixture(Linear())), Counting(mixture(VP()))]
    composed = compose(models, [1.0, 0.0])
    assert torch.equal(composed(points(), 0.5).x0, models[0].model(points(), 0.5).x0)
    assert models[1].batches == []
    assert sum(1 for _ in composed.buffers()) == sum(1 for m in models for _ in m.buffers())


@pytest.mark.parametrize("weights", [[0.5, 0.6], [1.2, -0.2], [1.0], []])
def test_composition_refuses_weights_that_are_not_convex(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        compose([mixture(Linear()), mixture(VP())], weights)


def test_composition_refuses_processes_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="mix"):
        compose([mixture(Linear()), tokens(0)], [0.5, 0.5])
    with pytest.raises(ValueError, match="MaskedProcess"):
        compose([tokens(0), EnumerableTokens(torch.ones(4, 4), MaskedProcess(4, 4))], [0.5, 0.5])
    with pytest.raises(ValueError, match="retime"):
        retime(tokens(0), GaussianProcess(Linear()))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    "t", [0.3, 0.8, torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)], ids=["0.3", "0.8", "items"]
)
def test_score_shift_by_the_exact_gradient_is_the_tilted_law(name: str, t) -> None:
    model, slope = mixture(SCHEDULES[name]), torch.tensor([0.6, -0.4])
    tilted = model.tilt(slope)
    found = score_shift(model, lambda pred, t, cond: tilted(pred.xt, t).score - pred.score)(points(), t)
    torch.testing.assert_close(found.x0, tilted(points(), t).x0, rtol=1e-7, atol=1e-7)
    half = score_shift(model, lambda pred, t, cond: torch.ones_like(pred.x0), 0.5)(points(), t)
    torch.testing.assert_close(half.score, model(points(), t).score + 0.5, rtol=1e-7, atol=1e-7)


def test_score_shift_follows_the_tilted_flow() -> None:
    model, slope = mixture(Linear()), torch.tensor([0.8, -0.4])
    tilted = model.tilt(slope)
    guided = score_shift(model, lambda pred, t, cond: tilted(pred.xt, t).score - pred.score)
    times = torch.linspace(0.95, 0.0, 8)
    x, expected = (sample(law, (3, 2), x_init=points(), times=times) for law in (guided, tilted))
    torch.testing.assert_close(x, expected, rtol=1e-7, atol=1e-7)
    assert torch.equal(guided(points(), 1.0).x0, model(points(), 1.0).x0)  # pure noise: nothing is added
    with pytest.raises(ValueError, match="Gaussian"):
        score_shift(tokens(0), lambda pred, t, cond: pred.raw)


def test_inpaint_fixes_x0_and_leaves_the_rest() -> None:
    model, known = mixture(VP()), torch.tensor([[5.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, False]])
    control = inpaint(model, known, mask)
    found, free = control(points(), 0.4), model(points(), 0.4)
    assert bool((found.x0[:, 0] == 5).all()) and torch.equal(found.x0[:, 1], free.x0[:, 1])
    c = VP().at(0.4)
    torch.testing.assert_close(c.a * found.x0 + c.s * found.eps, points())
    x = sample(control, (4, 2), steps=8, step="dpmpp2m", generator=torch.Generator().manual_seed(0))
    assert bool((x[:, 0] == 5).all())
    with pytest.raises(ValueError, match="bool"):
        inpaint(model, known, mask.float())


def test_inpaint_of_tokens() -> None:
    control = inpaint(tokens(0), torch.tensor([[2, 0]]), torch.tensor([[True, False]]))
    x = sample(control, (50, 2), steps=2, generator=torch.Generator().manual_seed(0))
    assert bool((x[:, 0] == 2).all()) and len(set(x[:, 1].tolist())) > 1


def test_controls_nest() -> None:
    model = mixture(VP())
    cond = torch.tensor([[1.0, 0.0]] * 4)
    stack = compose([cfg(retime(model, GaussianProcess(Edm())), 1.5, torch.ones(1, 2)), mixture(Linear())], [0.5, 0.5])
    x = sample(stack, (4, 2), steps=6, step="heun", cond=cond, generator=torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(x).all()) and isinstance(stack.process.schedule, Edm)
    assert isinstance(cfg(tokens(0), 2.0, None)(torch.tensor([[3, 3]]), 0.5), TokenPred)


@pytest.mark.parametrize("t", TIMES, ids=["0.15", "0.5", "0.8", "per-item"])
def test_composition_weights_by_log_snr_and_by_dimension(t) -> None:
    models = [mixture(Linear()), mixture(VP(), shift=1.0)]
    seen = []

    def weights(logsnr):
        seen.append(logsnr)
        first = logsnr.sigmoid() if isinstance(logsnr, torch.Tensor) else float(torch.tensor(logsnr).sigmoid())
        return [first, 1 - first]

    found = compose(models, weights)(points(), t)
    expected = 2 * Linear().coeffs(torch.as_tensor(t, dtype=torch.float64)).half_logsnr
    torch.testing.assert_close(torch.as_tensor(seen[0]).flatten().double(), expected.flatten())
    share = expected.sigmoid().reshape(-1, 1)
    preds = models[0](points(), t), retime(models[1], models[0].process)(points(), t)
    torch.testing.assert_close(found.x0, share * preds[0].x0 + (1 - share) * preds[1].x0, rtol=1e-6, atol=1e-6)
    by_dim = compose(models, [torch.tensor([1.0, 0.25]), torch.tensor([0.0, 0.75])])(points(), t)
    torch.testing.assert_close(by_dim.x0[:, 0], preds[0].x0[:, 0], rtol=1e-6, atol=1e-6)
    mixed = 0.25 * preds[0].x0[:, 1] + 0.75 * preds[1].x0[:, 1]
    torch.testing.assert_close(by_dim.x0[:, 1], mixed, rtol=1e-6, atol=1e-6)


def test_composition_with_a_condition_per_model() -> None:
    first, second = mixture(Linear()), mixture(Linear(), shift=1.0)
    conds = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.0, 1.0]] * 3)
    found = compose([first, second], [0.4, 0.6], own_conditions=True)(points(), 0.5, own_conditions(conds))
    expected = 0.4 * first(points(), 0.5, conds[0]).x0 + 0.6 * second(points(), 0.5, conds[1]).x0
    torch.testing.assert_close(found.x0, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "weights",
    [lambda s: [0.5, 0.6], lambda s: [1.0], [torch.tensor([0.5, 0.9]), torch.tensor([0.5, 0.2])]],
)
def test_composition_refuses_schedules_that_are_not_convex(weights) -> None:
    with pytest.raises(ValueError, match="weights"):
        compose([mixture(Linear()), mixture(VP())], weights)(points(), 0.5)
    with pytest.raises(ValueError, match="log-SNR"):
        compose([tokens(0), tokens(1)], lambda logsnr: [0.5, 0.5])(torch.tensor([[3, 3]]), 0.5)


def test_clip_x0_bounds_the_clean_prediction_and_rederives_the_noise() -> None:
    model, c = mixture(VP()), VP().at(0.4)
    found, free = clip_x0(model, 0.3)(points(), 0.4), model(points(), 0.4)
    assert float(free.x0.abs().max()) > 0.4
    assert torch.equal(found.x0, free.x0.clamp(-0.3, 0.3))
    torch.testing.assert_close(c.a * found.x0 + c.s * found.eps, points())
    with pytest.raises(ValueError, match="bound"):
        clip_x0(model, 0.0)
    with pytest.raises(ValueError, match="Gaussian"):
        clip_x0(tokens(0), 1.0)


def test_keyed_noise_has_a_counter_per_step() -> None:
    model, keys = mixture(VP()), torch.arange(3)
    found = sample(model, (3, 2), steps=4, step="sde", generator=Keyed(keys, 5), keep_path=True)
    x = model.process.prior((3, 2), Keyed(keys, 5))
    assert torch.equal(found.states[0], x)
    for index, (t, t_next) in enumerate(zip(found.times, found.times[1:])):
        x = sde()(model, State(x), t, t_next, None, Keyed(keys, 6 + index).normal((3, 2))).x
        assert torch.equal(found.states[index + 1], x)
