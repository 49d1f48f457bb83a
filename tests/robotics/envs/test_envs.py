"""The vector layer: masked reset, rows that crash or hang, time limits, spaces, families of ids."""

from __future__ import annotations

import sys
import time
import types
from typing import Any

import numpy as np
import pytest

from gencontrol.errors import EnvironmentMissing, UsageError
from gencontrol.robotics.envs import probe
from gencontrol.robotics.envs.gymnasium import SuccessRule, flatten
from gencontrol.robotics.envs.make import FAMILIES, family_of, make_env, require
from gencontrol.robotics.envs.types import EnvSpec, Timeouts, Transition
from gencontrol.robotics.envs.vector import Envs, make_envs
from gencontrol.robotics.envs.worker import (
    pack_transition,
    spec_from_json,
    spec_to_json,
    unpack,
    unpack_transition,
)

POINT = "tests.helpers.toy_envs:point"
QUICK = Timeouts(make_s=60.0, reset_s=20.0, step_s=1.0)


def _walk(envs: Envs, row: int, steps: int) -> Any:
    batch = None
    for _ in range(steps):
        batch = envs.step([row], np.zeros((1, 2), np.float32))
    return batch


def test_a_row_is_reset_alone_and_by_its_seed() -> None:
    with make_envs(POINT, 3, isolation="inline") as envs:
        first = envs.reset([0, 1, 2], [5, 6, 5])
        assert np.array_equal(first.observation["place"][0], first.observation["place"][2])
        _walk(envs, 1, 4)
        again = envs.reset([0], [6])
        assert np.array_equal(again.observation["place"][0], first.observation["place"][1])
        assert envs.step([1], np.zeros((1, 2))).observation["time"][0, 0] == pytest.approx(0.05)
        assert first.observation["place"].dtype == np.float32


def test_an_ended_row_waits_for_its_reset() -> None:
    with make_envs(POINT, 1, kwargs={"ends": False}, isolation="inline") as envs:
        envs.reset([0], [0])
        batch = _walk(envs, 0, 12)
        assert batch.truncated[0] and not batch.terminated[0] and batch.ended[0]
        with pytest.raises(UsageError, match="row 0 has ended"):
            _walk(envs, 0, 1)
        envs.reset([0], [1])
        assert not _walk(envs, 0, 1).ended[0]


def test_wrong_numbers_of_actions_and_seeds_are_refused() -> None:
    with make_envs(POINT, 2, isolation="inline") as envs:
        with pytest.raises(UsageError, match="1 seeds for 2 rows"):
            envs.reset([0, 1], [3])
        envs.reset([0, 1], [3, 4])
        with pytest.raises(UsageError, match=r"\(2, 3\)"):
            envs.step([0, 1], np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("isolation", "trouble", "reason"),
    [
        ("inline", "raise", "crash: ValueError: the arm fell off"),
        ("process", "raise", "crash: ValueError: the arm fell off"),
        ("inline", "shape", "wrong shape: observation 'place' is (1,)"),
    ],
)
def test_a_fault_costs_one_row(isolation: Any, trouble: str, reason: str) -> None:
    with make_envs(POINT, 2, kwargs={"trouble": trouble, "ends": False}, isolation=isolation) as envs:
        envs.reset([0, 1], [1, 2])
        for _ in range(2):
            assert not envs.step([0, 1], np.zeros((2, 2))).faults
        batch = envs.step([0, 1], np.zeros((2, 2)))
        assert list(batch.faults) == [0] and batch.faults[0].startswith(reason), batch.faults
        assert batch.faults[0].endswith("(at step 3)") and list(batch.ended) == [True, False]
        assert not envs.step([1], np.zeros((1, 2))).faults, "the other row goes on"
        assert not envs.reset([0], [2]).faults, "and the broken one is made anew"


def test_a_process_that_dies() -> None:
    with make_envs(POINT, 1, kwargs={"trouble": "die", "ends": False}, timeouts=QUICK) as envs:
        envs.reset([0], [1])
        _walk(envs, 0, 2)
        begin = time.monotonic()
        reason = "crash: its process ended with SIGSEGV (segmentation is coming) (at step 3)"
        assert _walk(envs, 0, 1).faults == {0: reason}
        assert time.monotonic() - begin < 15.0
        assert not envs.reset([0], [3]).faults


