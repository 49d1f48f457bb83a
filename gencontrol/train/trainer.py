"""The one training loop; it knows algorithms by protocol only, and nothing of diffusion.

A step is: collect → `updates` times (micro-batches → loss → backward → finite check → clip → AdamW → after_update) →
checkpoint at the step boundary → evaluation → one line of metrics.jsonl.  The same command resumes: a step that was
interrupted is repeated, and the run ends bit-equal to one that never stopped (CPU, same threads).

Preemption.  Until the first optimizer step of a training step nothing has changed, so the live weights are saved.  A
step of several updates keeps a copy of roles and optimizer, made just before its first update, and that is saved.
After the last update the step is finished first.  Roles must therefore change in `after_update` only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import platform
import random
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gencontrol import __version__
from gencontrol.algorithms.base import Algorithm, Collected, Evaluation, StepContext
from gencontrol.errors import EnvironmentMissing, NumericsError, Preempted, UsageError
from gencontrol.train.checkpoint import Checkpoints, TrainState, join_tensors, restore_names, split_tensors
from gencontrol.train.config import TrainConfig
from gencontrol.train.dist import Group
from gencontrol.train.files import FileLayer, disk_error
from gencontrol.train.health import Health, write_dump
from gencontrol.train.optim import (
    LossScale,
    Optimizer,
    clip_gradients,
    learning_rate,
    name_parameters,
    scale_gradients,
)
from gencontrol.train.run_folder import Lock, MetricsFile, check_settings, settings_hash, write_samples
from gencontrol.train.signals import SignalGuard
from gencontrol.train.tracking import NoTracker, Progress, Tracker, open_tracker

__all__ = ["TrainConfig", "Trainer"]


class Trainer:
    """Trains an algorithm in a run folder; the same call resumes where the newest intact checkpoint stands.

    Args:
        config: settings of the loop.
        run_dir: folder of the run; created when absent.
        settings: all other settings of the run by section, recorded in config.toml and compared at a resume.
        allow: settings such as "train.lr" that may differ from the run's although they alter the result.
        fresh: refuse a folder that holds anything.
        files: the file layer; tests inject faults here.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_dir: str | Path,
        *,
        settings: Mapping[str, Any] | None = None,
        allow: Sequence[str] = (),
        fresh: bool = False,
        files: FileLayer | None = None,
    ) -> None:
        self.config, self.run_dir = config, Path(run_dir)
        self.settings = {**(settings or {}), "train": dataclasses.asdict(config)}
        self.allow, self.fresh = tuple(allow), fresh
        self.files = files or FileLayer()

    def fit(self, algorithm: Algorithm, *, stop_at: int | None = None) -> dict[str, Any]:
        """Train to the last step; returns {"status", "step", "metrics" (last record), "run_dir"}.

        Args:
            stop_at: end after that many steps, as a preemption would ("status": "stopped").

        Raises:
            UsageError: folder in use, other settings, wrong device or parameters.
            CheckpointError: checkpoints exist and none is intact, or it does not fit the model.
            NumericsError: too many non-finite updates; see dump/.
            DiskError: a checkpoint could not be written; older ones are intact.
            Preempted: after a signal and a save (exit code 143, or 130 for Ctrl-C).
        """
        with contextlib.ExitStack() as stack:
            group = stack.enter_context(Group())
            if group.rank == 0:
                stack.enter_context(self._open_folder())
            signals = stack.enter_context(SignalGuard())
            run = _Run(self, algorithm, group, signals)
            stack.callback(run.close)
            return run.loop(stop_at)

    def _open_folder(self) -> Lock:
        try:
            self.files.make_folder(self.run_dir)
            held = sorted(p.name for p in self.run_dir.iterdir() if p.name != ".lock")
        except OSError as error:
            raise disk_error(error, "the run folder", self.run_dir) from error
        if self.fresh and held:
            raise UsageError(
                f"'{self.run_dir}' is not empty ({', '.join(held[:4])}); a fresh run needs a new --output folder."
            )
        return Lock(self.run_dir)


