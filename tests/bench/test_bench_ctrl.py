"""`bench ctrl`: parts run end to end at toy sizes, and their measures are right where that is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gencontrol.bench.ctrl import main
from gencontrol.bench.ctrl_exact import mode_shares
from gencontrol.errors import UsageError


@pytest.mark.parametrize("part", ["mixture", "linear"])
def test_part_writes_its_numbers(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--parts", part, "--quick", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / f"{part}.json").read_text())
    assert len(next(iter(result["rows"].values()))) == 2  # seeds
    assert all(check["claim"] and check["measured"] for check in result["checks"])
    printed = capsys.readouterr().out
    assert "E-CTRL" in printed and "onfirmed" in printed.replace("NOT CONFIRMED", "onfirmed")


def test_unknown_part() -> None:
    with pytest.raises(UsageError, match="Did you mean 'digits'"):
        main(["--parts", "digit"])


def test_mode_shares_count_weights() -> None:
    x = torch.tensor([[-2.0, 0.1], [2.0, 0.0], [0.1, 2.0], [-1.9, 0.0]])
    assert mode_shares(x, torch.tensor([1.0, 2.0, 3.0, 2.0])).tolist() == pytest.approx([3 / 8, 2 / 8, 3 / 8])