def test_other_faults_are_told() -> None:
    for trouble, reason in (
        ("nan", "not finite: observation 'place'"),
        ("nan reward", "not finite: the reward is nan"),
    ):
        with make_envs(POINT, 1, kwargs={"trouble": trouble, "ends": False}, isolation="inline") as envs:
            envs.reset([0], [1])
            _walk(envs, 0, 2)
            assert _walk(envs, 0, 1).faults[0].startswith(reason)
    with make_envs(POINT, 1, kwargs={"trouble": "reset"}, isolation="inline") as envs:
        assert envs.reset([0], [1]).faults == {0: "crash: RuntimeError: no such place (at the reset)"}
        assert not envs.reset([0], [2]).faults


def test_time_limits() -> None:
    endless = "tests.helpers.toy_envs:endless"
    spec = make_env(endless).spec
    assert (spec.time_limit, spec.limit_from) == (1000, "our default")
    with make_envs(endless, 1, time_limit=3) as envs:
        assert envs.spec.limit_from == "asked for"
        envs.reset([0], [0])
        assert not _walk(envs, 0, 2).truncated[0]
        assert _walk(envs, 0, 1).truncated[0]
    with pytest.raises(UsageError, match="at least 1"):
        make_env(endless, time_limit=0)


def test_what_cannot_be_made_is_one_line() -> None:
    for env_id, kwargs, said in (
        ("tests.helpers.toy_envs:Discrete", {}, "takes actions of Discrete"),
        ("tests.helpers.toy_envs:nothing", {}, "cannot be imported"),
        (POINT, {"colour": 1}, "cannot be made with {'colour': 1}"),
        ("Pendulum-v9", {}, "Pendulum-v1"),
    ):
        with pytest.raises(UsageError, match="environment '") as caught:
            make_envs(env_id, kwargs=kwargs, time_limit=5, isolation="inline")
        assert said in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="give process or inline"):
        make_envs(POINT, isolation="thread")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least 1"):
        make_envs(POINT, 0)


def test_a_missing_package_names_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.raises(EnvironmentMissing, match=r'pip install "gencontrol\[robotics\]"'):
        require(family_of("FetchPush-v4"))
    for env_id, line in (("robosuite/Lift", 'pip install "robosuite'), ("libero/libero_10/0", "pip install hf-libero")):
        with pytest.raises(EnvironmentMissing) as caught:
            make_env(env_id)
        assert line in str(caught.value)


def test_families() -> None:
    ids = {
        "PointMaze_UMaze-v3": "PointMaze",
        "FetchPush-v4": "Fetch",
        "gym_pusht/PushT-v0": "PushT",
        "robosuite/Lift": "robosuite",
        "libero/libero_10/3": "LIBERO",
        "Pendulum-v1": "Gymnasium",
    }
    assert {env_id: family_of(env_id).name for env_id in ids} == ids
    assert len(FAMILIES) == len(ids)


def test_success_rules() -> None:
    auto = SuccessRule.parse("auto")
    assert auto.read(0.0, True, {}) is None
    assert auto.read(0.0, False, {"success": np.float32(1.0)}) is True
    assert auto.read(0.0, False, {"is_success": np.array(False), "success": True}) is False
    assert SuccessRule.parse("terminated").read(0.0, True, {}) is True
    assert SuccessRule.parse("info:done").read(0.0, False, {"done": 1}) is True
    rule = SuccessRule.parse("reward>=0.95")
    assert (rule.read(0.95, False, {}), rule.read(0.94, False, {})) == (True, False)
    for wrong in ("reward>0.9", "reward>=much", "info:", "yes"):
        with pytest.raises(UsageError, match="give auto"):
            SuccessRule.parse(wrong)


def test_observations_are_flattened() -> None:
    flat = flatten({"a": {"b": np.zeros(2), "image": np.zeros((2, 2, 3), np.uint8)}, "c": 1})
    assert {key: value.dtype.name for key, value in flat.items()} == {
        "a/b": "float32",
        "a/image": "uint8",
        "c": "float32",
    }
    assert list(flatten(np.ones(3))) == ["observation"]


