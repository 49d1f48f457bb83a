"""Trees against laws known in closed form: Gaussian chain, discrete chain (docs/methods/dts.md#e-dts-1), tokens, tilted
mixtures.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gencontrol.errors import UsageError
from gencontrol.models import EnumerableTokens, GaussianMixture
from gencontrol.process import GaussianProcess, Linear, MaskedProcess
from gencontrol.sampling.masked_steps import Confidence
from gencontrol.sampling.tree.tree import DiffusionTree
from tests.helpers.tree_toys import Decay, Dice, Jump, first, grown


def test_gaussian_chain_has_its_closed_form_values() -> None:
    """x_{t-1} = c·x_t + sqrt(1-c²)·z with r = a·x: V_t(x) = a·c^t·x + a²(1-c^{2t})/2, log Z = a²/2, target N(a, 1)."""
    tree = grown(
        6000, shape=(1,), steps=2, step=Decay(), branch="all", select="uniform", widening=(1.0, 0.8), leaf_batch=250
    )
    # tolerances are three standard errors: about 600 root children with three or four leaves each
    stats = tree.stats()
    assert stats["log_z_tree"] == pytest.approx(0.5, abs=0.12) and stats["log_z_base"] == pytest.approx(0.5, abs=0.12)
    busy = tree.nodes.at_level(1)
    x = tree.pools[0].take(tree.nodes["row"][busy], torch.device("cpu"))[:, 0].double().numpy()
    ratio = np.exp(tree.nodes["value"][busy] - (0.6 * x + 0.32))
    assert len(busy) > 500 and ratio.mean() == pytest.approx(1.0, abs=0.07)
    jensen = np.exp(0.6 * x).mean() / math.exp(0.5)  # what the one-step prediction would give
    assert jensen < 0.85
    drawn = tree.sample(4000, 1).double()
    assert float(drawn.mean()) == pytest.approx(1.0, abs=0.12) and float(drawn.var()) == pytest.approx(1.0, abs=0.2)


def dice_trees(select: str, count: int, budget: int, **options: object) -> DiffusionTree:
    """Independent trees over the discrete chain: one root each."""
    options = {"widening": (1.0, 0.5), "leaf_batch": 1} | options
    rewards = torch.tensor([0.0, 1.0, 2.5, -1.0])
    return grown(
        budget, lambda x: rewards[x[:, 0].long()], Dice(), shape=(count, 1), steps=4, step=Jump(), branch="all",
        select=select, generator=2, **options,
    )  # fmt: skip


def z_ratios(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard error of exp(log Z estimates)/Z."""
    z = float((Dice().law() * torch.tensor([0.0, 1.0, 2.5, -1.0]).exp()).sum())
    ratio = np.exp(values) / z
    return float(ratio.mean()), float(ratio.std(ddof=1) / math.sqrt(len(ratio)))


@pytest.mark.parametrize("leaves", [1, 5])
def test_uniform_selection_is_unbiased_and_boltzmann_is_not(leaves: int) -> None:
    """docs/methods/dts.md#e-dts-1 in small: 150 trees of about 60 rollouts; three standard errors."""
    uniform = dice_trees("uniform", 150, 160, leaf_batch=leaves)
    mean, error = z_ratios(uniform.nodes["value"][:150])
    assert abs(mean - 1) < 3 * error and error < 0.04
    tree = dice_trees("boltzmann", 150, 160, leaf_batch=leaves)
    biased, error = z_ratios(tree.nodes["value"][:150])
    # the bias of the paper's rule (docs/methods/dts.md#p1): without it this test sees nothing
    assert biased < 1 - 5 * error, "the bias has gone"
    weighted = np.array([np.log(np.exp(tree.rollout_weights(root)).mean()) for root in range(150)])
    mean, error = z_ratios(weighted)
    assert abs(mean - 1) < 3 * error and error < 0.06


def test_the_importance_weighted_law_is_the_target() -> None:
    tree = dice_trees("boltzmann", 150, 160)
    states = tree.pools[-1].all()[tree.nodes["row"][tree.rollouts["leaf"]].astype(np.int64), 0].long().numpy()
    law = np.bincount(states, np.exp(tree.log_weights()), 4)
    target = Dice().law().numpy() * np.exp([0.0, 1.0, 2.5, -1.0])
    assert 0.5 * np.abs(law / law.sum() - target / target.sum()).sum() < 0.02
    # every root's tree is another one
    assert len({tuple(tree.nodes["value"][:150])}) == 1 and len(set(tree.nodes["value"][:150].tolist())) > 140


