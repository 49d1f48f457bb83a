"""The benchmark of composition: its peers, its verdicts, and the smoke test of both parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gencontrol.bench.gpc.fetch import verdicts_of
from gencontrol.bench.gpc.peers import Ensemble
from gencontrol.cli import main
from gencontrol.rng import Keyed, row_keys
from gencontrol.robotics.policies.chunked import ChunkedPolicy, PolicySpec


class _Parent(ChunkedPolicy):
    """Returns its number plus the first noise of each row."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.spec = PolicySpec({"x": (1,)}, 1, 1, 1, 1)
        self.number = number

    def sample_chunk(self, observation: object, noise: Keyed) -> torch.Tensor:
        return self.number + noise.normal((len(noise), 1, 1))


class _Pair:
    parents = (_Parent(0.0), _Parent(100.0))
    spec = parents[0].spec

    def part(self, index: int, observation: object) -> object:
        return observation


def test_ensembles() -> None:
    """Shared noise keeps its variance, independent draws halve it (tolerance: four standard errors), a switch mixes."""
    noise = Keyed(row_keys(0, "test", torch.arange(4000)))
    drawn = {
        rule: Ensemble(_Pair(), (0.25, 0.75), rule).sample_chunk({}, noise).flatten()  # type: ignore[arg-type]
        for rule in ("mean", "mean, shared noise", "switch")
    }
    assert torch.allclose(drawn["mean, shared noise"], 75.0 + noise.normal((4000, 1, 1)).flatten(), atol=1e-4)
    assert float(drawn["mean"].mean()) == pytest.approx(75.0, abs=0.06)
    assert float(drawn["mean"].var()) == pytest.approx(0.25**2 + 0.75**2, abs=0.06)
    assert float((drawn["switch"] > 50).double().mean()) == pytest.approx(0.75, abs=0.03)


def test_verdicts() -> None:
    """A gain on every tenth episode of 300 has an interval above 0; without one the claim fails."""
    parent = np.arange(300) % 2 == 0
    better = parent | (np.arange(300) % 10 == 1)
    rows = {name: parent.astype(float) for name in ("A", "B", "actions: mean", "broken B: A", "broken B: B")}
    rows |= {"composed": better.astype(float), "broken B: composed": parent.astype(float)}
    assert [check.holds for check in verdicts_of(rows)] == [True, True, True]
    assert {type(check.holds) for check in verdicts_of(rows)} == {bool}  # what JSON takes
    rows |= {"composed": parent.astype(float), "broken B: composed": better.astype(float)}
    assert [check.holds for check in verdicts_of(rows)] == [False, True, False]


def test_policies_smoke_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gymnasium_robotics", reason='needs pip install "gencontrol[robotics]"')
    assert main(["bench", "policies", "--quick", "--parts", "maze", "--output", str(tmp_path)]) == 0
    assert "of 2" in capsys.readouterr().out and (tmp_path / "maze.json").exists()
