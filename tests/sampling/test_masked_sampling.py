"""Masked samplers against the table of EnumerableTokens: total variation, prompts, counts, log-probabilities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gencontrol.models import EnumerableTokens
from gencontrol.process import MaskedProcess
from gencontrol.rng import item_generators
from gencontrol.sampling import State, ancestral, blocks, confidence, sample
from gencontrol.sampling.masked_steps import inverse_cdf

N = 8000
#: expected total variation of N draws over 27 states is below 0.4·sqrt(27/N) = 0.023; plus the bias stated.
NOISE = 0.035


def tokens(schedule: str = "linear") -> EnumerableTokens:
    """A strongly correlated law over 3 tokens at 3 positions."""
    table = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(3)) ** 6
    return EnumerableTokens(table, MaskedProcess(3, 3, schedule))


def total_variation(model: EnumerableTokens, x: Tensor) -> float:
    counts = torch.zeros_like(model.table)
    counts.index_put_(tuple(x.T), torch.ones(len(x), dtype=torch.float64), accumulate=True)
    return float((counts / len(x) - model.table).abs().sum() / 2)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ancestral_follows_the_law(schedule: str, fenced_rng: None) -> None:
    model = tokens(schedule)
    x = sample(model, (N, 3), steps=40, step="ancestral", generator=torch.Generator().manual_seed(0))
    # bias: two positions shown in one of 40 steps, about 3/40 of the pairs
    assert total_variation(model, x) < NOISE + 0.03
    few = sample(model, (N, 3), steps=1, step="ancestral", generator=torch.Generator().manual_seed(0))
    assert total_variation(model, few) > 0.15  # one step draws independent tokens: the test can fail


@pytest.mark.parametrize(
    "step",
    [confidence(temperature=1.0), blocks(size=1, inner=confidence(temperature=1.0)), blocks(size=1, inner=ancestral())],
    ids=str,
)
def test_one_token_per_step_is_the_exact_law(step, fenced_rng: None) -> None:
    model = tokens()
    x = sample(model, (N, 3), steps=3, step=step, generator=torch.Generator().manual_seed(0))
    assert total_variation(model, x) < NOISE


def test_blocks_with_many_inner_steps_follow_the_law() -> None:
    model = tokens()
    step = blocks(size=2, inner=ancestral())
    x = sample(model, (N, 3), steps=40, step=step, generator=torch.Generator().manual_seed(0))
    assert total_variation(model, x) < NOISE + 0.03


def test_blocks_fill_from_left_to_right_and_cross_borders() -> None:
    model, step = tokens(), blocks(size=1, inner=confidence())
    path = sample(model, (2, 3), steps=3, step=step, keep_path=True)
    assert [(state == 3).sum(1).tolist() for state in path.states] == [[3, 3], [2, 2], [1, 1], [0, 0]]
    assert bool((path.states[1][:, 1:] == 3).all()) and bool((path.states[2][:, 2:] == 3).all())
    assert torch.equal(sample(model, (2, 3), steps=2, step=step), path.x)  # a step over a border makes both blocks
    assert torch.equal(sample(model, (2, 3), steps=7, step=step), path.x)


def test_blocks_start_after_the_prompt() -> None:
    model, start = tokens(), torch.tensor([[2, 3, 3]])
    step = blocks(size=1, inner=confidence(), start=1)
    path = sample(model, (1, 3), steps=2, step=step, x_init=start, keep_path=True)
    assert path.states[1][0, 2] == 3 and path.states[1][0, 1] != 3
    with pytest.raises(ValueError, match="position"):
        sample(model, (1, 3), steps=2, step=blocks(start=3))


def test_prompts_stay_and_condition_the_law() -> None:
    model = tokens()
    start = torch.tensor([[3, 2, 3]]).repeat(N, 1)
    x = sample(model, (N, 3), steps=40, x_init=start, generator=torch.Generator().manual_seed(0))
    assert bool((x[:, 1] == 2).all())
    given = model.table[:, 2] / model.table[:, 2].sum()
    counts = torch.zeros_like(given)
    counts.index_put_((x[:, 0], x[:, 2]), torch.ones(N, dtype=torch.float64), accumulate=True)
    assert float((counts / N - given).abs().sum() / 2) < NOISE + 0.03


def test_confidence_reveals_the_scheduled_number_surest_first() -> None:
    class Fixed:
        process = MaskedProcess(4, 4)

        def __call__(self, xt: Tensor, t, cond=None):
            from gencontrol.models.denoiser import TokenPred

            sure = torch.tensor([0.0, 3.0, 1.0, 5.0, 2.0, 4.0])
            return TokenPred(sure[None, :, None] * torch.eye(4)[1].expand(len(xt), 6, 4), xt)

    path = sample(Fixed(), (1, 6), steps=3, step="confidence", keep_path=True)
    assert [(state == 4).sum().item() for state in path.states] == [6, 4, 2, 0]
    assert (path.states[1][0] == 4).tolist() == [True, True, True, False, True, False]
    assert (path.states[2][0] == 4).tolist() == [True, False, True, False, False, False]


def test_log_prob_is_that_of_the_revealed_tokens() -> None:
    model, step = tokens(), ancestral()
    x = torch.tensor([[3, 1, 3], [3, 3, 3]])
    noise = step.draw(x, torch.Generator().manual_seed(1))
    done = step(model, State(x), 0.8, 0.3, None, noise)
    log_probs = model(x, 0.8).log_probs
    for row in range(2):
        shown = [(p, int(done.x[row, p])) for p in range(3) if x[row, p] == 3 and done.x[row, p] != 3]
        expected = sum(float(log_probs[row, p, v]) for p, v in shown)
        assert float(done.log_prob[row]) == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(step.log_prob(model, x, done.x, 0.8), done.log_prob)


def test_one_position_at_a_time_the_path_log_prob_is_the_law() -> None:
    model = tokens()
    step = blocks(size=1, inner=confidence(temperature=1.0))
    path = sample(model, (50, 3), steps=3, step=step, generator=torch.Generator().manual_seed(0), keep_path=True)
    torch.testing.assert_close(path.log_probs.sum(0).double(), model.log_prob(path.x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step", [ancestral(), confidence(temperature=0.7), blocks(size=2, inner=ancestral())], ids=str)
def test_a_sample_does_not_depend_on_its_batch(step, fenced_rng: None) -> None:
    many = sample(tokens(), (6, 3), steps=4, step=step, generator=item_generators(1, "a", range(6)))
    for item in (0, 4):
        one = sample(tokens(), (1, 3), steps=4, step=step, generator=item_generators(1, "a", [item]))
        assert torch.equal(many[item : item + 1], one)


def test_times_per_item() -> None:
    model, step = tokens(), ancestral()
    x, noise = torch.full((3, 3), 3), torch.rand(3, 3, 2, generator=torch.Generator().manual_seed(0)).double()
    t, t_next = torch.tensor([0.9, 0.5, 0.2]), torch.tensor([0.4, 0.3, 0.0])
    together = step(model, State(x), t, t_next, None, noise)
    for row in range(3):
        alone = step(model, State(x[:1]), float(t[row]), float(t_next[row]), None, noise[row : row + 1])
        assert torch.equal(together.x[row : row + 1], alone.x)
    assert not bool((together.x[2] == 3).any())
    with pytest.raises(ValueError, match="float times"):
        blocks()(model, State(x), t, t_next, None, None)


def test_temperature_and_greedy() -> None:
    model, x = tokens(), torch.full((1, 3), 3)
    warm = ancestral(temperature=2.0).law(model, x, 0.5).exp()
    expected = model(x, 0.5).log_probs.exp().sqrt()
    torch.testing.assert_close(warm, expected / expected.sum(-1, keepdim=True))
    greedy = sample(model, (1, 3), steps=3, step="confidence")
    assert torch.equal(greedy, sample(model, (1, 3), steps=3, step="confidence"))
    assert not confidence().stochastic and ancestral(temperature=0.0).stochastic
    with pytest.raises(ValueError, match="temperature"):
        confidence(temperature=-1.0)
    with pytest.raises(ValueError, match="noise"):
        ancestral()(model, State(x), 0.5, 0.4)


def test_inverse_cdf_never_draws_an_impossible_token() -> None:
    log_probs = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]).log().expand(1, 4, 5)
    draw = torch.tensor([[0.0, 0.49, 0.5, 1 - 1e-16]], dtype=torch.float64)
    assert inverse_cdf(log_probs, draw).tolist() == [[1, 1, 3, 3]]


def test_a_mask_inside_the_vocabulary_is_never_generated() -> None:
    class Wants:
        process = MaskedProcess(3, 2)

        def __call__(self, xt: Tensor, t, cond=None):
            from gencontrol.models.denoiser import TokenPred

            return TokenPred(torch.tensor([0.0, 0.0, 9.0]).expand(*xt.shape, 3), xt)

    x = sample(Wants(), (200, 4), steps=3, generator=torch.Generator().manual_seed(0))
    assert set(x.flatten().tolist()) == {0, 1}
