"""Test-wide rules: offline, one thread, no draw from the global random generator, shapes checked at run time."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import pytest
import torch
from jaxtyping import install_import_hook

# shape annotations are inert in production and enforced here, in the packages whose signatures carry the mathematics
install_import_hook(["gencontrol.process", "gencontrol.sampling", "gencontrol.models.exact"], "beartype.beartype")

torch.set_num_threads(1)


@pytest.fixture
def fenced_rng() -> Iterator[None]:
    """Fail when the code under test draws from torch's global generator."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state()), "the global random generator was used"
