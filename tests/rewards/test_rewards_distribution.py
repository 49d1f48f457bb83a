"""Fréchet distance and Vendi score: closed forms, invariances, independent formulas, exact incremental states."""

from __future__ import annotations

import time

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from gencontrol.errors import RewardError, UsageError
from gencontrol.rewards.distribution import frechet_distance, vendi_score
from gencontrol.rewards.sets.gaussian import Gaussian
from gencontrol.rewards.sets.states import FrechetState, VendiState


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scipy_frechet(x: np.ndarray, y: np.ndarray) -> float:
    """The textbook formula with a general matrix square root, as most FID code has it."""
    c1, c2 = np.atleast_2d(np.cov(x.T)), np.atleast_2d(np.cov(y.T))
    root = scipy.linalg.sqrtm(c1 @ c2)
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(c1 + c2 - 2 * np.real(root)))


def test_one_dimensional_gaussians_have_the_closed_form() -> None:
    value = frechet_distance(torch.tensor([1.0]), torch.tensor([[4.0]]), torch.tensor([-2.0]), torch.tensor([[0.25]]))
    assert value == pytest.approx(3.0**2 + (2.0 - 0.5) ** 2, abs=1e-12)  # float64 rounding only


def test_diagonal_gaussians_have_the_closed_form() -> None:
    a, b = normal(6).abs() + 0.1, normal(6, seed=1).abs() + 0.1
    expected = float((a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(torch.zeros(6), torch.diag(a), torch.zeros(6), torch.diag(b)) == pytest.approx(expected)


@pytest.mark.parametrize(("n", "m", "d"), [(200, 300, 1), (200, 300, 5), (500, 400, 24)])
def test_distance_agrees_with_the_matrix_root_of_scipy(n: int, m: int, d: int) -> None:
    x = normal(n, d) @ normal(d, d, seed=3)
    y = normal(m, d, seed=1) @ normal(d, d, seed=4) + 0.3
    expected = scipy_frechet(x.numpy(), y.numpy())
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(x.numpy(), y.numpy()) == pytest.approx(expected, rel=1e-6)
    four = frechet_distance(x.mean(0), torch.cov(x.T), y.numpy().mean(0), np.cov(y.numpy().T))
    assert four == pytest.approx(expected, rel=1e-6)


def test_identical_sets_are_at_distance_zero_also_when_singular() -> None:
    assert frechet_distance(normal(100, 8), normal(100, 8)) < 1e-10
    assert frechet_distance(normal(10, 64), normal(10, 64)) < 1e-6  # root of rounding in the null space


def test_distance_is_symmetric_and_invariant_to_rotation_and_shift() -> None:
    x, y = normal(50, 6) * torch.arange(1, 7), normal(70, 6, seed=1) + 1
    rotation = torch.linalg.qr(normal(6, 6, seed=2))[0]
    base = frechet_distance(x, y)
    assert frechet_distance(y, x) == pytest.approx(base, rel=1e-9)
    assert frechet_distance(x @ rotation + 5, y @ rotation + 5) == pytest.approx(base, rel=1e-9)


def test_fewer_samples_than_dimensions_agree_with_the_small_dual_problem() -> None:
    x, y = normal(6, 40), normal(9, 40, seed=1) + 0.5
    xc, yc = (x - x.mean(0)) / 5**0.5, (y - y.mean(0)) / 8**0.5
    cross = torch.linalg.svdvals(xc @ yc.T).sum()  # nuclear norm of the factors: no d×d matrix at all
    expected = (x.mean(0) - y.mean(0)).square().sum() + xc.square().sum() + yc.square().sum() - 2 * cross
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-6)


def test_frechet_refuses_what_has_no_covariance() -> None:
    with pytest.raises(UsageError, match="n ≥ 2"):
        frechet_distance(normal(1, 4), normal(5, 4))
    with pytest.raises(UsageError, match="mu1, cov1, mu2, cov2"):
        frechet_distance(normal(4), normal(4, 4), normal(4))
    with pytest.raises(UsageError, match="dimensions"):
        frechet_distance(normal(5, 4), normal(5, 3))
    with pytest.raises(UsageError, match="NaN"):
        frechet_distance(normal(5, 2) * float("nan"), normal(5, 2))


@pytest.mark.parametrize(("frames", "size"), [(4, 12), (30, 6)])
def test_clip_distances_equal_the_distance_of_each_clip(frames: int, size: int) -> None:
    reference = Gaussian.of(normal(80, size, seed=9))
    clips = normal(5, frames, size) * 2 + 0.3
    expected = [Gaussian.of(clip).distance(reference) for clip in clips]
    torch.testing.assert_close(reference.clip_distances(clips), torch.tensor(expected).double(), rtol=1e-6, atol=1e-6)


def test_clip_distances_have_the_gradient_of_finite_differences() -> None:
    reference = Gaussian.of(normal(60, 5, seed=9))
    clips = normal(2, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(reference.clip_distances, (clips,), eps=1e-6, atol=1e-5)


def test_clip_distances_need_two_frames() -> None:
    with pytest.raises(UsageError, match="at least 2 frames"):
        Gaussian.of(normal(60, 5)).clip_distances(normal(2, 1, 5))


def test_statistics_survive_a_file(tmp_path) -> None:
    made = Gaussian.of(normal(60, 5), "mel:test")
    made.save(tmp_path / "s.safetensors")
    back = Gaussian.load(tmp_path / "s.safetensors")
    assert torch.equal(back.mean, made.mean) and torch.equal(back.cov, made.cov)
    assert (back.n, back.encoder) == (60, "mel:test")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UsageError, match="bad.safetensors"):
        Gaussian.load(tmp_path / "bad.safetensors")


def test_vendi_counts_identical_and_orthogonal_items() -> None:
    assert vendi_score(torch.ones(7, 3)) == pytest.approx(1.0, abs=1e-9)
    assert vendi_score(torch.eye(9)) == pytest.approx(9.0, abs=1e-9)
    assert vendi_score(torch.eye(4)[[0, 0, 1, 1]] * 3.0) == pytest.approx(2.0, abs=1e-9)  # length does not count


@pytest.mark.parametrize(("n", "d"), [(30, 8), (8, 30)])
def test_vendi_agrees_with_the_entropy_of_scipy_in_both_forms(n: int, d: int) -> None:
    rows = normal(n, d).numpy()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    spectrum = np.linalg.eigvals(unit @ unit.T / n).real.clip(0)
    expected = float(np.exp(scipy.stats.entropy(spectrum)))
    for form in ("primal", "dual", "auto"):
        assert vendi_score(rows, form=form) == pytest.approx(expected, abs=1e-6)


def test_vendi_refuses_a_direction_that_does_not_exist() -> None:
    with pytest.raises(RewardError, match="zero"):
        vendi_score(torch.zeros(3, 2))


def frechet_state(pool: int = 20, size: int = 5, chosen: int = 8):
    frames = normal(pool, 3, size) * 1.5 + 2.0
    reference = Gaussian.of(normal(50, size, seed=7))
    valid = torch.ones(pool, dtype=torch.bool)
    return FrechetState(frames, valid, torch.arange(chosen), reference), frames, reference


def test_frechet_state_stays_exact_over_ten_thousand_swaps() -> None:
    state, frames, reference = frechet_state()
    members = list(range(8))
    generator = torch.Generator().manual_seed(0)
    moves = torch.stack(
        [torch.randint(8, (10_000,), generator=generator), torch.randint(20, (10_000,), generator=generator)]
    )
    for slot, candidate in moves.T.tolist():
        state.swap(slot, candidate)
        members[slot] = candidate
    expected = -Gaussian.of(frames[members].flatten(0, 1)).distance(reference)
    assert state.value() == pytest.approx(expected, abs=1e-10)


def test_frechet_proposal_is_the_value_after_the_swap_and_changes_nothing() -> None:
    state, frames, reference = frechet_state()
    before = state.value()
    proposed = state.propose(2, 15)
    assert state.value() == before
    rows = [0, 1, 15, 3, 4, 5, 6, 7]
    assert proposed == pytest.approx(-Gaussian.of(frames[rows].flatten(0, 1)).distance(reference), abs=1e-10)
    state.swap(2, 15)
    assert state.value() == pytest.approx(proposed, abs=1e-12)


def test_frechet_influence_is_leave_one_out() -> None:
    state, frames, reference = frechet_state()
    whole = -Gaussian.of(frames[:8].flatten(0, 1)).distance(reference)
    for slot, value in enumerate(state.influence()):
        rest = frames[[i for i in range(8) if i != slot]].flatten(0, 1)
        assert float(value) == pytest.approx(whole + Gaussian.of(rest).distance(reference), abs=1e-9)


def test_frechet_state_is_exact_with_fewer_frames_than_dimensions() -> None:
    state, frames, reference = frechet_state(pool=6, size=40, chosen=3)
    assert state.value() == pytest.approx(-Gaussian.of(frames[:3].flatten(0, 1)).distance(reference), rel=1e-6)


@pytest.mark.parametrize("size", [4, 40])
def test_vendi_state_is_exact_over_ten_thousand_swaps(size: int) -> None:
    rows = normal(20, size)
    state = VendiState(rows, torch.ones(20, dtype=torch.bool), torch.arange(8))
    members = list(range(8))
    generator = torch.Generator().manual_seed(0)
    moves = torch.stack(
        [torch.randint(8, (10_000,), generator=generator), torch.randint(20, (10_000,), generator=generator)]
    )
    for slot, candidate in moves.T.tolist():
        state.swap(slot, candidate)
        members[slot] = candidate
    assert state.value() == pytest.approx(vendi_score(rows[members]), abs=1e-10)
    proposed, before = state.propose(0, 13), state.value()
    assert proposed == pytest.approx(vendi_score(rows[[13, *members[1:]]]), abs=1e-10)
    assert state.value() == before
    for slot, value in enumerate(state.influence()):
        rest = rows[[m for i, m in enumerate(members) if i != slot]]
        assert float(value) == pytest.approx(before - vendi_score(rest), abs=1e-9)


def test_states_refuse_invalid_items() -> None:
    valid = torch.ones(20, dtype=torch.bool)
    valid[11] = False
    frames = normal(20, 3, 5)
    frames[11] = float("nan")
    reference = Gaussian.of(normal(50, 5, seed=7))
    for state in (
        FrechetState(frames, valid, torch.arange(8), reference),
        VendiState(frames[:, 0], valid, torch.arange(8)),
    ):
        assert state.propose(0, 11) == float("-inf")
        assert np.isfinite(state.propose(0, 12))  # the invalid row spoils nothing else
        with pytest.raises(RewardError, match="invalid"):
            state.swap(0, 11)
    with pytest.raises(RewardError, match="invalid"):
        FrechetState(frames, valid, torch.tensor([10, 11]), reference)
    with pytest.raises(RewardError, match="pool of 20"):
        VendiState(frames[:, 0], valid, torch.tensor([1, 20]))


def test_greedy_exchanges_of_256_pairs_are_fast_enough_for_a_training_round() -> None:
    frames = normal(512, 8, 128).float()
    state = FrechetState(
        frames, torch.ones(512, dtype=torch.bool), torch.arange(256), Gaussian.of(normal(600, 128) + 0.1)
    )
    begun, start = time.perf_counter(), state.value()
    for slot in range(128):
        if state.propose(slot, 256 + slot) > state.value():
            state.swap(slot, 256 + slot)
    assert state.value() > start
    assert (time.perf_counter() - begun) * 4 < 10.0  # two sweeps over 256 pairs; measured 0.6 s on an idle thread
