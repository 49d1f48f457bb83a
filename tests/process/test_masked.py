"""The masked process: visibility, weights, transition probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from gencontrol.process import MaskedProcess

TIMES = torch.linspace(0.05, 0.95, 13, dtype=torch.float64)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_weight_is_the_log_derivative(schedule: str) -> None:
    process, step = MaskedProcess(5, 5, schedule), 1e-6
    slope = (process.visible(TIMES + step) - process.visible(TIMES - step)) / (2 * step)
    torch.testing.assert_close(process.weight(TIMES), -slope / (1 - process.visible(TIMES)), rtol=1e-6, atol=1e-6)
    assert process.weight(0.3) == pytest.approx(float(process.weight(torch.tensor([0.3], dtype=torch.float64))))
    assert process.visible(0.0) == 1.0 and process.visible(1.0) == 0.0
    with pytest.raises(ValueError, match="t = 0"):
        process.weight(0.0)


def test_linear_weight_is_one_over_t() -> None:
    torch.testing.assert_close(MaskedProcess(5, 5).weight(TIMES), 1 / TIMES)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_unmask_probabilities_chain(schedule: str) -> None:
    process = MaskedProcess(5, 5, schedule)
    stay = (1 - process.unmask_probability(0.8, 0.5)) * (1 - process.unmask_probability(0.5, 0.2))
    assert stay == pytest.approx(1 - process.unmask_probability(0.8, 0.2))
    assert process.unmask_probability(0.7, 0.0) == pytest.approx(1.0)


def test_corrupt_masks_the_right_share(fenced_rng: None) -> None:
    process, x0 = (
        MaskedProcess(5, 5, "cosine"),
        torch.randint(0, 5, (2, 20000), generator=torch.Generator().manual_seed(0)),
    )
    t = torch.tensor([0.2, 0.6])
    xt = process.corrupt(x0, t, torch.Generator().manual_seed(1))
    masked = process.masked(xt)
    assert torch.equal(xt[~masked], x0[~masked])
    for row, time in enumerate(t.tolist()):
        # 20000 tokens: standard error at most 0.0035
        assert float(masked[row].double().mean()) == pytest.approx(math.sin(math.pi / 2 * time), abs=0.015)
    assert not bool(process.masked(process.corrupt(x0, 0.0, torch.Generator())).any())
    assert bool(process.masked(process.corrupt(x0, 1.0, torch.Generator())).all())


def test_corrupt_of_a_list_does_not_depend_on_the_batch() -> None:
    process, x0 = MaskedProcess(5, 5), torch.zeros(3, 50, dtype=torch.int64)
    three = process.corrupt(x0, 0.5, [torch.Generator().manual_seed(i) for i in range(3)])
    one = process.corrupt(x0[:1], 0.5, [torch.Generator().manual_seed(1)])
    assert torch.equal(three[1:2], one)


def test_forbid_mask_only_touches_a_mask_inside_the_vocabulary() -> None:
    logits = torch.zeros(1, 2, 4)
    assert MaskedProcess(4, 9).forbid_mask(logits) is logits
    inside = MaskedProcess(4, 3).forbid_mask(logits)
    assert torch.isneginf(inside[..., 3]).all() and torch.equal(inside[..., :3], logits[..., :3])


def test_prior_is_all_masks() -> None:
    assert MaskedProcess(4, 9).prior((2, 3)).tolist() == [[9] * 3] * 2
    with pytest.raises(ValueError, match="generators"):
        MaskedProcess(4, 9).prior((2, 3), [torch.Generator()])


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="schedule"):
        MaskedProcess(4, 4, "square")
    with pytest.raises(ValueError, match="vocab_size"):
        MaskedProcess(0, 4)
