"""The contract that every algorithm passes under the Trainer: subclass `AlgorithmContract` and give `make`.

    from gencontrol.testing import AlgorithmContract

    class TestMine(AlgorithmContract):
        def make(self):
            return Mine(...)          # equal at each call: same weights, same data, same seed

Bit-equality is asserted without tolerance: on one CPU thread, the same operations in the same order give the same bits.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from gencontrol.algorithms.base import Algorithm, HasParameterGroups, LossOut, StepContext
from gencontrol.errors import Preempted
from gencontrol.files import FileLayer
from gencontrol.train.checkpoint import read_verified, split_tensors
from gencontrol.train.run_folder import is_wall_clock
from gencontrol.train.trainer import TrainConfig, Trainer


def state_hash(algorithm: Algorithm) -> str:
    """Return a digest of all roles and of the algorithm's own state."""
    digest = hashlib.sha256()
    roles = {role: dict(weights) for role, weights in algorithm.roles.state_dict().items()}
    tree, tensors = split_tensors({"roles": roles, "own": algorithm.state_dict()})
    digest.update(json.dumps(tree, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def tensor_files(run_dir: Path, step: int) -> dict[str, str]:
    """Return {file: sha256} of everything learned in a checkpoint: roles, optimizer, algorithm."""
    contents = read_verified(run_dir / "checkpoints" / f"step_{step:08d}")
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents.items() if name != "state.json"}


def metric_lines(run_dir: Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl without the fields that depend on the clock or the machine."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not is_wall_clock(key)} for row in rows]


def assert_same_run(first: Path, second: Path, step: int) -> None:
    """Assert that two run folders learned and logged the same, bit by bit."""
    assert tensor_files(first, step) == tensor_files(second, step)
    assert metric_lines(first) == metric_lines(second)


class SignalInLoss:
    """An algorithm that sends SIGTERM to its own process in its `at`-th loss, like a scheduler would."""

    def __init__(self, inner: Algorithm, at: int) -> None:
        self.inner, self.at, self.calls, self.roles = inner, at, 0, inner.roles
        self.collect, self.minibatches, self.after_update = inner.collect, inner.minibatches, inner.after_update
        self.evaluate, self.save_final = inner.evaluate, inner.save_final
        self.state_dict, self.load_state_dict = inner.state_dict, inner.load_state_dict
        if isinstance(inner, HasParameterGroups):
            self.parameter_groups = inner.parameter_groups

    def loss(self, micro: Any, ctx: StepContext) -> LossOut | Mapping[str, LossOut]:
        """The inner loss, after the signal when it is time."""
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.inner.loss(micro, ctx)


class AlgorithmContract(ABC):
    """Base of the contract tests; settings of the short runs may be replaced in the subclass."""

    steps: ClassVar[int] = 3
    train: ClassVar[Mapping[str, Any]] = {}
    #: relative tolerance of the accumulation test; float32 sums in another order differ by about 1e-7 per term
    accumulation_tolerance: ClassVar[float] = 1e-5

    @abstractmethod
    def make(self) -> Algorithm:
        """Return a new algorithm, equal at each call."""

    def config(self, **changes: Any) -> TrainConfig:
        """Settings of the short runs."""
        base: dict[str, Any] = {"steps": self.steps, "micro_batch": 4, "save_every": 100, "lr": 1e-3}
        return TrainConfig(**(base | dict(self.train) | changes))

    def fit(
        self, folder: Path, algorithm: Algorithm | None = None, stop_at: int | None = None, **changes: Any
    ) -> Algorithm:
        """Train (or resume) in a folder; returns the algorithm."""
        algorithm = algorithm or self.make()
        Trainer(self.config(**changes), folder).fit(algorithm, stop_at=stop_at)
        return algorithm

    @pytest.fixture(scope="class")
    def reference(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Run folder of an uninterrupted run with an evaluation at the end."""
        folder: Path = tmp_path_factory.mktemp("reference") / "run"
        request.cls().fit(folder, eval_every=self.steps)
        return folder

    def test_resume_is_bit_equal(self, reference: Path, tmp_path: Path) -> None:
        """R1: stop after the first step, resume into a new object: roles, optimizer, state and metrics are the same."""
        self.fit(tmp_path / "run", stop_at=1, eval_every=self.steps)
        self.fit(tmp_path / "run", eval_every=self.steps)
        assert_same_run(reference, tmp_path / "run", self.steps)

    def test_interrupted_step_is_repeated(self, reference: Path, tmp_path: Path) -> None:
        """R2, G1: SIGTERM half-way through the second step's losses; the repeated step gives the same bits."""
        first = self.make()
        counted = SignalInLoss(first, -1)
        self.fit(tmp_path / "count", counted, stop_at=1)
        stopped = SignalInLoss(self.make(), counted.calls + counted.calls // 2 + 1)
        with pytest.raises(Preempted):
            self.fit(tmp_path / "run", stopped, eval_every=self.steps)
        self.fit(tmp_path / "run", eval_every=self.steps)
        assert_same_run(reference, tmp_path / "run", self.steps)

    def test_every_role_is_restored(self, tmp_path: Path) -> None:
        """R4: a changed tensor in each role's file arrives in that role after a resume."""
        import safetensors.torch

        self.fit(tmp_path / "run", stop_at=1)
        folder = tmp_path / "run/checkpoints/step_00000001"
        manifest = json.loads((folder / "manifest.json").read_text())
        expected = {}
        for path in sorted(folder.glob("role_*.safetensors")):
            tensors = safetensors.torch.load(path.read_bytes())
            if tensors:
                name = sorted(tensors)[0]
                tensors[name] = tensors[name] + 0.125
                expected[path.stem.removeprefix("role_"), name] = tensors[name]
            data = safetensors.torch.save(tensors)
            digest = FileLayer().write(path, data)
            manifest["files"][path.name] = {"size": len(data), "sha256": digest}
        del manifest["digest"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        roles = self.fit(tmp_path / "run", stop_at=1).roles.state_dict()
        assert expected
        for (role, name), tensor in expected.items():
            assert torch.equal(roles[role][name].cpu(), tensor), f"role {role} was not restored"

    def test_evaluation_changes_nothing(self, reference: Path, tmp_path: Path) -> None:
        """E1: evaluate twice: equal results, equal state, untouched global generators; training is the same without."""
        algorithm = self.make()
        context = StepContext(seed=0, step=1, micro_batch=4)
        before, drawn = state_hash(algorithm), _global_draws()
        first, second = algorithm.evaluate(context), algorithm.evaluate(context)
        assert state_hash(algorithm) == before and _global_draws() == drawn
        assert _comparable(first.metrics) == _comparable(second.metrics)
        assert dict(first.artefacts) == dict(second.artefacts)
        self.fit(tmp_path / "run", eval_every=0)
        assert tensor_files(reference, self.steps) == tensor_files(tmp_path / "run", self.steps)

    def test_accumulation_does_not_change_the_gradient(self) -> None:
        """P3: micro-batches of 1, 2 and all items give one gradient, loss and count, for every parameter."""
        results = [self._gradient(micro_batch) for micro_batch in (10_000, 2, 1)]
        for loss, count, gradient in results[1:]:
            assert count == results[0][1]
            torch.testing.assert_close(loss, results[0][0], rtol=self.accumulation_tolerance, atol=1e-7)
            scale = float(results[0][2].abs().max())
            error = float((gradient - results[0][2]).abs().max())
            assert error <= self.accumulation_tolerance * max(scale, 1e-12), (error, scale)

    def _gradient(self, micro_batch: int) -> tuple[Tensor, int, Tensor]:
        algorithm = self.make()
        names = tuple(algorithm.parameter_groups()) if isinstance(algorithm, HasParameterGroups) else ()
        context = StepContext(seed=0, step=0, micro_batch=micro_batch, due=names)
        collected = algorithm.collect(context)
        total, count = torch.zeros(()), 0
        for micro in algorithm.minibatches(collected.data, 0, context):
            losses = algorithm.loss(micro, context)
            for out in [losses] if isinstance(losses, LossOut) else losses.values():
                out.total.backward(retain_graph=bool(names))
                total, count = total + out.total.detach().cpu(), count + out.count
        flat = [p.grad.flatten() for p in algorithm.roles.trainable() if p.grad is not None]
        assert flat and count, "no item reached the loss; give the contract a step that trains"
        return total / count, count, torch.cat(flat).cpu() / count

    def test_collect_is_repeatable_and_moves_no_role(self) -> None:
        """The Trainer repeats an interrupted step from the state before `collect`, with the roles as they are."""
        algorithm = self.make()
        context = StepContext(seed=0, step=0, micro_batch=4)
        own = copy.deepcopy(algorithm.state_dict())  # a live reference would change with the algorithm
        weights = _roles_copy(algorithm)
        first = _plain(algorithm.collect(context).data)
        assert all(torch.equal(weights[key], value) for key, value in _roles_copy(algorithm).items())
        algorithm.load_state_dict(own)
        second = _plain(algorithm.collect(context).data)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def _roles_copy(algorithm: Algorithm) -> dict[tuple[str, str], Tensor]:
    state = algorithm.roles.state_dict()
    return {(role, name): tensor.clone() for role, weights in state.items() for name, tensor in weights.items()}


def _plain(data: Any) -> dict[str, Tensor]:
    from gencontrol.train.health import find_tensors

    return {name: tensor.clone().nan_to_num() for name, tensor in find_tensors(data).items()}


def _comparable(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {key: None if value != value else value for key, value in metrics.items()}


def _global_draws() -> tuple[Any, ...]:
    # Python's own `random` is left out: beartype, which checks shapes in the tests, draws from it
    numpy_state: Any = np.random.get_state()
    return torch.random.get_rng_state().tolist(), numpy_state[1].tolist(), numpy_state[2]