@dataclasses.dataclass
class _Sums:
    """Sums over the items of one optimizer batch."""

    count: int = 0
    total: float | Tensor = 0.0
    metrics: dict[str, float | Tensor] = dataclasses.field(default_factory=dict)

    def note(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "total": float(self.total),
            "metrics": {k: float(v) for k, v in self.metrics.items()},
        }


class _Run:
    """State of a running fit."""

    def __init__(self, trainer: Trainer, algorithm: Algorithm, group: Group, signals: SignalGuard) -> None:
        self.config, self.trainer, self.algorithm = trainer.config, trainer, algorithm
        self.group, self.signals, self.files = group, signals, trainer.files
        self.run_dir, self.writes = trainer.run_dir, group.rank == 0
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        named = name_parameters(algorithm.roles.module, algorithm.roles.trainable())
        self.device = _check_device(self.config, next(iter(named.values())).device)
        self.optimizer = Optimizer(named, self.config)
        self.scale = LossScale(self.config.precision == "fp16", 2.0**16 if self.config.precision == "fp16" else 1.0)
        self.health = Health(self.config.max_bad_steps)
        self.step, self.updates, self.items, self.wall_s = 0, 0, 0, 0.0
        self.record: dict[str, Any] = {"step": 0}
        self.saved_step: int | None = None
        self.checkpoints = Checkpoints(self.run_dir / "checkpoints", self.config.keep, self.files)
        self.metrics = MetricsFile(self.run_dir / "metrics.jsonl", self.files)
        self.tracker: Tracker = NoTracker()
        self.progress: Progress | None = None
        self._committed = False
        self._algorithm_state: dict[str, Any] = {}
        self._meta: dict[str, Any] = {}
        self._frozen: tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]] | None = None

    # ---------------------------------------------------------------- the loop

    def loop(self, stop_at: int | None) -> dict[str, Any]:
        """Resume, train, finish."""
        line_written = self._resume()
        if self.step >= self.config.steps and line_written and (self.run_dir / "final").is_dir():
            self._say(f"finished: {self.step} of {self.config.steps} steps are done in '{self.run_dir}'.")
            return self._summary("finished")
        if self.config.compile:
            self.algorithm.roles.module.compile()
        self.progress = Progress(self.config.steps, self.step, visible=self.writes)
        try:
            if not line_written:
                self._close_step()
            while self.step < self.config.steps:
                if stop_at is not None and self.step >= stop_at:
                    self._save()
                    return self._summary("stopped")
                self._train_step()
                if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                    self._save()
                self._close_step()
                self.group.together(_nothing, lambda _: None, self.signals)
        except Preempted as stop:
            self._save_boundary(stop)
            raise
        self._write_final()
        return self._summary("finished")

    def _train_step(self) -> None:
        begin = time.perf_counter()
        self._mark_boundary()
        context = self._context()
        collected, notes = self.group.together(
            lambda: self.algorithm.collect(context),
            lambda c: {"updates": c.updates, "metrics": {k: float(v) for k, v in c.metrics.items()}},
            self.signals,
        )
        if len({note["updates"] for note in notes}) > 1:
            raise UsageError("ranks collected different numbers of updates; make `updates` a function of the step.")
        collect_s = time.perf_counter() - begin
        sums, norms, lr = _Sums(), [], learning_rate(self.config, self.step)
        for update in range(collected.updates):
            lr = learning_rate(self.config, self.step + update / collected.updates)
            norm = self._update(collected, update, lr, context, sums)
            if norm is not None:
                norms.append(norm)
        self._committed = True  # polls are quiet until the step is whole
        self.step += 1
        self.items += sums.count
        update_s = time.perf_counter() - begin - collect_s
        self.wall_s += collect_s + update_s
        metrics = {key: value / sums.count for key, value in sums.metrics.items()}
        for key in notes[0]["metrics"]:
            metrics[key] = sum(note["metrics"][key] for note in notes) / len(notes)
        self.record = {
            **metrics,
            "step": self.step,
            "lr": lr,
            "updates": self.updates,
            "items": self.items,
            "health/skipped": self.health.skipped,
            "time/wall": self.wall_s,
            "time/collect": collect_s,
            "time/update": update_s,
            "samples/s": sums.count / max(collect_s + update_s, 1e-9),
            "memory/peak_mb": _peak_mb(self.device),
        }
        if norms:
            self.record |= {"loss/total": float(sums.total) / sums.count, "grad_norm": sum(norms) / len(norms)}
        if self.scale.enabled:
            self.record["health/loss_scale"] = self.scale.scale

    def _update(self, collected: Collected, update: int, lr: float, context: StepContext, into: _Sums) -> float | None:
        """One optimizer step; returns the gradient norm, or None when the step was skipped."""
        self.optimizer.zero_grad()
        parameters = self.optimizer.parameters()
        local, notes = self.group.together(
            lambda: self._accumulate(collected.data, update, context), _Sums.note, self.signals
        )
        self.group.sum_gradients(parameters)
        count = sum(note["count"] for note in notes)
        if count == 0:
            return None
        total = sum(note["total"] for note in notes) / count
        scale_gradients(parameters, 1.0 / (count * self.scale.scale))
        norm = clip_gradients(parameters, self.config.max_grad_norm)
        if not self._healthy(total, norm, collected, update):
            return None
        if collected.updates > 1 and self._frozen is None:
            self._frozen = (_copy(self.algorithm.roles.state_dict()), _copy(self.optimizer.state_dict()))
        self._committed = update == collected.updates - 1
        self.optimizer.step(lr)
        self.updates += 1
        self.algorithm.after_update(context, update)
        into.count += count
        into.total += total * count
        for key in notes[0]["metrics"]:
            into.metrics[key] = into.metrics.get(key, 0.0) + sum(note["metrics"].get(key, 0.0) for note in notes)
        return norm

    def _accumulate(self, data: Any, update: int, context: StepContext) -> _Sums:
        sums = _Sums()
        for micro in self.algorithm.minibatches(data, update, context):
            self._poll()
            out = self.algorithm.loss(micro, context)
            (out.total * self.scale.scale).backward()
            sums.count += out.count
            sums.total = sums.total + out.total.detach()
            for key, value in out.metrics.items():
                held = value.detach() if isinstance(value, Tensor) else float(value)
                sums.metrics[key] = sums.metrics.get(key, 0.0) + held
        return sums

    def _healthy(self, total: float, norm: float, collected: Collected, update: int) -> bool:
        """Whether the step may be taken; counts it when not, and stops the run past the budget."""
        bad = not (math.isfinite(total) and math.isfinite(norm))
        searching = self.scale.enabled and math.isfinite(total) and self.scale.scale > 1
        self.scale.update(overflow=bad)
        if bad and searching:  # fp16 finds its scale by overflowing now and then
            return False
        reason = self.health.note(bad=bad)
        if reason is not None:
            raise NumericsError(self._dump(reason, total, norm, collected, update))
        return not bad

    def _dump(self, reason: str, total: float, norm: float, collected: Collected, update: int) -> str:
        folder = self.run_dir / "dump" / f"step_{self.step:08d}"
        facts = {
            "seed": self.config.seed,
            "step": self.step,
            "update": update,
            "rank": self.group.rank,
            "loss": repr(total),
            "grad_norm": repr(norm),
            "health": self.health.state_dict(),
        }
        if self.writes:
            write_dump(folder, facts, collected.data, self.optimizer.named)
        return (
            f"step {self.step}: {reason}; loss {total}, gradient norm {norm}. The batch and weights are in '{folder}'; "
            "try a lower lr or precision = bf16/fp32, then run the same command to go on from the last checkpoint."
        )

    # ---------------------------------------------------------------- step boundary

    def _close_step(self) -> None:
        """Evaluate when due, then write this step's line."""
        every = self.config.eval_every
        artefacts: Mapping[str, bytes] = {}
        if every and (self.step % every == 0 or self.step == self.config.steps):
            begin = time.perf_counter()
            evaluation = self._evaluate()
            if evaluation is not None:
                artefacts = evaluation.artefacts
                self.record |= {key: float(value) for key, value in evaluation.metrics.items()}
                if self.writes:
                    write_samples(self.run_dir, self.step, evaluation.metrics, artefacts)
            self.record["time/evaluate"] = time.perf_counter() - begin
        if self.writes and len(self.record) > 1:
            try:
                self.metrics.append(self.record)
            except OSError as error:
                raise disk_error(error, "metrics.jsonl", self.run_dir) from error
            self.tracker.log(self.step, self.record, artefacts)
            if self.progress is not None:
                self.progress.show(self.step, self.record)

    def _evaluate(self) -> Evaluation | None:
        """Run the algorithm's evaluation; out of memory halves its batch once, then gives this evaluation up."""
        self._committed = False
        context = self._context()
        for micro_batch in (context.micro_batch, max(1, context.micro_batch // 2)):
            try:
                with _global_rng_untouched():
                    smaller = dataclasses.replace(context, micro_batch=micro_batch)
                    return self.group.together(
                        lambda c=smaller: self.algorithm.evaluate(c), lambda _: None, self.signals
                    )[0]
            except torch.OutOfMemoryError:
                self._say(f"warning: evaluation at step {self.step} ran out of memory with micro_batch {micro_batch}.")
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        self.record["eval/failed"] = 1.0
        return None

    def _mark_boundary(self) -> None:
        """Remember the state at the start of a step: the algorithm's as a copy, the rest by reference."""
        tree, tensors = split_tensors(self.algorithm.state_dict())
        copies = {key: tensor.detach().clone() for key, tensor in tensors.items()}
        self._algorithm_state = join_tensors(tree, copies)
        self._meta = self._make_meta()
        self._frozen = None
        self._committed = False

    def _make_meta(self) -> dict[str, Any]:
        return {
            "counters": {"updates": self.updates, "items": self.items, "wall_s": self.wall_s},
            "health": self.health.state_dict(),
            "loss_scale": self.scale.state_dict(),
            "record": json.loads(json.dumps(self.record)),
            "versions": {
                "gencontrol": __version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "topology": {
                "world_size": self.group.world_size,
                "device": self.device.type,
                "threads": torch.get_num_threads(),
            },
            "settings": json.loads(json.dumps(self.trainer.settings)),
            "settings_sha": settings_hash(self.trainer.settings),
        }

    def _save(self) -> None:
        """Save the live state, which must be that of a whole step."""
        self._mark_boundary()
        self._save_boundary(None)

    def _save_boundary(self, stop: Preempted | None) -> None:
        """Save the state of the last whole step, unless it is on disk already."""
        if not self._meta:
            self._mark_boundary()
        step = int(self._meta["record"]["step"])
        if self.writes and step != self.saved_step:
            roles, optimizer = self._frozen or (self.algorithm.roles.state_dict(), self.optimizer.state_dict())
            self.metrics.sync()
            begin = time.perf_counter()
            self.checkpoints.save(TrainState(step, roles, optimizer, self._algorithm_state, self._meta))
            if stop is not None:
                self._say(f"checkpoint of step {step} saved in {time.perf_counter() - begin:.1f} s.")
        self.saved_step = step

    # ---------------------------------------------------------------- start and end

    def _resume(self) -> bool:
        """Load the newest intact checkpoint; returns whether its line of metrics.jsonl is written."""
        if self.writes:
            try:
                self.checkpoints.clean()
                notes = check_settings(self.run_dir, self.trainer.settings, self.trainer.allow, self.files)
            except OSError as error:
                raise disk_error(error, "the run folder", self.run_dir) from error
            for note in notes:
                self._say(f"changed since the last start: {note}")
        self.group.gather(None)
        state = self.checkpoints.load_newest()
        if len({*self.group.gather(state.step if state else None)}) > 1:
            raise UsageError(f"ranks see different checkpoints in '{self.run_dir}'; put it on a shared file system.")
        if state is not None:
            self._restore(state)
        line_written = self.metrics.rewind(self.step) if self.writes else True
        line_written = bool(self.group.gather(line_written)[0])
        if self.writes:
            self.tracker = open_tracker(self.config.track, self.run_dir, self.step)
        return line_written

    def _restore(self, state: TrainState) -> None:
        live = self.algorithm.roles.state_dict()
        if live.keys() != state.roles.keys():
            raise UsageError(
                f"the checkpoint holds the roles {sorted(state.roles)}, this algorithm has {sorted(live)}; resume with "
                "the algorithm of that run."
            )
        roles = {role: restore_names(state.roles[role], tensors, role) for role, tensors in live.items()}
        self.algorithm.roles.load_state_dict(roles)
        self.algorithm.load_state_dict(state.algorithm)
        self.optimizer.load_state_dict(state.optimizer)
        self.health.load_state_dict(state.meta["health"])
        self.scale.load_state_dict(state.meta["loss_scale"])
        counters = state.meta["counters"]
        self.updates, self.items, self.wall_s = counters["updates"], counters["items"], counters["wall_s"]
        self.step, self.record, self.saved_step = state.step, dict(state.meta["record"]), state.step
        now = self._make_meta()
        for name in ("topology", "versions"):
            if now[name] != state.meta[name]:
                self._say(f"{name} changed from {state.meta[name]} to {now[name]}: not bit-equal any more.")
        self._say(f"resumed from step {self.step} of {self.config.steps} in '{self.run_dir}'.")

    def _write_final(self) -> None:
        """Write final/ atomically; it is what `from_pretrained` loads."""
        if not self.writes:
            return
        final = self.run_dir / "final"
        staged = self.run_dir / ".tmp_final"
        try:
            if staged.exists():
                self.files.remove_tree(staged)
            self.files.make_folder(staged)
            self.algorithm.save_final(staged)
            self.files.replace_folder(staged, final)
        except OSError as error:
            raise disk_error(error, "final/", self.run_dir) from error

    def _summary(self, status: str) -> dict[str, Any]:
        return {"status": status, "step": self.step, "metrics": dict(self.record), "run_dir": str(self.run_dir)}

    def close(self) -> None:
        """Close the progress bar and the tracker."""
        if self.progress is not None:
            self.progress.close()
        self.tracker.close()
        if self.tracker.dropped:
            self._say(f"warning: the tracker dropped {self.tracker.dropped} records; metrics.jsonl has all of them.")

    # ---------------------------------------------------------------- small helpers

    def _context(self) -> StepContext:
        return StepContext(
            seed=self.config.seed,
            step=self.step,
            micro_batch=self.config.micro_batch,
            rank=self.group.rank,
            world_size=self.group.world_size,
            poll=self._poll,
            autocast=self._autocast,
        )

    def _poll(self) -> None:
        if not self._committed:
            self.group.poll(self.signals)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    def _say(self, text: str) -> None:
        if self.writes:
            print(text, file=sys.stderr, flush=True)


def _nothing() -> None:
    """Work of an exchange that only asks for signals."""


def _copy(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {name: {key: t.detach().to("cpu", copy=True) for key, t in row.items()} for name, row in state.items()}


def _check_device(config: TrainConfig, device: torch.device) -> torch.device:
    """Return where the weights lie.

    Raises:
        EnvironmentMissing: cuda is asked for and absent.
        UsageError: the weights lie elsewhere than asked.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentMissing(
            "device = cuda, but torch sees no CUDA device; use device = cpu, or a CUDA torch."
        )
    if config.device not in ("auto", device.type):
        raise UsageError(f"device = {config.device}, but the weights lie on {device}; move the model first.")
    return device


def _peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


@contextlib.contextmanager
def _global_rng_untouched() -> Any:
    """Put the global generators back, so that third-party code in an evaluation cannot alter training."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


#: Kept for type checkers: the poll given to algorithms.
Poll = Callable[[], None]
