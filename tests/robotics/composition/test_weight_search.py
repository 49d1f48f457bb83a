"""fit_weights: deterministic, on disjoint seeds, with equal seeds for every arm, and honest about what it found."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from gencontrol.errors import UsageError
from gencontrol.reports.charts import svg_file
from gencontrol.reports.evaluation import weights_chart
from gencontrol.robotics.compose import ComposedPolicy, fit_weights
from gencontrol.robotics.composition.mixing import best_weights
from gencontrol.robotics.composition.weight_search import Arm, simplex_grid
from tests.helpers.composition_parents import parent


def policy(count: int = 2) -> ComposedPolicy:
    parents = {f"p{i}": parent(0.1 * i) for i in range(count)}
    return ComposedPolicy(parents, [1.0, *[0.0] * (count - 1)])


class World:
    """Success of a seed if its difficulty lies below a rate that peaks at w1 = 0.7."""

    def __init__(self, height: float = 0.6) -> None:
        self.height = height
        self.asked: list[tuple[tuple[float, ...], tuple[int, ...]]] = []

    def __call__(self, composed: ComposedPolicy, seeds: Sequence[int]) -> list[bool]:
        self.asked.append((tuple(composed.weights), tuple(seeds)))
        rate = 0.3 + self.height * max(0.0, 1 - abs(composed.weights[0] - 0.7) / 0.4)
        return [float(np.random.default_rng(seed).random()) < rate for seed in seeds]


VALIDATION, TEST = range(100), range(1000, 1200)


@pytest.mark.parametrize("method", ["grid", "halving", "bandit"])
def test_it_finds_the_peak_and_reports_fresh_seeds(method: str) -> None:
    world = World()
    fit = fit_weights(policy(), validation_seeds=VALIDATION, test_seeds=TEST, method=method, rollouts=world)
    assert abs(fit.best[0] - 0.7) < 0.11
    assert fit.rate.value == pytest.approx(0.9, abs=0.1) and fit.interval[0] < fit.rate.value < fit.interval[1]
    assert fit.gain.low > 0.2 and set(fit.test) == {"composed", "p0", "p1"}
    assert len(fit.test["composed"]) == len(TEST)
    # the search met validation seeds alone, and every arm the same ones in the same order
    *search, composed, first, second = world.asked
    assert {seed for _, seeds in search for seed in seeds} <= set(VALIDATION)
    assert composed[1] == first[1] == second[1] == tuple(TEST)
    for arm in fit.arms:
        met = [seed for weights, seeds in search if weights == arm.weights for seed in seeds]
        assert met == list(VALIDATION)[: len(arm.outcomes)]


@pytest.mark.parametrize("method", ["grid", "halving", "bandit"])
def test_it_is_a_function_of_its_arguments(method: str) -> None:
    fits = [
        fit_weights(policy(), validation_seeds=VALIDATION, test_seeds=TEST, method=method, rollouts=World())
        for _ in range(2)
    ]
    assert fits[0] == fits[1] and fits[0].gain == fits[1].gain and fits[0].table() == fits[1].table()


def test_halving_and_bandit_need_fewer_rollouts_than_the_grid() -> None:
    spent = {}
    for method in ("grid", "halving", "bandit"):
        world = World()
        fit = fit_weights(policy(3), validation_seeds=VALIDATION, test_seeds=TEST, method=method, rollouts=world)
        spent[method] = sum(len(arm.outcomes) for arm in fit.arms)
    assert spent["grid"] == 66 * 100 and spent["halving"] < spent["grid"] / 3
    assert spent["bandit"] <= spent["halving"] + 66


def test_without_an_effect_the_validation_best_is_inflated_and_the_report_is_not() -> None:
    """docs/methods/gpc.md#p1: best of 11 arms that are all equal looks better than it is; fresh seeds tell."""
    gaps, fresh = [], []
    for trial in range(20):
        outcomes = np.random.default_rng(trial)
        fit = fit_weights(
            policy(),
            validation_seeds=range(100),
            test_seeds=range(1000, 1100),
            method="grid",
            rollouts=lambda composed, seeds, draw=outcomes: list(draw.random(len(seeds)) < 0.65),
        )
        chosen = next(arm for arm in fit.arms if arm.weights == fit.best)
        gaps.append(chosen.rate.value - 0.65)
        fresh.append(fit.rate.value - 0.65)
    # standard errors of the means: .011
    assert np.mean(gaps) == pytest.approx(0.074, abs=0.03) and abs(np.mean(fresh)) < 0.035


