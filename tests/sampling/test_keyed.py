"""Keyed noise: known values, moments, independence of rows, counters and places, and of the batch."""

from __future__ import annotations

import math

import pytest
import torch

from gencontrol.process import Linear, MaskedProcess
from gencontrol.process.gaussian import GaussianProcess
from gencontrol.rng import _GOLDEN, Keyed, _splitmix, row_keys
from gencontrol.sampling import make_step
from gencontrol.sampling.loop import STEPS
from gencontrol.sampling.masked_steps import Blocks, Confidence
from gencontrol.sampling.steps import Ddim

ROWS = torch.arange(2000)


def test_the_hash_is_splitmix64() -> None:
    """First outputs for the seeds 0 and 1234567 (reference implementation, Vigna 2015)."""
    known = {0: 0xE220A8397B1DCDAF, 1234567: 6457827717110365317}
    for seed, value in known.items():
        assert int(_splitmix(torch.tensor([seed]) + _GOLDEN)[0]) % 2**64 == value


def test_moments_of_uniform_and_normal_numbers() -> None:
    """2000 rows of 100 numbers: five standard errors of each moment."""
    n = 200_000
    keyed = Keyed(row_keys(0, "test", ROWS))
    u = keyed.uniform((2000, 100))
    assert u.dtype == torch.float64 and 0 <= u.min() and u.max() < 1
    for power in (1, 2, 3):
        spread = math.sqrt((1 / (2 * power + 1) - 1 / (power + 1) ** 2) / n)
        assert abs(float((u**power).mean()) - 1 / (power + 1)) < 5 * spread
    for dtype in (torch.float32, torch.float64):
        z = keyed.normal((2000, 100), dtype=dtype).double()
        for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs(float((z**power).mean()) - moment) < 5 * math.sqrt(variance / n), power
        ordered = torch.sort(z.flatten()).values
        law = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
        gap = (law - (torch.arange(n) + 0.5) / n).abs().max()  # Kolmogorov-Smirnov, p = 1e-4 at 2.2/sqrt(n)
        assert float(gap) < 2.2 / math.sqrt(n)


def test_numbers_of_neighbours_are_uncorrelated() -> None:
    """Rows, counters, places, Box-Muller pairs and key indices; five standard errors, also of the squares."""
    keys = row_keys(3, "test", ROWS)
    z = [Keyed(keys, counter).normal((2000, 50), dtype=torch.float64) for counter in (0, 1, 2)]
    other = Keyed(row_keys(3, "test", ROWS, torch.ones_like(ROWS))).normal((2000, 50), dtype=torch.float64)
    pairs = {
        "counter": (z[0], z[1]),
        "counters": (z[0], z[2]),
        "row": (z[0][:-1], z[0][1:]),
        "place": (z[0][:, :-1], z[0][:, 1:]),
        "pair": (z[0][:, :25], z[0][:, 25:]),
        "index": (z[0], other),
    }
    for name, (a, b) in pairs.items():
        for left, right in ((a, b), (a.square() - 1, b.square() - 1), (a.abs(), b)):
            left = left - left.mean()
            correlation = float((left * right).mean() / (left.std() * right.std()))
            assert abs(correlation) < 5 / math.sqrt(a.numel()), name


def test_a_row_is_the_same_in_any_batch() -> None:
    keys = row_keys(1, "test", ROWS[:7], ROWS[:7] + 3)
    whole = Keyed(keys, 4)
    for i in (0, 6):
        one = Keyed(keys[i : i + 1], 4)
        assert torch.equal(whole.normal((7, 3, 5))[i : i + 1], one.normal((1, 3, 5)))
        assert torch.equal(whole.uniform((7, 3))[i : i + 1], one.uniform((1, 3)))
    assert torch.equal(row_keys(1, "test", ROWS[3:4], ROWS[6:7]), keys[3:4])
    assert len({*keys.tolist(), *row_keys(1, "tests", ROWS[:7], ROWS[:7] + 3).tolist()}) == 14
    # float64 refines float32, it is not another draw
    torch.testing.assert_close(
        whole.normal((7, 9), dtype=torch.float64).float(), whole.normal((7, 9)), atol=1e-5, rtol=0
    )


def test_no_two_of_a_million_streams_meet() -> None:
    keys = row_keys(0, "tree", torch.arange(1000).repeat_interleave(1000), torch.arange(1000).repeat(1000))
    assert len(keys.unique()) == 1_000_000


@pytest.mark.parametrize("step", [*(s for s in STEPS if s != "ddim"), Ddim(0.5), Blocks(2, Confidence(1.0))])
def test_every_step_draws_by_key(step: object) -> None:
    name = step if isinstance(step, str) else type(step).__name__.lower()
    masked = name in ("ancestral", "confidence", "blocks")
    chosen = make_step(step, MaskedProcess(3, 3) if masked else GaussianProcess(Linear()))
    x = torch.zeros(4, 6, dtype=torch.int64) if masked else torch.zeros(4, 6, dtype=torch.float64)
    keys = row_keys(0, "test", ROWS[:4])
    noise = chosen.draw(x, Keyed(keys, 2))
    if not chosen.stochastic:
        assert noise is None
        return
    assert noise.dtype == torch.float64 and noise.shape[:2] == (4, 6)
    assert torch.equal(chosen.draw(x[2:3], Keyed(keys[2:3], 2)), noise[2:3])


def test_the_number_of_keys_is_checked() -> None:
    with pytest.raises(ValueError, match="2 keys for a batch of 3"):
        Keyed(ROWS[:2]).normal((3, 1))
    with pytest.raises(ValueError, match="2 keys"):
        Keyed(ROWS[:2]).uniform((1, 4))