def test_messages_come_back_unchanged() -> None:
    step = Transition(
        {"x": np.arange(6.0, dtype=np.float32).reshape(2, 3), "i": np.ones((1, 1, 3), np.uint8)}, 0.5, True, False, None
    )
    again = unpack_transition(*unpack(pack_transition(step)))
    assert again[1:] == step[1:]
    assert all(np.array_equal(again.observation[key], step.observation[key]) for key in step.observation)
    spec = EnvSpec("e", {"x": (2, 3)}, (-np.inf, -1.0), (np.inf, 1.0), 7, images=("i",), kwargs={"a": 1})
    assert spec_from_json(spec_to_json(spec)) == spec


def test_doctor_tells_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two families stand for all: one that runs, one whose package is missing."""
    few = [family for family in FAMILIES if family.name in ("Gymnasium", "robosuite")]
    monkeypatch.setattr(probe, "FAMILIES", few)
    found = {finding.name: finding for finding in probe.probe()}
    assert found["Gymnasium"].works and "Pendulum-v1 runs" in found["Gymnasium"].detail
    if not found["robosuite"].works:
        assert "pip install" in found["robosuite"].detail
    assert "rendering" in found


# ---- robosuite and LIBERO against fakes with the real names of steps and observations ------------------------------


class _FakeLift:
    """robosuite's interface: four values, `action_spec`, `_check_success`, `rng`, `sim.render`."""

    def __init__(self) -> None:
        self.action_spec = (-np.ones(7), np.ones(7))
        self.rng = np.random.default_rng(0)
        self.sim = types.SimpleNamespace(
            render=lambda camera_name, height, width: np.zeros((height, width, 3), np.uint8)
        )

    def reset(self) -> dict[str, Any]:
        self.count = 0
        self.height = self.rng.uniform()
        return self._see()

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, dict[str, Any]]:
        assert action.shape == (7,)
        self.count += 1
        return self._see(), 0.0, False, {}

    def _check_success(self) -> bool:
        return self.count == 2

    def close(self) -> None:
        pass

    def _see(self) -> dict[str, Any]:
        image = np.zeros((4, 4, 3), np.uint8)
        image[0] = 255  # the lowest row: OpenGL counts from below
        return {
            "robot0_eef_pos": np.full(3, self.height),
            "robot0_gripper_qpos": np.zeros(2),
            "object-state": np.zeros(10),
            "robot0_proprio-state": np.zeros(32),
            "agentview_image": image,
        }


def test_robosuite(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    def make(name: str, **kwargs: Any) -> _FakeLift:
        made.update(kwargs, name=name)
        return _FakeLift()

    fake = types.SimpleNamespace(ALL_ENVIRONMENTS=["Lift", "PickPlaceCan", "Door"], make=make)
    monkeypatch.setitem(sys.modules, "robosuite", fake)  # type: ignore[arg-type]
    env = make_env("robosuite/Can", kwargs={"use_camera_obs": True})
    assert made["name"] == "PickPlaceCan" and made["ignore_done"] and made["has_offscreen_renderer"]
    spec = env.spec
    assert spec.observations == {
        "robot0_eef_pos": (3,),
        "robot0_gripper_qpos": (2,),
        "object": (10,),
        "agentview_image": (4, 4, 3),
    }
    assert (spec.images, spec.time_limit, spec.action_dim) == (("agentview_image",), 400, 7)
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    first = env.reset(3)
    assert (first["agentview_image"][-1] == 255).all(), "images are upright"
    flags = [env.step(np.zeros(7, np.float32)).success for _ in range(3)]
    assert flags == [False, True, False]
    assert np.array_equal(env.reset(3)["robot0_eef_pos"], first["robot0_eef_pos"])
    assert not np.array_equal(env.reset(4)["robot0_eef_pos"], first["robot0_eef_pos"])
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no task 'Lifft'. Did you mean 'Lift'"):
        make_env("robosuite/Lifft")
    with pytest.raises(UsageError, match="no time limit is known"):
        make_env("robosuite/Door")
    with pytest.raises(UsageError, match="know their success"):
        make_env("robosuite/Lift", success="terminated")


class _FakeLibero:
    """OffScreenRenderEnv: seed, reset, set_init_state, step with four values, check_success."""

    log: list[Any] = []

    def __init__(self, bddl_file_name: str, camera_heights: int, camera_widths: int) -> None:
        self.size = camera_heights
        self.log.append(bddl_file_name)

    def seed(self, seed: int) -> None:
        self.log.append(("seed", seed))

    def reset(self) -> None:
        self.log.append("reset")

    def set_init_state(self, state: Any) -> dict[str, Any]:
        self.log.append(("state", int(state[0])))
        self.count, self.start = 0, state[0]
        return self._see()

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, dict[str, Any]]:
        assert isinstance(action, list) and len(action) == 7
        self.count += 1
        return self._see(), float(self.check_success()), False, {}

    def check_success(self) -> bool:
        return self.count >= 12

    def close(self) -> None:
        pass

    def _see(self) -> dict[str, Any]:
        image = np.zeros((self.size, self.size, 3), np.uint8)
        image[0, 0] = 255
        return {
            "agentview_image": image,
            "robot0_eye_in_hand_image": image,
            "robot0_eef_pos": np.full(3, self.start),
            "robot0_eef_quat": np.array([0.0, 0.0, np.sin(0.25), np.cos(0.25)]),
            "robot0_gripper_qpos": np.zeros(2),
        }


