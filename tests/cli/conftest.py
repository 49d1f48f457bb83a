"""A tiny pipeline folder, made once for all tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved TextToAudioPipeline with a one-block transformer."""
    from tests.fixtures_models import tiny_text_to_audio

    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_text_to_audio().save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of four prompts."""
    path = tmp_path / "prompts.txt"
    path.write_text("a bell\ntwo drums\nsad cello\nrain\n")
    return path