def test_overlapping_or_repeated_seeds_are_refused() -> None:
    world = World()
    with pytest.raises(UsageError, match="seed 99 is a validation and a test seed"):
        fit_weights(policy(), validation_seeds=range(100), test_seeds=range(99, 200), rollouts=world)
    with pytest.raises(UsageError, match="none twice"):
        fit_weights(policy(), validation_seeds=[1, 1], test_seeds=[2], rollouts=world)
    assert world.asked == []


@pytest.mark.parametrize(
    "change, match",
    [
        ({"method": "annealing"}, "unknown method"),
        ({"step": 0.3}, "divide 1"),
        ({"rollouts": None}, "give env, or rollouts"),
        ({"rollouts": lambda composed, seeds: [True]}, "1 outcomes for"),
    ],
)
def test_wrong_arguments_are_refused(change, match: str) -> None:
    given = {"validation_seeds": VALIDATION, "test_seeds": TEST, "rollouts": World(), **change}
    with pytest.raises(UsageError, match=match):
        fit_weights(policy(), **given)


@pytest.mark.parametrize("parents, step", [(2, 0.1), (3, 0.1), (4, 0.25)])
def test_the_grid_holds_every_weighting_once(parents: int, step: float) -> None:
    grid = simplex_grid(parents, step)
    count = round(1 / step)
    assert len(grid) == len(set(grid)) == math.comb(count + parents - 1, parents - 1)
    assert all(sum(arm) == pytest.approx(1) and min(arm) >= 0 for arm in grid)
    corners = [arm for arm in grid if max(arm) == 1.0]
    assert len(corners) == parents
    with pytest.raises(UsageError, match="more than 1000"):
        simplex_grid(6, 0.05)


def test_table_json_and_picture() -> None:
    fit = fit_weights(policy(), validation_seeds=range(40), test_seeds=range(50, 80), method="grid", rollouts=World())
    text = fit.table()
    assert "not a result" in text and "30 fresh seeds" in text and text.count("\n| ") >= 11 + 3
    value = json.loads(fit.to_json())
    assert value["best"] == list(fit.best) and len(value["test"]["composed"]) == 30
    assert value["gain"]["value"] == pytest.approx(fit.gain.value)
    rows = [(arm.weights[0], arm.rate.value, arm.rate.low, arm.rate.high) for arm in fit.arms]
    picture = ElementTree.fromstring(svg_file([weights_chart(rows, 3, "<a> & b", fit.method)]))
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}circle"))) == 11


def test_the_score_of_an_arm_has_the_exact_interval() -> None:
    rate = Arm((1.0, 0.0), (True,) * 8 + (False,) * 2).rate
    assert (rate.low, rate.high) == pytest.approx((0.4439, 0.9748), abs=1e-4)


# ---- Prop. 4.1 --------------------------------------------------------------------------------------------------


def test_the_closed_form_of_two_parents() -> None:
    weights = best_weights(torch.tensor([[1.0, 0.4], [0.4, 1.5]]))
    assert float(weights[0]) == pytest.approx(0.6471, abs=1e-4)
    gram = torch.tensor([[1.0, 0.4], [0.4, 1.5]]).double()
    assert float(weights @ gram @ weights) == pytest.approx(0.7882, abs=1e-4)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("parents", [2, 3])
def test_the_best_weights_are_those_of_a_search(seed: int, parents: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    errors = torch.randn(parents, 4, generator=generator, dtype=torch.float64) + 0.8 * torch.randn(
        1, 4, generator=generator, dtype=torch.float64
    )
    gram = errors @ errors.T
    weights = best_weights(gram)
    assert float(weights.sum()) == pytest.approx(1) and bool((weights >= 0).all())
    grid = torch.tensor(simplex_grid(parents, 0.01 if parents == 2 else 0.025), dtype=torch.float64)
    values = torch.einsum("ni,ij,nj->n", grid, gram, grid)
    assert float(weights @ gram @ weights) <= float(values.min()) + 1e-12
    assert float((weights - grid[values.argmin()]).abs().max()) < 0.03


def test_a_parent_that_adds_nothing_gets_no_weight() -> None:
    """C ≥ min(A, B): the optimum is the better parent alone, which the paper's strictness condition overlooks."""
    assert best_weights(torch.tensor([[1.0, 1.2], [1.2, 4.0]])).tolist() == [1.0, 0.0]
    assert best_weights(torch.tensor([[4.0, 1.2], [1.2, 1.0]])).tolist() == [0.0, 1.0]
    for order in itertools.permutations(range(3)):
        gram = torch.diag(torch.tensor([1.0, 2.0, 4.0]))[list(order)][:, list(order)]
        expected = torch.tensor([4.0, 2.0, 1.0])[list(order)] / 7
        torch.testing.assert_close(best_weights(gram).float(), expected)
