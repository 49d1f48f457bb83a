"""A tiny pipeline folder, made once for all tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.search_run import REWARD


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved TextToAudioPipeline with a one-block transformer."""
    from tests.helpers.fixtures_models import tiny_text_to_audio

    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_text_to_audio().save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of four prompts."""
    path = tmp_path / "prompts.txt"
    path.write_text("a bell\ntwo drums\nsad cello\nrain\n")
    return path


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of user rewards."""
    module = f"search_judge_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    return module
