"""Two processes draw the same samples, build the same sets, share Q, and sum to the gradient of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gencontrol.algorithms.base import StepContext

WORKER = Path(__file__).parents[1] / "helpers" / "dragon_rank.py"


def launch(folder: Path, world: int) -> list[dict]:
    """Run the worker in `world` processes and read what each wrote."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{WORKER.parent}", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, str(WORKER), str(rank), str(world), str(folder)], env=environment)
        for rank in range(world)
    ]
    assert [process.wait(timeout=120) for process in started] == [0] * world
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.timeout(180)
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    from tests.helpers.dragon_rank import measure

    alone = measure(StepContext(seed=0, step=0, micro_batch=1000))
    ranks = launch(tmp_path, 2)
    for rank in ranks:
        assert rank["metrics"] == pytest.approx(alone["metrics"], rel=1e-4)
        assert rank["baseline"] == pytest.approx(alone["baseline"], rel=1e-4)
        assert rank["beta"] == pytest.approx(alone["beta"], rel=1e-4)
    assert alone["baseline"] > 0, "a clamped Q would say nothing"
    assert sum(rank["count"] for rank in ranks) == alone["count"]
    total = sum(torch.tensor(rank["gradient"]) for rank in ranks)
    expected = torch.tensor(alone["gradient"])
    assert (total - expected).norm() < 1e-4 * expected.norm()
