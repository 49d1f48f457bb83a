"""A method from outside the package: the contract, how it is found, and what is said of one that is none."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gencontrol.algorithms.base import StepContext
from gencontrol.config import build
from gencontrol.errors import UsageError
from gencontrol.models.roles import Roles
from gencontrol.registry import ALGORITHMS, find
from gencontrol.sampling import make_step
from gencontrol.sampling.steps import GaussianStep
from gencontrol.testing import AlgorithmContract
from tests.helpers.dragon_worlds import FirstAxis, make_task

EXAMPLE = Path(__file__).parents[2] / "examples/raft.py"


@pytest.fixture(scope="module", autouse=True)
def _examples_on_the_path() -> Any:
    sys.path.insert(0, str(EXAMPLE.parent))
    yield
    sys.path.remove(str(EXAMPLE.parent))


class TestRaft(AlgorithmContract):
    """Half of groups of four."""

    def make(self) -> Any:
        kind = find(ALGORITHMS, "raft:Raft", "algorithm")
        config = kind.Config(prompts_per_round=6, generations=4, updates_per_round=2, demo_steps=4, keep=0.5)
        task = make_task()
        return kind(task, FirstAxis(), config, roles=Roles(task.denoiser.network), seed=0)


class Midpoint(GaussianStep):
    """An own sampler step: the ODE by the midpoint rule."""

    order, evaluations = 2, 2

    def __call__(self, model: Any, state: Any, t: float, t_next: float, cond: Any, noise: Any) -> Any:
        half = state.x + (t_next - t) / 2 * model(state.x, t, cond).velocity
        return replace(state, x=state.x + (t_next - t) * model(half, (t + t_next) / 2, cond).velocity)


def test_an_own_sampler_step_is_one_class_and_one_line() -> None:
    config = {"sampler": f"{__name__}:Midpoint", "prompts_per_round": 6, "demo_steps": 4, "eval_steps": 4}
    ctx = StepContext(seed=0, step=0, micro_batch=100)
    pools = {}
    for sampler in (config["sampler"], "euler"):
        kind, task = find(ALGORITHMS, "rwr", "algorithm"), make_task()
        options = build(kind.Config, config | {"sampler": sampler}, "algorithm")
        pools[sampler] = kind(task, FirstAxis(), options, roles=Roles(task.denoiser.network), seed=0).draw(ctx)[0]
    mine, euler = (pool.latents for pool in pools.values())
    assert mine.isfinite().all() and 0 < float((mine - euler).abs().max()) < 1
    with pytest.raises(UsageError, match="'collections:Counter' is none"):
        make_step("collections:Counter", task.denoiser.process)


def test_raft_is_short() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 40


def test_what_is_said_of_a_class_that_is_no_algorithm() -> None:
    with pytest.raises(UsageError, match="'collections:Counter' has no Config; an algorithm is a class with Config"):
        find(ALGORITHMS, "collections:Counter", "algorithm")
    with pytest.raises(UsageError, match="unknown algorithm 'dragn'.*dragon.*package.module:Name"):
        find(ALGORITHMS, "dragn", "algorithm")


@pytest.mark.parametrize(
    ("method", "old", "new"),
    [
        ("dragon", "pairs_per_round", "prompts_per_round"),
        ("draft", "anchor", "kl_coef"),
        ("flow-grpo", "kl", "path_kl_coef"),
        ("ctrl", "kl", "kl_reduction"),
        ("ddpo", "clip_ratio", "clip_range"),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(method: str, old: str, new: str) -> None:
    with pytest.raises(UsageError, match=f"'{old}' is now called '{new}'"):
        build(find(ALGORITHMS, method, "algorithm").Config, {old: 1}, "algorithm")
