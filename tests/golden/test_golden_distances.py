"""Fréchet distance and Vendi score against the packages that are used for them."""

from __future__ import annotations

import pytest

from gencontrol.rewards.distribution import frechet_distance, vendi_score
from gencontrol.rewards.sets.gaussian import Gaussian
from tests.helpers.golden import cases, tensors

CASES = cases("frechet_vendi")


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("frechet")])
def test_frechet_distance(case: str) -> None:
    """frechet_audio_distance and fadtk; fewer samples than dimensions leave a singular covariance."""
    data = tensors("frechet_vendi", case)
    one, two = data["features_1"], data["features_2"]
    tolerance = 1e-6 if "singular" in case else 1e-9
    for found in (frechet_distance(one, two), Gaussian.of(one).distance(Gaussian.of(two))):
        assert found == pytest.approx(float(data["fad_package"]), rel=tolerance)
        assert found == pytest.approx(float(data["fadtk"]), rel=tolerance)


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("vendi")])
def test_vendi_score(case: str, form: str) -> None:
    """Order 1, the second of the package's four."""
    data = tensors("frechet_vendi", case)
    expected = data["score" if form == "primal" else "score_dual"][1]
    assert vendi_score(data["features"], form=form) == pytest.approx(float(expected), rel=1e-9)  # type: ignore[arg-type]
