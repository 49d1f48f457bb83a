"""The README's Python runs as it stands, and its `make` targets and commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gencontrol.cli import main

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def _policies(folder: Path) -> None:
    """Save a policy with random weights where the README's commands would have put a trained one."""
    from gencontrol.data.normalize import Normalizer
    from gencontrol.robotics.policies.chunked import PolicySpec
    from gencontrol.robotics.policies.diffusion import DiffusionPolicy, DiffusionPolicyConfig

    spec = PolicySpec({"observation": (25,), "desired_goal": (3,)}, 4, 8, 1, 4)
    sizes = {"observation": 25, "desired_goal": 3, "action": 4}
    plain = {key: Normalizer(torch.zeros(n), torch.ones(n)) for key, n in sizes.items()}
    DiffusionPolicy(spec, DiffusionPolicyConfig(backbone="mlp"), plain).save_pretrained(folder / "runs" / "p")


@pytest.mark.slow
def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gymnasium_robotics", reason='needs pip install "gencontrol[robotics]"')
    _policies(tmp_path)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
    assert len(blocks) >= 3
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert len(names["out"].rewards) == 1 and names["report"].successes in (0, 1, 2)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w[\w-]*)", TEXT, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_paths_of_make_quick_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    paths = re.search(r"^QUICK := (.*)$", makefile, flags=re.M)
    assert paths and len(paths[1].split()) > 20
    assert not [path for path in paths[1].split() if not (ROOT / path).exists()]


def test_commands_of_the_readme_exist() -> None:
    named = set(re.findall(r"`?gencontrol (\w[\w-]*)", TEXT)) - {"is", "does"}
    printed = subprocess.run(
        [sys.executable, "-m", "gencontrol", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    for command in named & {
        *("finetune", "search", "sample", "pretrain", "report", "doctor", "bench"),
        *("train", "collect", "evaluate", "compose"),
    }:
        assert re.search(rf"\b{command}\b", printed), command
    assert {"finetune", "doctor", "search", "evaluate"} <= named


@pytest.mark.parametrize("name", ["demo.toml", "pictures.toml"])
def test_configurations_of_the_readme_are_valid(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert name in (ROOT / "README.md").read_text() + (ROOT / "Makefile").read_text()
    assert main(["finetune", "--config", str(ROOT / name), "--output", "runs/never", "--dry-run"]) == 0
    assert "whole run" in capsys.readouterr().out
