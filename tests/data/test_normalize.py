"""Normalisers: closed forms, inverse, constant dimensions, storage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from gencontrol.data.normalize import MODES, Normalizer, fit_normalizers, pack, statistics, unpack
from gencontrol.errors import UsageError

ROWS = np.random.default_rng(0).normal([3.0, -200.0, 0.0], [2.0, 50.0, 1e-3], (4000, 3)).astype(np.float32)


@pytest.mark.parametrize("mode", MODES)
def test_inverse(mode: str) -> None:
    one = Normalizer.fit(ROWS, mode)
    a = torch.from_numpy(ROWS)
    back = one.denormalize(one.normalize(a))
    assert ((back - a).abs() / a.abs().amax(0)).max() < 1e-6  # rounding: shift and value are of this size
    assert torch.allclose(one.normalize(a), (a - one.shift) / one.scale, rtol=0, atol=0)


def test_ends_and_moments() -> None:
    a = torch.from_numpy(ROWS)
    x = Normalizer.fit(ROWS, "min_max").normalize(a)
    assert torch.allclose(x.amin(0), -torch.ones(3), atol=1e-6) and torch.allclose(x.amax(0), torch.ones(3), atol=1e-6)
    x = Normalizer.fit(ROWS, "mean_std").normalize(a).double()
    assert x.mean(0).abs().max() < 1e-5 and (x.std(0, correction=0) - 1).abs().max() < 1e-5
    x = Normalizer.fit(ROWS, "quantiles").normalize(a).double()
    levels = torch.quantile(x, torch.tensor([0.01, 0.99], dtype=torch.float64), dim=0)
    assert torch.allclose(levels, torch.tensor([[-1.0], [1.0]], dtype=torch.float64).expand(2, 3), atol=1e-5)
    assert torch.equal(Normalizer.fit(ROWS, "identity").normalize(a), a)


@pytest.mark.parametrize("mode", ["mean_std", "min_max", "quantiles"])
def test_constant_dimensions_are_only_shifted(mode: str) -> None:
    one = Normalizer.fit(np.full((10, 2), [5.0, -7.0]), mode)
    assert torch.equal(one.scale, torch.ones(2))
    assert torch.equal(one.normalize(torch.tensor([5.0, -6.5])), torch.tensor([0.0, 0.5]))


def test_quantiles_of_a_rare_switch_use_its_ends() -> None:
    rows = np.zeros((1000, 1))
    rows[0] = 1.0
    assert torch.equal(
        Normalizer.fit(rows, "quantiles").normalize(torch.tensor([[0.0], [1.0]])).flatten(), torch.tensor([-1.0, 1.0])
    )


def test_storage_keeps_keys_with_dots() -> None:
    many = fit_normalizers(
        {"observation.state": ROWS, "action": ROWS[:, :2]}, {"observation.state": "mean_std", "action": "min_max"}
    )
    back = unpack(load(save(pack(many))))
    assert set(back) == set(many)
    for key, one in many.items():
        assert torch.equal(back[key].shift, one.shift) and torch.equal(back[key].scale, one.scale)


def test_statistics_are_numpys() -> None:
    found = statistics(ROWS)
    assert found["count"] == [4000] and np.array_equal(found["max"], ROWS.max(0))
    assert np.allclose(found["q10"], np.quantile(ROWS.astype(np.float64), 0.1, axis=0), rtol=1e-12)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="Did you mean 'min_max'"):
        Normalizer.fit(ROWS, "minmax")
    with pytest.raises(UsageError, match="'action': .*NaN"):
        fit_normalizers({"action": np.array([[np.nan]])})
    with pytest.raises(UsageError, match="no normaliser is named for 'b'"):
        fit_normalizers({"b": ROWS}, {"a": "min_max"})
    with pytest.raises(UsageError, match="need rows"):
        Normalizer.fit(np.zeros((0, 2)))
    with pytest.raises(UsageError, match="above 0"):
        Normalizer(torch.zeros(2), torch.tensor([1.0, 0.0]))
    with pytest.raises(UsageError, match="has no scale"):
        unpack({"action.shift": torch.zeros(2)})
    with pytest.raises(UsageError, match="statistic 'q99'"):
        Normalizer.from_statistics({"min": np.zeros(1), "max": np.ones(1)}, "quantiles")
