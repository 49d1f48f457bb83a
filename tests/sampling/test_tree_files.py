"""Trees that fail, stop, are stored, read, merged and tilted anew."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gencontrol.errors import DiskError, RewardError, UsageError
from gencontrol.models import EnumerableTokens, GaussianMixture
from gencontrol.process import GaussianProcess, Linear, MaskedProcess
from gencontrol.sampling import cfg, inpaint
from gencontrol.sampling.tree.nodes import hashes
from gencontrol.sampling.tree.rules import Boltzmann, Uct, Widening
from gencontrol.sampling.tree.store import fingerprint
from gencontrol.sampling.tree.tree import DiffusionTree
from gencontrol.types import RewardContext
from tests.helpers.tree_toys import Shrink, assert_equal, first, grown, snapshot

SMALL: dict[str, Any] = {"widening": "small", "leaf_batch": 4}


def words() -> EnumerableTokens:
    return EnumerableTokens(torch.arange(1.0, 244).reshape(3, 3, 3, 3, 3), MaskedProcess(3, 3))


def count(x: Tensor) -> Tensor:
    return x.double().sum(1)


MAKERS: dict[str, dict[str, Any]] = {
    "boltzmann": {"reward": first, "temperature": 0.3, **SMALL},
    "uct": {"reward": first, "select": Uct(0.7), "backup": "max", "widening": Widening(1.0, 0.6), "leaf_batch": 3},
    "guided": {"reward": first, "guidance": 0.5, "max_grad_norm": 1.0, "select": Boltzmann(0.5, 0.2), "leaf_batch": 4},
    "tokens": {"reward": count, "model": words(), "shape": (5,), "widening": "small", "leaf_batch": 3, "branch": "all"},
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_loaded_tree_goes_on_bit_for_bit(name: str, tmp_path: Path, fenced_rng: None) -> None:
    options = MAKERS[name]
    reward, model = options["reward"], options.get("model") or Shrink()
    whole, half = grown(0, **options), grown(0, **options)
    for _ in whole.build(200):
        pass
    for _ in half.build(200):
        if half.rounds == 4:
            break
    half.save(tmp_path / "a" / "tree.safetensors")
    loaded = DiffusionTree.load(tmp_path / "a" / "tree.safetensors", model, reward)
    assert_equal(half, loaded)
    assert loaded.config == half.config and loaded.chain.grid == half.chain.grid
    for _ in loaded.build(200 - loaded.nfe):
        pass
    assert_equal(whole, loaded)
    assert torch.equal(whole.sample(3), loaded.sample(3))
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["tree.safetensors"]  # nothing else is left behind


def failing(kind: str, after: int) -> Any:
    """A reward that fails in a call."""
    state = {"calls": 0}

    def reward(x: Tensor) -> Any:
        state["calls"] += 1
        if state["calls"] == after:
            if kind == "length":
                return first(x)[:-1]
            raise KeyboardInterrupt if kind == "interrupt" else MemoryError
        return first(x)

    return reward


@pytest.mark.parametrize("name", ["boltzmann", "uct", "guided", "tokens"])
def test_an_interrupted_round_leaves_no_trace(name: str) -> None:
    options = MAKERS[name]
    whole, broken = grown(200, **options), grown(0, **options)
    stops = iter([7, 12, 3])

    def poll() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    for stop in stops:
        left = 10**9
        for _ in broken.build(200 - broken.nfe, poll=poll):
            before = snapshot(broken)
            if left > 10**8 and broken.rounds >= 3:
                left = stop
                break
        before = snapshot(broken)
        with pytest.raises(KeyboardInterrupt):
            for _ in broken.build(200 - broken.nfe, poll=poll):
                before = snapshot(broken)
        assert_equal(before, broken)
    left = 10**9
    for _ in broken.build(200 - broken.nfe, poll=poll):
        pass
    assert_equal(whole, broken)


@pytest.mark.parametrize(("kind", "error"), [("length", RewardError), ("interrupt", KeyboardInterrupt)])
def test_a_reward_that_breaks_off_leaves_no_trace(kind: str, error: type[BaseException]) -> None:
    tree = grown(0, failing(kind, 4), **SMALL)
    before = snapshot(tree)
    with pytest.raises(error):
        for _ in tree.build(200):
            before = snapshot(tree)
    assert_equal(before, tree)
    for _ in tree.build(200 - tree.nfe):
        pass
    assert_equal(tree, grown(200, **SMALL))


def test_samples_that_cannot_be_scored_are_left_out() -> None:
    def flaky(x: Tensor) -> Tensor:
        if len(x) > 1 and bool((first(x) > 0.3).any()):
            raise ValueError("too bright\nsecond line")
        if bool((first(x) > 0.3).any()):
            raise ValueError("too bright\nsecond line")
        return torch.where(first(x) < -0.3, math.nan, first(x))

    tree = grown(400, flaky, reward_batch=3, **SMALL)
    leaves, ready = tree.leaves, tree.nodes["ready"][tree.leaves]
    x = first(tree.pools[-1].take(tree.nodes["row"][leaves], torch.device("cpu"))).numpy()
    assert np.array_equal(ready, np.abs(x) <= 0.3) and 0 < ready.sum() < len(ready)
    stats = tree.stats()
    assert stats["excluded"] == tree.scorer.excluded == (~ready).sum()
    assert sum(tree.scorer.reasons.values()) == stats["excluded"] and len(tree.scorer.reasons) == 2
    assert tree.reward_calls == len(leaves)
    assert np.abs(first(tree.sample(100))).max() <= 0.3 and len(tree.best(1000).rewards) == ready.sum()
    assert stats["log_z_base"] < 0.3  # of exp(r)·1(valid), not of exp(r) given valid


@pytest.mark.parametrize("how", ["nan", "raise"])
def test_a_reward_that_scores_nothing_stops_the_build(how: str) -> None:
    def dead(x: Tensor) -> Tensor:
        if how == "raise":
            raise ValueError("no server")
        return first(x) * math.nan

    with pytest.raises(RewardError, match="no server|NaN"):
        grown(2000, dead, **SMALL)
    with pytest.raises(RewardError, match="scored none"):
        grown(2000, dead, guidance=0.0, repeats=3, **SMALL)


def test_repeats_are_averaged_and_set_rewards_refused() -> None:
    turn = iter(range(10**6))

    def noisy(x: Tensor) -> Tensor:
        return first(x) + (-1.0) ** next(turn)

    tree, plain = grown(200, noisy, repeats=2, **SMALL), grown(200, **SMALL)
    np.testing.assert_allclose(tree.nodes["value"], plain.nodes["value"], atol=1e-6)
    assert tree.reward_calls == 2 * plain.reward_calls

    class Whole:
        name, kind, differentiable = "whole", "set", False

        def __call__(self, samples: Any, context: Any) -> Any:
            raise AssertionError

    with pytest.raises(UsageError, match="whole sets"):
        grown(0, Whole())


def by_hand(tree: DiffusionTree, rewards: np.ndarray, lam: float) -> np.ndarray:
    """Soft values of all nodes from leaf rewards, node by node from the youngest on."""
    value = np.zeros(tree.nodes.size)
    value[tree.leaves] = rewards
    children: dict[int, list[int]] = {}
    for node in range(tree.nodes.size - 1, -1, -1):
        if node in children:
            each = np.array(children[node])
            edges = tree.nodes["edge"][each].astype(np.float64)
            value[node] = np.log(np.mean(np.exp(lam * value[each] + edges))) / lam
        children.setdefault(int(tree.nodes["parent"][node]), []).append(node)
    return value


@pytest.mark.parametrize("name", ["boltzmann", "guided"])
def test_retilt_equals_a_backup_by_hand(name: str, tmp_path: Path) -> None:
    tree = grown(300, **MAKERS[name])
    rewards, nfe, old = tree.nodes["value"][tree.leaves].copy(), tree.nfe, tree.config.temperature
    assert tree.retilt(temperature=0.7) is tree
    np.testing.assert_allclose(tree.nodes["value"], by_hand(tree, rewards, 1 / 0.7), rtol=1e-9, atol=1e-12)
    base = np.exp(tree.rollout_weights()[tree.rollouts["start"] == 0])
    assert tree.stats()["log_z_base"] == pytest.approx(math.log(base.mean()), rel=1e-9)
    if name == "guided":
        with pytest.raises(UsageError, match="gradient"):
            tree.retilt(reward=lambda x: -first(x))
    else:
        tree.retilt(reward=lambda x: -first(x))
        np.testing.assert_allclose(tree.nodes["value"], by_hand(tree, -rewards, 1 / 0.7), rtol=1e-6, atol=1e-9)
        assert tree.counts["best"][0] == pytest.approx(-rewards.min()) and tree.nfe == nfe
        tree.retilt(reward=first)
    # and back: nothing was lost
    tree.retilt(temperature=old)
    np.testing.assert_allclose(tree.nodes["value"], grown(300, **MAKERS[name]).nodes["value"], rtol=1e-9, atol=1e-12)
    tree.retilt(temperature=0.7).save(tmp_path / "t")
    again = DiffusionTree.load(tmp_path / "t", Shrink(), first)
    for each in (tree, again):
        for _ in each.build(60):
            pass
    assert_equal(tree, again)


def test_a_retilt_that_fails_changes_nothing() -> None:
    tree = grown(300, **SMALL)
    before = snapshot(tree)

    def dead(x: Tensor) -> Tensor:
        return first(x) * math.nan

    for error, options in (
        (UsageError, {"temperature": 0.0}),
        (UsageError, {"temperature": math.inf}),
        (RewardError, {"reward": failing("length", 1)}),
        (RewardError, {"reward": dead, "temperature": 2.0}),
    ):
        with pytest.raises(error):
            tree.retilt(**options)
        assert_equal(before, tree)
    assert tree.config.temperature == 1.0


@pytest.mark.parametrize("name", MAKERS)
def test_merged_trees_hold_both(name: str) -> None:
    a, b = grown(200, **MAKERS[name], generator=1), grown(300, **MAKERS[name], generator=2)
    parts = [(len(t.leaves), t.nfe, t.rollouts.size, t.reward_calls, t.rollout_weights()) for t in (a, b)]
    one, two = (t.nodes["value"][0] * t.config.inverse_temperature for t in (a, b))
    kids = [t.nodes["drawn"][0] for t in (a, b)]
    assert a.merge(b) is a
    assert (len(a.leaves), a.nfe, a.rollouts.size, a.reward_calls) == tuple(
        x + y for x, y in zip(parts[0][:4], parts[1][:4], strict=True)
    )
    np.testing.assert_array_equal(a.rollout_weights(), np.concatenate([parts[0][4], parts[1][4]]))
    if not a.config.hard:  # the root averages the children of both
        expected = math.log((kids[0] * math.exp(one) + kids[1] * math.exp(two)) / sum(kids))
        assert a.progress().log_z[0] == pytest.approx(expected, rel=1e-9)
    assert a.nodes["visits"][0] - 1 == a.rollouts.size and a.nodes["drawn"][0] == sum(kids)
    assert a.leaf_law()[1].sum() == pytest.approx(1.0)
    rewards = a.nodes["value"][a.rollouts["leaf"]] if name != "tokens" else a.nodes["value"][a.leaves]
    assert a.counts["best"][0] == rewards.max()
    if name != "tokens":
        values = a.nodes["value"][a.leaves]
        assert a.counts["m2"][0] / a.counts["valid"][0] == pytest.approx(values.var(), rel=1e-9)
    if name == "tokens":  # sequences of both are known: none is scored again
        states = a.pools[-1].all()
        assert (a.sequences.find(hashes(np.zeros(len(states), np.int64), states)) >= 0).all()
    for _ in a.build(100):  # and it grows on
        pass
    with pytest.raises(UsageError, match="seed 2"):
        a.merge(grown(100, **MAKERS[name], generator=2))


def test_trees_of_different_problems_do_not_merge() -> None:
    tree = grown(100, generator=1, **SMALL)
    for options, text in (
        ({"temperature": 2.0}, "temperature"),
        ({"branch": 2}, "branch"),
        ({"model": Shrink(0.6)}, "model"),
        ({"reward": lambda x: first(x)}, "reward"),
        ({"context": RewardContext(prompts=["a"])}, "prompt"),
        ({"cond": torch.ones(1, 2)}, "condition"),
    ):
        with pytest.raises(UsageError, match=text):
            tree.merge(grown(100, generator=2, **(SMALL | options)))


def test_a_file_names_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "tree"
    mixture = GaussianMixture(torch.zeros(1, 2), torch.eye(2)[None], torch.ones(1), GaussianProcess(Linear()))
    context = RewardContext(prompts=["a"])
    model = cfg(mixture, 2.0, torch.ones(1, 1))
    options = {"cond": torch.ones(1, 1), "context": context}
    grown(50, model=model, **options, **SMALL).save(path)
    DiffusionTree.load(path, model, first, **options)

    def other(x: Tensor) -> Tensor:
        return first(x)

    wide = GaussianMixture(torch.zeros(1, 2), 2 * torch.eye(2)[None], torch.ones(1), GaussianProcess(Linear()))
    for changed, text in (
        ({"model": cfg(mixture, 3.0, torch.ones(1, 1))}, "model"),
        ({"model": cfg(mixture, 2.0, torch.zeros(1, 1))}, "model"),
        ({"model": cfg(wide, 2.0, torch.ones(1, 1))}, "model"),
        ({"model": mixture}, "model"),
        ({"reward": other}, "reward"),
        ({"cond": torch.zeros(1, 1)}, "condition"),
        ({"cond": None}, "condition"),
        ({"context": RewardContext(prompts=["b"])}, "prompt"),
        ({"cond": torch.ones(2, 1)}, "rows"),
    ):
        full = {"model": model, "reward": first, **options, **changed}
        with pytest.raises(UsageError, match=text):
            DiffusionTree.load(path, full.pop("model"), full.pop("reward"), **full)
    known = [inpaint(mixture, torch.full((1, 2), v), torch.tensor([[True, False]])) for v in (0.0, 1.0)]
    assert fingerprint(known[0]) != fingerprint(known[1])


def test_damaged_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "tree"
    grown(100, **SMALL).save(path)
    data = path.read_bytes()
    draw = np.random.default_rng(0)
    damaged = {
        "cut": data[:-9],
        "short": data[:100],
        "empty": b"",
        "random": draw.bytes(5000),
        "flipped": data[:-50] + bytes([data[-50] ^ 4]) + data[-49:],
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match="damaged|not a tree"):
            DiffusionTree.load(tmp_path / name, Shrink(), first)
    save_file({"a": torch.zeros(1)}, str(tmp_path / "weights"))
    save_file({"a": torch.zeros(1)}, str(tmp_path / "hollow"), {"tree": json.dumps({"format": "gencontrol-tree-1"})})
    for name in ("weights", "hollow", "missing"):
        with pytest.raises(UsageError, match="not a tree|does not exist|damaged"):
            DiffusionTree.load(tmp_path / name, Shrink(), first)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiskError):
        grown(50).save(tmp_path / "file" / "tree")


def test_rules_and_steps_of_the_user_have_no_name_in_a_file(tmp_path: Path) -> None:
    class Mine(Boltzmann):
        pass

    with pytest.raises(UsageError, match="Mine cannot be saved"):
        grown(50, select=Mine()).save(tmp_path / "tree")