def test_a_sample_without_reward_weighs_nothing() -> None:
    """Uniform selection stays unbiased for E[w·1(valid)], and the three estimates mean the same thing."""
    rewards = torch.tensor([0.0, 1.0, math.nan, -1.0])
    tree = grown(
        160, lambda x: rewards[x[:, 0].long()], Dice(), shape=(150, 1), steps=4, step=Jump(), branch="all",
        select="uniform", widening=(1.0, 0.5), leaf_batch=1, generator=3,
    )  # fmt: skip
    z = float((Dice().law() * torch.nan_to_num(rewards.exp())).sum())
    found = {
        "tree": np.where(tree.nodes["ready"][:150], np.exp(tree.nodes["value"][:150]), 0.0),
        "iw": np.array([np.exp(tree.rollout_weights(root)).mean() for root in range(150)]),
        "base": np.exp(tree.counts["log_w"]) / tree.counts["base"],
    }
    for name, values in found.items():
        assert abs(values.mean() / z - 1) < 3 * values.std() / math.sqrt(150) / z, name
    assert tree.scorer.excluded == int((~tree.nodes["ready"][tree.leaves]).sum()) > 0
    assert (~np.isfinite(tree.rollout_weights(0))).sum() == (~tree.nodes["ready"][tree.rollouts["leaf"]])[
        tree.nodes.root_of(tree.rollouts["leaf"].astype(np.int64)) == 0
    ].sum()


def tokens(length: int = 3) -> EnumerableTokens:
    table = torch.rand(*[3] * length, generator=torch.Generator().manual_seed(0)) + 0.1
    return EnumerableTokens(table, MaskedProcess(3, 3))


def test_token_trees_reach_the_tilted_law_and_score_a_sequence_once() -> None:
    """TV 0.05: sampling noise of 1000 root children of few different states each; measured 0.03."""
    model = tokens()
    reward = torch.linspace(-1, 1, 27).reshape(3, 3, 3)
    seen: list[tuple[int, ...]] = []

    def score(x: torch.Tensor) -> torch.Tensor:
        seen.extend(map(tuple, x.tolist()))
        return reward[tuple(x.unbind(1))]

    # one token per step: the exact law of the model
    step = Confidence(1.0)
    tree = grown(
        9000, score, model, shape=(3,), steps=3, step=step, branch="all", select="uniform", leaf_batch=200,
        widening="paper",
    )  # fmt: skip
    assert len(seen) == len(set(seen)) == tree.reward_calls == 27
    leaves, law = tree.leaf_law()
    states = tree.pools[-1].take(tree.nodes["row"][leaves], torch.device("cpu"))
    found = torch.zeros(3, 3, 3, dtype=torch.float64).index_put(
        tuple(states.unbind(1)), torch.from_numpy(law), accumulate=True
    )
    assert 0.5 * float((found - model.tilt(reward).table).abs().sum()) < 0.05
    z = float((model.table * reward.double().exp()).sum())
    assert tree.stats()["log_z_tree"] == pytest.approx(math.log(z), abs=0.06)


def test_equal_siblings_are_one_node_with_the_literal_mean() -> None:
    tree = grown(
        600, lambda x: x.double().sum(1), tokens(2), shape=(2,), steps=4, branch="all", leaf_batch=8, widening="paper",
    )  # fmt: skip
    nodes = tree.nodes
    for place in np.flatnonzero(nodes["count"] > 0):
        ids = nodes.children(np.array([place])).ids
        states = tree.pools[nodes["level"][place]].take(nodes["row"][ids], torch.device("cpu"))
        assert len(torch.unique(states, dim=0)) == len(ids)
        copies = np.repeat(nodes["value"][ids], nodes["multiplicity"][ids])
        assert nodes["value"][place] == pytest.approx(np.log(np.exp(copies).mean()), rel=1e-12)
        assert nodes["multiplicity"][ids].sum() == nodes["drawn"][place]
    assert nodes["multiplicity"].max() > 5
    # rollouts are path sums here too
    inner = np.flatnonzero((nodes["level"] > 0) & (nodes["level"] < tree.config.last))
    assert tree.nodes["visits"][0] - 1 == tree.rollouts.size == (nodes["visits"][nodes.at_level(1)] - 1).sum()
    assert len(inner) > 10


