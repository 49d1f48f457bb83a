"""The one training loop; it knows algorithms by protocol only, and nothing of diffusion.

A step is: collect → `updates` times (micro-batches → loss → backward → finite check → clip → AdamW → after_update) →
checkpoint at the step boundary → evaluation → one line of metrics.jsonl.  The same command resumes: a step that was
interrupted is repeated, and the run ends bit-equal to one that never stopped (CPU, same threads).

A signal saves the last whole step (see `state`) at the next poll; once the last update of a step has begun, the step is
finished first.  Roles must therefore change in `after_update` only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gencontrol.algorithms.base import Algorithm, Collected, Evaluation, StepContext
from gencontrol.errors import NumericsError, Preempted, UsageError
from gencontrol.files import FileLayer, disk_errors
from gencontrol.train.accounting import Sums, average, global_rng_untouched, peak_mb
from gencontrol.train.checkpoint import Checkpoints
from gencontrol.train.config import TrainConfig, check_processes
from gencontrol.train.distributed.dist import Group, is_there, no_note, nothing
from gencontrol.train.distributed.layout import make_layout
from gencontrol.train.health import write_dump
from gencontrol.train.optim import clip_gradients, gradients, learning_rate, scale_gradients
from gencontrol.train.run_folder import Lock, MetricsFile, check_settings, clean_leftovers, write_samples
from gencontrol.train.signals import SignalGuard
from gencontrol.train.state import RunState
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
        """Train to the last step; returns {"status", "step", "metrics" (last line), "run_dir"}.

        Args:
            algorithm: freshly built with the same arguments at every start; a checkpoint replaces its state.
            stop_at: save and end after that many steps, as a preemption would ("status": "stopped").

        Raises:
            UsageError: folder in use, other settings, wrong device or parameters.
            CheckpointError: checkpoints exist and none is intact, or it does not fit the model.
            NumericsError: too many non-finite updates; see dump/.
            DiskError: a checkpoint could not be written; older ones are intact.
            Preempted: after a signal and a save (exit code 143, or 130 for Ctrl-C).
        """
        with contextlib.ExitStack() as stack:
            group = stack.enter_context(Group())
            check_processes(self.config, group.world_size)
            signals = stack.enter_context(SignalGuard())
            group.together(lambda: stack.enter_context(self._open_folder(group)), no_note, signals)
            run = _Run(self, algorithm, group, signals)
            stack.callback(run.close)
            return run.loop(stop_at)

    def _open_folder(self, group: Group) -> contextlib.AbstractContextManager[Any]:
        """Make and lock the run folder; ranks other than 0 leave it alone."""
        if group.rank != 0:
            return contextlib.nullcontext()
        with disk_errors("the run folder", self.run_dir):
            self.files.make_folder(self.run_dir)
            held = sorted(p.name for p in self.run_dir.iterdir() if p.name != ".lock")
        if self.fresh and held:
            raise UsageError(
                f"'{self.run_dir}' is not empty ({', '.join(held[:4])}); a fresh run needs a new --output folder."
            )
        return Lock(self.run_dir)


class _Run:
    """A running fit."""

    def __init__(self, trainer: Trainer, algorithm: Algorithm, group: Group, signals: SignalGuard) -> None:
        self.config, self.trainer, self.algorithm = trainer.config, trainer, algorithm
        self.group, self.signals = group, signals
        self.run_dir, self.writes = trainer.run_dir, group.rank == 0
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        self.checkpoints = Checkpoints(self.run_dir / "checkpoints", self.config.keep, trainer.files)
        self.layout = make_layout(algorithm.roles, group, signals, shard=self.config.shard)
        self.state = RunState(self.config, trainer.settings, algorithm, self.checkpoints, self.layout)
        self.metrics = MetricsFile(self.run_dir / "metrics.jsonl", trainer.files)
        self.tracker: Tracker = NoTracker()
        self.progress = Progress(self.config.steps, visible=self.writes)
        self._quiet = False  # polls do nothing while a step is between its last update and its boundary

    def loop(self, stop_at: int | None) -> dict[str, Any]:
        """Resume, train, finish."""
        state, config = self.state, self.config
        line_written = self._resume()
        if state.step >= config.steps and line_written and (self.run_dir / "final").is_dir():
            self._say(f"finished: {state.step} of {config.steps} steps are done in '{self.run_dir}'.")
            self.layout.release()
            return self._summary("finished")
        if config.compile:
            self.algorithm.roles.module.compile()
        self.progress.start(state.step)
        try:
            if not line_written:
                self._close_step()
            while state.step < config.steps:
                if stop_at is not None and state.step >= stop_at:
                    self._save()
                    self.layout.release()
                    return self._summary("stopped")
                self._train_step()
                if state.step % config.save_every == 0 or state.step == config.steps:
                    self._save()
                self._close_step()
                self.group.together(nothing, no_note, self.signals)
        except Preempted:
            if state.step != state.saved_step:
                self._save()
                self._say(f"the state of step {state.saved_step} is saved.")
            raise
        self.layout.release()
        self._write_final()
        return self._summary("finished")

    # ---------------------------------------------------------------- one step

    def _train_step(self) -> None:
        begin = time.perf_counter()
        state, context = self.state, self._context()
        self._quiet = False
        collected, notes = self.group.together(
            lambda: self.algorithm.collect(context),
            lambda c: {"updates": c.updates, "metrics": {key: float(value) for key, value in c.metrics.items()}},
            self.signals,
        )
        if len({note["updates"] for note in notes}) > 1:
            raise UsageError("ranks collected different numbers of updates; make `updates` a function of the step.")
        collected_at = time.perf_counter()
        sums, norms = Sums(), []
        for update in range(collected.updates):
            norm = self._update(collected, update, context, sums)
            if norm is not None:
                norms.append(norm)
        self._quiet = True
        metrics = average([note["metrics"] for note in notes])
        if norms:
            metrics |= sums.means() | {"loss/total": sums.mean_loss(), "grad_norm": sum(norms) / len(norms)}
        state.step += 1
        state.items += sums.count
        self._record(metrics, collected_at - begin, time.perf_counter() - collected_at, sums.count)
        state.mark()
        self._quiet = False

    def _record(self, metrics: Mapping[str, float], collect_s: float, update_s: float, items: int) -> None:
        state = self.state
        state.wall_s += collect_s + update_s
        state.record = {
            "step": state.step,
            **{key: metrics[key] for key in sorted(metrics)},
            "lr": learning_rate(self.config, state.step - 1),
            "updates": state.updates,
            "items": state.items,
            "health/skipped": state.health.skipped,
            "time/wall": state.wall_s,
            "time/collect": collect_s,
            "time/update": update_s,
            "samples/s": items / max(collect_s + update_s, 1e-9),
            "memory/peak_mb": peak_mb(state.device),
        }
        if state.scale.enabled:
            state.record["health/loss_scale"] = state.scale.scale

    def _update(self, collected: Collected, update: int, context: StepContext, into: Sums) -> float | None:
        """One optimizer step; returns the gradient norm, or None when the step was skipped."""
        state = self.state
        state.optimizer.zero_grad()
        _, notes = self.group.together(
            lambda: self._accumulate(collected.data, update, context), Sums.note, self.signals
        )
        parameters = state.optimizer.parameters()
        self.layout.sum_gradients(parameters)
        batch = Sums()
        for note in notes:
            batch.add(note)
        if batch.count == 0:
            return None
        grads = self.layout.local(gradients(parameters))
        scale_gradients(grads, 1.0 / (batch.count * state.scale.scale))
        norm = clip_gradients(grads, self.layout.norm(parameters), self.config.max_grad_norm)
        if not self._healthy(batch.mean_loss(), norm, collected, update):
            return None
        if collected.updates > 1:
            state.freeze()
        self._quiet = update == collected.updates - 1
        state.optimizer.step(learning_rate(self.config, state.step + update / collected.updates))
        state.updates += 1
        self.algorithm.after_update(context, update)
        into.add(batch.note())
        return norm

    def _accumulate(self, data: Any, update: int, context: StepContext) -> Sums:
        """Backward of all micro-batches of this rank; gradients of sums, so that their split cannot matter."""
        sums = Sums()
        for micro in self.algorithm.minibatches(data, update, context):
            self._poll()
            out = self.algorithm.loss(micro, context)
            self.layout.backward(out.total * self.state.scale.scale)
            sums.add_loss(out)
        return sums

    def _healthy(self, total: float, norm: float, collected: Collected, update: int) -> bool:
        """Whether the step may be taken; counts it when not, and stops the run past the budget."""
        state = self.state
        bad = not (math.isfinite(total) and math.isfinite(norm))
        searching = state.scale.enabled and math.isfinite(total) and state.scale.scale > 1
        state.scale.update(overflow=bad)
        if bad and searching:  # fp16 finds its scale by overflowing now and then
            return False
        reason = state.health.note(bad=bad)
        if reason is None:
            return not bad
        folder = self.run_dir / "dump" / f"step_{state.step:08d}"
        weights = self.layout.whole({"policy": state.optimizer.named})["policy"]
        if self.writes:
            facts = {"seed": self.config.seed, "step": state.step, "update": update, "loss": repr(total)}
            facts |= {"grad_norm": repr(norm), "health": state.health.state_dict()}
            with disk_errors("the dump", folder):
                write_dump(folder, facts, collected.data, weights)
        raise NumericsError(
            f"step {state.step}: {reason}; loss {total}, gradient norm {norm}. Batch and weights are in '{folder}'; "
            "try a lower lr or precision = bf16/fp32, then run the same command to go on from the last checkpoint."
        )

    # ---------------------------------------------------------------- step boundary

    def _close_step(self) -> None:
        """Evaluate when due, then write this step's line."""
        every, state = self.config.eval_every, self.state
        artefacts: Mapping[str, bytes] = {}
        if every and (state.step % every == 0 or state.step == self.config.steps):
            begin = time.perf_counter()
            evaluation = self._evaluate()
            artefacts = evaluation.artefacts
            state.record |= {key: float(value) for key, value in evaluation.metrics.items()}
            if self.writes:
                write_samples(self.run_dir, state.step, evaluation.metrics, artefacts)
            state.record["time/evaluate"] = time.perf_counter() - begin
            state.wall_s += state.record["time/evaluate"]
        if self.writes and len(state.record) > 1:
            with disk_errors("metrics.jsonl", self.run_dir):
                self.metrics.append(state.record)
            self.tracker.log(state.step, state.record, artefacts)
            self.progress.show(state.step, state.record)

    def _evaluate(self) -> Evaluation:
        """Run the algorithm's evaluation; out of memory halves its batch once, then gives this evaluation up."""
        context = self._context()
        for micro_batch in (context.micro_batch, max(1, context.micro_batch // 2)):
            smaller = dataclasses.replace(context, micro_batch=micro_batch)
            with global_rng_untouched(self.state.device):
                attempt = functools.partial(self._try_evaluate, smaller)
                result, fits = self.group.together(attempt, is_there, self.signals)
            if result is not None and all(fits):
                return result
            self._say(f"warning: evaluation at step {self.state.step} ran out of memory (micro_batch {micro_batch}).")
        return Evaluation({"eval/failed": 1.0})

    def _try_evaluate(self, context: StepContext) -> Evaluation | None:
        try:
            return self.algorithm.evaluate(context)
        except torch.OutOfMemoryError:
            if self.config.shard:  # the other ranks wait inside this very pass
                raise
            if self.state.device.type == "cuda":
                torch.cuda.empty_cache()
            return None

    def _save(self) -> None:
        if self.writes:
            with disk_errors("metrics.jsonl", self.run_dir):
                self.metrics.sync()
        self.state.save()

    # ---------------------------------------------------------------- start and end

    def _resume(self) -> bool:
        """Load the newest intact checkpoint; returns whether its line of metrics.jsonl is written."""
        self.group.together(self._prepare_folder, no_note, self.signals)
        saved, steps = self.group.together(
            self.checkpoints.load_newest, lambda found: found.step if found else None, self.signals
        )
        if len(set(steps)) > 1:
            raise UsageError(f"ranks see different checkpoints in '{self.run_dir}'; put it on a shared file system.")
        if saved is not None:
            for note in self.state.restore(saved):
                self._say(note)
            self._say(f"resumed from step {saved.step} of {self.config.steps} in '{self.run_dir}'.")
        self.state.mark()
        line_written = False
        if self.writes:
            with disk_errors("metrics.jsonl", self.run_dir):
                line_written = self.metrics.rewind(self.state.step)
            self.tracker = open_tracker(self.config.track, self.run_dir, self.state.step)
        return bool(self.group.gather(line_written)[0])

    def _prepare_folder(self) -> None:
        """Clean up after an interrupted process, compare the settings, check the space (rank 0)."""
        if not self.writes:
            return
        with disk_errors("the run folder", self.run_dir):
            clean_leftovers(self.run_dir, self.trainer.files)
            self.checkpoints.clean()
            notes = check_settings(self.run_dir, self.trainer.settings, self.trainer.allow, self.trainer.files)
            self.state.check_space()
        for note in notes:
            self._say(f"changed since the last start: {note}")

    def _write_final(self) -> None:
        """Write final/ atomically; it is what `from_pretrained` loads."""
        if not self.writes:
            return
        staged = self.run_dir / ".tmp_final"
        with disk_errors("final/", self.run_dir):
            self.trainer.files.make_folder(staged)
            self.algorithm.save_final(staged)
            self.trainer.files.sync_tree(staged)
            self.trainer.files.replace_folder(staged, self.run_dir / "final")

    def _summary(self, status: str) -> dict[str, Any]:
        rows = self.metrics.read()
        metrics = rows[-1] if rows else dict(self.state.record)
        return {"status": status, "step": self.state.step, "metrics": metrics, "run_dir": str(self.run_dir)}

    def close(self) -> None:
        """Close the progress bar and the tracker."""
        self.progress.close()
        self.tracker.close()
        if self.tracker.dropped:
            self._say(f"warning: the tracker dropped {self.tracker.dropped} records; metrics.jsonl has all of them.")

    def _context(self) -> StepContext:
        return StepContext(
            seed=self.config.seed,
            step=self.state.step,
            micro_batch=self.config.micro_batch,
            rank=self.group.rank,
            world_size=self.group.world_size,
            group=self.group,
            poll=self._poll,
            autocast=self._autocast,
        )

    def _poll(self) -> None:
        if not self._quiet:
            self.group.poll(self.signals)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float16
        return torch.autocast(self.state.device.type, dtype=dtype)

    def _say(self, text: str) -> None:
        if self.writes:
            print(text, file=sys.stderr, flush=True)