def test_libero(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    suite = types.SimpleNamespace(
        n_tasks=10,
        get_task=lambda i: types.SimpleNamespace(language="lift it", problem_folder="spatial", bddl_file=f"{i}.bddl"),
        get_task_init_states=lambda i: np.arange(50.0).reshape(50, 1),
    )
    benchmark = types.SimpleNamespace(get_benchmark_dict=lambda: {"libero_spatial": lambda: suite})
    inner = types.SimpleNamespace(benchmark=benchmark, get_libero_path=lambda key: str(tmp_path))
    for name, module in (
        ("libero", types.SimpleNamespace(libero=inner)),
        ("libero.libero", inner),
        ("libero.libero.envs", types.SimpleNamespace(OffScreenRenderEnv=_FakeLibero)),
    ):
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    with pytest.raises(EnvironmentMissing, match="not configured"):
        make_env("libero/libero_spatial/3")
    (tmp_path / "config.yaml").write_text("")
    env = make_env("libero/libero_spatial/3", kwargs={"camera_heights": 8, "camera_widths": 8})
    assert _FakeLibero.log[0] == str(tmp_path / "spatial" / "3.bddl")
    spec = env.spec
    assert (spec.task, spec.time_limit, spec.observations["state"]) == ("lift it", 280, (8,))
    _FakeLibero.log.clear()
    seen = env.reset(53)
    assert _FakeLibero.log == [("seed", 53), "reset", ("state", 3)]
    assert env.env.count == 10, "ten idle steps"  # type: ignore[attr-defined]
    assert (seen["agentview_image"][-1, -1] == 255).all()
    assert seen["state"] == pytest.approx([3, 3, 3, 0, 0, 0.5, 0, 0])
    steps = [env.step(np.zeros(7, np.float32)) for _ in range(2)]
    assert [step.success for step in steps] == [False, True] == [step.terminated for step in steps]
    for wrong in ("libero/libero_spatial", "libero/libero_spacial/0", "libero/libero_spatial/10"):
        with pytest.raises(UsageError):
            make_env(wrong)


def test_drawing_does_not_change_an_episode() -> None:
    """Fetch moves its markers when it is drawn, which changed the last bits of the steps that follow."""
    pytest.importorskip("gymnasium_robotics", reason='needs pip install "gencontrol[robotics]"')
    found = []
    for draw in (False, True):
        env = make_env("FetchPickAndPlace-v4", render=draw)
        env.reset(3)
        if draw:
            try:
                env.render()
            except Exception as error:  # whatever the graphics library here raises
                pytest.skip(f"nothing can be drawn here: {error}")
        rows = []
        for step in range(12):
            rows.append(env.step(np.array([0.5, -0.3, -1.0, -1.0 if step > 6 else 1.0], np.float32)).observation)
            if draw:
                assert env.render().shape[2] == 3
        env.close()
        found.append(np.stack([row["observation"] for row in rows]))
    assert np.array_equal(found[0], found[1])
