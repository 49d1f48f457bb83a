"""A method from outside the package: the contract, how it is found, and what is said of one that is none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from gencontrol.config import build
from gencontrol.errors import UsageError
from gencontrol.models.roles import Roles
from gencontrol.registry import ALGORITHMS, find
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
