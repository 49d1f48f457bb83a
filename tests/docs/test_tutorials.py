"""The Python of the pages runs as it stands; options of commands exist, those of several GPUs are plans."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def commands(page: Path) -> list[list[str]]:
    """The `gencontrol …` commands of a page, split as a shell does; environment and launcher in front are left out."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines if "gencontrol" in line and not line.startswith("git")]
    return [words[words.index("gencontrol") + 1 :] for words in split if "gencontrol" in words]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.stem == "robot-policy":
        pytest.importorskip("gymnasium_robotics", reason='needs pip install "gencontrol[robotics]"')
    if page.stem == "own-pipeline":
        from tests.helpers.fixtures_images import tiny_sd3

        tiny_sd3().save_pretrained(tmp_path / "models" / "sd3")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module = ModuleType("page")  # dataclasses look up the module of a class
    monkeypatch.setitem(sys.modules, "page", module)
    names = vars(module)
    for block in blocks(page, "python"):
        title = re.match(r"# (\w+\.py)\n", block)
        if title:  # a file that later commands and blocks name
            (tmp_path / title[1]).write_text(block, encoding="utf-8")
        exec(compile(block, str(page), "exec"), names)
    if page.stem == "concepts":
        # its last block samples the exact tilt of a mixture: 0.2·e^{2.05}/(0.2·e^{2.05} + 0.8·e^{-1.95}) = 0.932 in the
        # right mode; 1000 samples have a standard error of 0.008
        assert abs(float((names["x"] > 0).double().mean()) - 0.932) < 0.04


def test_pages_have_python_and_commands() -> None:
    assert {page.stem for page in WITH_PYTHON} >= {"own-pipeline", "search", "robot-policy", "own-method", "concepts"}
    assert sum(len(commands(page)) for page in PAGES) > 40


@pytest.mark.slow
def test_options_in_commands_exist() -> None:
    helps: dict[tuple[str, ...], str] = {}
    wrong = []
    for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for words in commands(page):
            name = tuple(words[:2]) if words[0] in ("bench", "pretrain") else tuple(words[:1])
            if name not in helps:
                command = [sys.executable, "-m", "gencontrol", *name, "--help"]
                helps[name] = subprocess.run(
                    command, capture_output=True, text=True, cwd=ROOT, env=_wide(), check=False
                ).stdout
            flags = {word.split("=")[0] for word in words if word.startswith("--")} - {"--"}
            if name != ("bench", "faults"):  # what follows its -- is another command
                wrong += [f"{page.name}: {' '.join(name)} {flag}" for flag in flags if flag not in helps[name]]
    assert not wrong, "\n".join(wrong)


def _wide() -> dict[str, str]:
    import os

    return {**os.environ, "COLUMNS": "300", "TERMINAL_WIDTH": "300", "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_commands_of_several_gpus_are_plans(tmp_path: Path) -> None:
    """Each finetune of the page in one process, without the work: a dry run checks all that is asked before loading."""
    page = ROOT / "docs" / "tutorials" / "several-gpus.md"
    found = [words for words in commands(page) if "--config" not in words]
    assert len(found) >= 4
    for words in found:
        command = [sys.executable, "-m", "gencontrol", *[word for word in words if word != "--dry-run"], "--dry-run"]
        if "--shard" in command:
            command.remove("--shard")  # sharding one process is refused by a plan as well
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=_wide())
        assert done.returncode == 0, done.stderr
