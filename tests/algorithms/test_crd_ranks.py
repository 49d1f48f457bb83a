"""Two processes with half of the groups each sum to the gradient of one process, also with means over the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_dragon_ranks
import torch

from gencontrol.algorithms.base import StepContext
from tests.helpers.crd_rank import measure


@pytest.mark.timeout(180)
def test_two_ranks_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_dragon_ranks, "WORKER", Path(__file__).parents[1] / "helpers" / "crd_rank.py")
    ranks = test_dragon_ranks.launch(tmp_path, 2)
    for center in ("group", "batch"):
        alone = measure(StepContext(seed=0, step=0, micro_batch=1000), center)
        parts = [rank[center] for rank in ranks]
        assert all(part["metrics"] == pytest.approx(alone["metrics"], rel=1e-4) for part in parts)
        assert sum(part["count"] for part in parts) == alone["count"]
        total = sum(torch.tensor(part["gradient"]) for part in parts)
        expected = torch.tensor(alone["gradient"])
        # 1e-4: float32 sums in another order
        assert (total - expected).norm() < 1e-4 * expected.norm(), center
