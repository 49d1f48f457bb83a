"""How many functions of ours lie between an observation and its action: what a reader has to follow."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import gencontrol
from tests.helpers.policy_cases import STATE, small_policy

PACKAGE = str(Path(gencontrol.__file__).parent)
SEEN = {"state": np.zeros((2, STATE), np.float32)}


def _deepest(call: Any) -> list[str]:
    """The longest stack of our frames while `call` runs, outermost first."""
    found: list[str] = []

    def look(frame: FrameType | None, event: str, _: Any) -> None:
        nonlocal found
        stack = []
        while event == "call" and frame is not None:
            if frame.f_code.co_filename.startswith(PACKAGE):
                stack.append(frame.f_code.co_name)
            frame = frame.f_back
        if len(stack) > len(found):
            found = stack[::-1]

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


# the transformer is that of all media: inside, a forward, a block and its attention lie below the chunk network
@pytest.mark.parametrize(("backbone", "most"), [("unet", 9), ("mlp", 9), ("transformer", 11)])
@pytest.mark.parametrize(("kind", "options"), [("diffusion", {}), ("diffusion", {"sampler": "ddpm"}), ("flow", {})])
def test_observation_to_action_is_a_short_way(kind: str, options: dict[str, str], backbone: str, most: int) -> None:
    """At most nine frames, the network in the fifth; the first chunk, which makes the table of steps, included."""
    policy = small_policy(kind, backbone, **options)
    for _ in range(2):
        policy.reset(seeds=[0, 1])
        stack = _deepest(lambda: policy.select_action(SEEN))
        assert stack[:3] == ["select_action", "sample_chunk", "draw"]
        assert "planned" not in stack or stack.index("planned") == 4
        assert len(stack) <= most, stack