def test_finished_tokens_cost_no_call() -> None:
    calls = []

    class Counted(EnumerableTokens):
        def forward(self, xt, t, cond=None):  # as its parent
            assert bool((xt == 3).any(1).all()), "a finished row was sent to the model"
            calls.append(len(xt))
            return super().forward(xt, t, cond)

    model = Counted(tokens(2).table, MaskedProcess(3, 3))
    tree = grown(400, lambda x: x.double().sum(1), model, shape=(2,), steps=8, branch=4, leaf_batch=8)
    assert tree.nfe == sum(calls) <= 400
    assert tree.rollouts.size > 400 / 8 + 8  # rows that finish early leave calls for others


@pytest.mark.parametrize("guidance", [0.5, 1.0])
def test_gradient_proposals_keep_the_target(guidance: float) -> None:
    """Tilt of a two-mode mixture by exp(1.5·x₁): weighted law and log Z against the closed form of `tilt`."""
    process = GaussianProcess(Linear())
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.5]])
    base = GaussianMixture(means, 0.25 * torch.eye(2).expand(2, 2, 2), torch.tensor([0.6, 0.4]), process)
    slope = torch.tensor([1.5, 0.0])
    tree = grown(
        24_000, lambda x: x @ slope.to(x), base, steps=20, branch=2, leaf_batch=600, guidance=guidance,
        select="uniform", widening=(2.0, 0.8),
    )  # fmt: skip
    stats = tree.stats()
    exact = base.log_normaliser(slope)
    # 20 steps of the sde leave the base law O(1/steps) off; plain base samples measure that error with the same grid
    plain = grown(24_000, lambda x: x @ slope.to(x), base, steps=20, branch=1, leaf_batch=600, widening="paper")
    reference = plain.stats()["log_z_base"]
    assert reference == pytest.approx(exact, abs=0.15)
    for name in ("log_z_tree", "log_z_iw", "log_z_base"):
        assert stats[name] == pytest.approx(reference, abs=0.12), name
    mean = tree.sample(3000, 0).double().mean(0)
    torch.testing.assert_close(mean, base.tilt(slope).means.T @ base.tilt(slope).weights, atol=0.15, rtol=0)
    assert stats["base_ess_share"] > plain.stats()["base_ess_share"], "the gradient does not help: it is not applied"
    with pytest.raises(UsageError, match="not differentiable|no gradient"):
        grown(40, lambda x: x.detach()[:, 0], base, steps=20, guidance=1.0)


def test_robust_read_out_does_not_follow_a_lucky_leaf_seen_once() -> None:
    """The narrow mode of `bench dts` (dts_mixture): trees that are read a moment after a lucky leaf was found."""
    from gencontrol.bench.dts.measure import mixture_mmd2, tree_law
    from gencontrol.bench.dts.mixture import base_mixture, targets

    base = base_mixture()
    target = next(target for target in targets(base) if target.name == "sharp")
    tree = DiffusionTree(
        base, target.reward, (16, 2), steps=20, select="boltzmann", widening="small", leaf_batch=32, generator=1,
        reward_batch=4096,
    )  # fmt: skip
    for _ in tree.build(nfe=4000):
        pass
    worst, mean = {}, {}
    for rule in ("boltzmann", "robust"):
        found = [mixture_mmd2(tree_law(tree, root, rule), target.law, target.bandwidths) for root in range(tree.roots)]
        worst[rule], mean[rule] = max(found), sum(found) / len(found)
    assert worst["robust"] < 0.5 * worst["boltzmann"] and mean["robust"] < 0.7 * mean["boltzmann"], (worst, mean)


def test_robust_read_out_tends_to_the_same_law() -> None:
    """Both bounds fade with visits: with 3³ sequences and many rollouts the laws agree to 0.02 in total variation."""
    reward = torch.linspace(-1, 1, 27).reshape(3, 3, 3)
    tree = grown(
        6000, lambda x: reward[tuple(x.unbind(1))], tokens(), shape=(3,), steps=3, step=Confidence(1.0), branch="all",
        leaf_batch=200, select="boltzmann", widening="paper",
    )  # fmt: skip
    leaves, law = tree.leaf_law(0, "boltzmann")
    again, robust = tree.leaf_law(0, "robust")
    assert (leaves == again).all() and 0.5 * abs(law - robust).sum() < 0.02
    tree.retilt(temperature=0.5)  # visits belong to the old temperature: no cap, which would keep the old law
    assert 0.5 * abs(tree.leaf_law(0, "boltzmann")[1] - tree.leaf_law(0, "robust")[1]).sum() < 0.02
    with pytest.raises(UsageError, match="unknown rule 'robost'. Did you mean"):
        tree.sample(2, rule="robost")


