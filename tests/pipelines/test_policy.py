"""Policy pipelines: load, act, save, compose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gencontrol.errors import UsageError
from gencontrol.pipelines import ComposedPolicyPipeline, PolicyPipeline
from tests.helpers.policy_cases import STATE, small_policy

SEEN = {"state": np.linspace(-1, 1, STATE, dtype=np.float32)}


def test_a_pipeline_is_its_policy(tmp_path: Path) -> None:
    """Saved and loaded, the same actions; a vector of environments gives a row each; reset starts again."""
    policy = small_policy("diffusion", "mlp")
    PolicyPipeline(policy).save_pretrained(tmp_path / "a")
    pipe = PolicyPipeline.from_pretrained(tmp_path / "a").to("cpu")
    assert pipe.spec == policy.spec
    first = pipe.select_action(SEEN)
    assert np.array_equal(first, policy.select_action(SEEN))
    assert not np.array_equal(pipe(SEEN), first)
    pipe.reset()
    assert np.array_equal(pipe(SEEN), first)
    assert pipe({"state": np.stack([SEEN["state"]] * 3)}).shape == (3, policy.spec.action_dim)


def test_composition_of_folders(tmp_path: Path) -> None:
    """All the weight on one parent is that parent; equal weights are another action."""
    for name, kind in (("a", "diffusion"), ("b", "flow")):
        small_policy(kind, "mlp").save_pretrained(tmp_path / name)
    parents = {"a": tmp_path / "a", "b": PolicyPipeline.from_pretrained(tmp_path / "b").policy}
    alone = PolicyPipeline.from_pretrained(tmp_path / "b")(SEEN)
    assert np.array_equal(ComposedPolicyPipeline(parents, [0.0, 1.0])(SEEN), alone)
    mixed = ComposedPolicyPipeline(parents)
    assert list(mixed.policy.weights) == [0.5, 0.5]  # type: ignore[arg-type]
    assert not np.array_equal(mixed(SEEN), alone)


def test_what_is_no_policy_is_refused(tmp_path: Path) -> None:
    """Objects without the two methods, compositions from one path, folders for foreign policies."""
    with pytest.raises(UsageError, match="no reset"):
        PolicyPipeline(object())
    with pytest.raises(UsageError, match="several policies"):
        ComposedPolicyPipeline.from_pretrained(tmp_path)
    with pytest.raises(UsageError, match="no folder format"):
        composed = ComposedPolicyPipeline([small_policy("flow", "mlp"), small_policy("flow", "mlp")])
        composed.save_pretrained(tmp_path / "c")
