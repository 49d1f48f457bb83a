"""Parts of CTRL's pool: self-trained classifiers, the control at half resolution, weights of the target."""

from __future__ import annotations

import pytest
import torch

from gencontrol.algorithms.ctrl.ceiling import annealed, effective, target_weights
from gencontrol.errors import UsageError
from gencontrol.models.conditions.control import control_net
from gencontrol.models.readers.self_training import Affine, Budget, Mixed, fit_self_trained
from gencontrol.rng import stream


def test_self_training_reaches_the_base() -> None:
    """Two classes by brightness, four images each; the base's are fainter: the final classifier reads both."""
    generator = stream(0, "test/bright")
    level = torch.tensor([-0.6, 0.6]).repeat(4)
    images = level[:, None, None, None] + 0.1 * torch.randn(8, 1, 8, 8, generator=generator)
    truth = torch.tensor([0, 1]).repeat(16)
    base = (truth * 0.6 - 0.3)[:, None, None, None] + 0.1 * torch.randn(32, 1, 8, 8, generator=generator)
    budget = Budget(member_steps=15, final_steps=25, batch=8)
    model = fit_self_trained(
        images, torch.tensor([0, 1]).repeat(4), ("dark", "bright"), base, augment=Affine(), members=2, budget=budget
    )
    assert model.config.held_out == 1.0
    assert float((model(base).argmax(1) == truth).float().mean()) > 0.95


def test_augmentations_keep_what_they_must() -> None:
    images = torch.rand(6, 3, 8, 8, generator=stream(0, "test/images"))
    mixed = Mixed(channels=True)(images, stream(1, "test/mixed"))
    assert torch.allclose(mixed.flatten(1).sort(1).values, images.flatten(1).sort(1).values)  # the same values, moved
    moved = Affine()(images, stream(1, "test/affine"))
    assert moved.shape == images.shape and float(moved.min()) >= 0 and float(moved.max()) <= 1
    still = Affine(0.0, 0.0, 0.0)(images, stream(1, "test/affine"))
    torch.testing.assert_close(still, images, rtol=1e-4, atol=1e-5)


def test_half_resolution_starts_at_zero_and_keeps_the_shape() -> None:
    net = control_net((3, 16, 16), 4, 16, 1, half=True)
    x, t, y = torch.randn(2, 3, 16, 16, generator=stream(0, "x")), torch.tensor([0.2, 0.7]), torch.ones(2, 4)
    found = net(x, x, t, y)
    assert found.shape == x.shape and not found.any()
    for shape in ((3, 18, 18), (2,), (1, 8, 8)):
        with pytest.raises(UsageError, match="half resolution"):
            control_net(shape, 4, 16, 1, half=True)


def test_weights_of_the_target_by_prompt_and_their_effective_number() -> None:
    values = torch.tensor([[0.0, -1.0], [-3.0, -1.0], [-1.0, -1.0], [-3.0, -1.0]], dtype=torch.float64)
    shares = target_weights(values, torch.tensor([2.0, 2.0]).double(), prompts=2)
    assert shares.sum(0).tolist() == pytest.approx([1.0, 1.0])
    # prompt 0 has rows 0 and 2 with odds e², prompt 1 rows 1 and 3 alike
    assert float(shares[0, 0] / shares[2, 0]) == pytest.approx(7.389056, rel=1e-6)
    assert shares[[1, 3], 0].tolist() == pytest.approx([0.25, 0.25])
    assert effective(shares)[1] == pytest.approx(4.0)
    many = -5 * torch.rand(400, 1, generator=stream(0, "v")).double()
    gamma = annealed(many, 50.0, 40.0, 1)
    assert effective(target_weights(many, gamma, 1))[0] == pytest.approx(40.0, rel=1e-3) and 0 < gamma < 50
    assert annealed(many, 0.1, 40.0, 1).tolist() == pytest.approx([0.1])