@pytest.mark.slow
def test_weights_of_a_tree_of_fixed_branching_are_unbiased() -> None:
    """E[w] = Z over 3000 full trees of three children per node, for 12 rollouts that follow the values.

    E[w | tree] is the mean over the tree's children, recursively, and that of a full tree of fixed branching has mean
    Z.  Standard error measured 0.008.
    """
    from gencontrol.bench.dts.chain import REWARDS, MarkovChain, fill_chain
    from gencontrol.sampling.tree.rules import Shrunk

    chain = MarkovChain.random(steps=2)
    tree = fill_chain(chain, 3000, 3, seed=5)
    tree.config = replace(tree.config, select=Shrunk())
    made = tree.rollouts.size
    for _ in range(12):
        tree.grow(np.ones(3000, np.int64), None)
    _, z = chain.tilted(REWARDS)
    weights = np.exp(tree.log_weights())[made:].reshape(12, 3000).mean(0) / z
    full = np.exp(tree.nodes["value"][:3000]) / z
    for ratio in (weights, full):
        error = ratio.std(ddof=1) / math.sqrt(3000)
        assert error < 0.02 and abs(ratio.mean() - 1) < 3 * error
    assert abs((weights - full).mean()) < 3 * (weights - full).std() / math.sqrt(3000)


def test_shrunk_selection_bounds_every_factor() -> None:
    """share/π is at most 1/floor; a child that did badly once keeps a chance, and clean leaves follow their reward."""
    from gencontrol.sampling.tree.rules import Shrunk

    tree = grown(2000, lambda x: 20 * first(x), leaf_batch=4)
    for level in range(tree.config.last):
        ids = tree.nodes.at_level(level)
        ids = ids[(tree.nodes["count"][ids] > 1) & tree.nodes["ready"][ids]]
        _, offsets, chance, share = Shrunk().probabilities(tree.nodes, ids, 1.0)
        assert float((share / chance).max()) <= 1 / 0.3 + 1e-9
        np.testing.assert_allclose(np.add.reduceat(chance, offsets[:-1]), 1.0, rtol=1e-9)
    for wrong in ({"pseudo": -1.0}, {"floor": 0.0}, {"floor": 1.5}):
        with pytest.raises(UsageError, match="pseudo >= 0 and floor"):
            Shrunk(**wrong)


def test_the_weighted_law_counts_later_rollouts_more() -> None:
    """Leaf ∝ sqrt(m)·w over its rollouts m = 1, 2, …; the law of another temperature follows from the same weights."""
    tree = grown(600, lambda x: 3 * first(x))
    for _ in range(2):
        w = np.sqrt(np.arange(1, tree.rollouts.size + 1)) * np.exp(tree.rollout_weights())
        leaves, law = tree.leaf_law()
        expected = np.bincount(tree.rollouts["leaf"], w, tree.nodes.size)[leaves]
        np.testing.assert_allclose(law, expected / expected.sum(), rtol=1e-9)
        tree.retilt(temperature=0.5)


def test_token_children_count_their_probability_once_nearly_all_are_seen() -> None:
    """`Nodes.shares` against the table: transition probabilities of a law of 3³ sequences, revealed one by one."""
    tree = grown(
        3000, lambda x: x.double().sum(1), tokens(), shape=(3,), steps=3, step=Confidence(1.0), branch="all",
        widening="paper", leaf_batch=50,
    )  # fmt: skip
    nodes, model = tree.nodes, tokens()
    children = nodes.children(np.array([0]))
    chance = np.exp(nodes["log_p"][children.ids])
    states = tree.pools[0].take(nodes["row"][children.ids], torch.device("cpu"))
    place = int((states != 3).any(0).nonzero()[0, 0])  # the first position that shows itself
    exact = model.table.movedim(place, 0).flatten(1).sum(1)[states[:, place]]
    np.testing.assert_allclose(chance, exact.numpy(), atol=1e-6)
    np.testing.assert_allclose(nodes.shares(children), chance / chance.sum(), atol=1e-6)
    nodes["log_p"][children.ids[0]] = -30.0  # then a good part of the mass is not among the children
    copies = nodes["multiplicity"][children.ids]
    np.testing.assert_allclose(nodes.shares(children), copies / copies.sum())
    gauss = grown(200)
    some = gauss.nodes.children(np.array([0]))
    assert np.isnan(gauss.nodes["log_p"][some.ids]).all()
    np.testing.assert_allclose(gauss.nodes.shares(some), 1 / len(some.ids))
