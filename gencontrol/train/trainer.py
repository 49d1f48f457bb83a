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
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gencontrol.algorithms.base import Algorithm, Collected, Evaluation, HasParameterGroups, LossOut, StepContext
from gencontrol.errors import NumericsError, Preempted, UsageError
from gencontrol.files import FileLayer, disk_errors
from gencontrol.train.accounting import Sums, Window, global_rng_untouched, numbers, peak_mb
from gencontrol.train.checkpoint import Checkpoints
from gencontrol.train.config import TrainConfig, check_processes
from gencontrol.train.distributed.dist import Group, Layout
from gencontrol.train.health import write_dump
from gencontrol.train.optim import Optimizer, clip_gradients, gradients, scale_gradients
from gencontrol.train.precision import SLOW_BF16, autocast, fast_bf16
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
            with group.exchange(signals):
                stack.enter_context(self._open_folder(group))
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
        self.layout = self._make_layout()
        self.state = RunState(self.config, trainer.settings, algorithm, self.checkpoints, self.layout)
        self.metrics = MetricsFile(self.run_dir / "metrics.jsonl", trainer.files)
        self.tracker: Tracker = NoTracker()
        self.progress = Progress(self.config.steps, visible=self.writes)
        self._place: tuple[int, int, tuple[str, ...]] | None = None  # of the context `_at`
        self._at = StepContext(seed=self.config.seed, step=0, micro_batch=self.config.micro_batch)
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
            module = self.algorithm.roles.module
            for part in module.values() if isinstance(module, nn.ModuleDict) else (module,):
                part.compile()
        if config.precision == "bf16" and not fast_bf16(state.device.type):
            self._say(SLOW_BF16)
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
                with self.group.exchange(self.signals):
                    pass
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
        with self.group.exchange(self.signals) as exchange:
            collected = self.algorithm.collect(context)
            metrics = {key: float(value) for key, value in collected.metrics.items()}
            exchange.note = {"updates": collected.updates, "metrics": metrics}
        if len({note["updates"] for note in exchange.notes}) > 1:
            raise UsageError("ranks collected different numbers of updates; make `updates` a function of the step.")
        collected_at = time.perf_counter()
        items = 0
        for update in range(collected.updates):
            items += self._update(collected, update)
        self._quiet = True
        update_s = time.perf_counter() - collected_at
        state.step += 1
        state.items += items
        state.wall_s += collected_at - begin + update_s
        rows = [note["metrics"] for note in exchange.notes]
        state.window.add_step(rows, items, collected_at - begin, update_s)
        every = (self.config.log_every, self.config.eval_every or self.config.steps, self.config.steps)
        state.record = {"step": state.step}
        if any(state.step % number == 0 for number in every):
            self._record(state.window)
            state.window = Window()
        state.mark()
        self._quiet = False

    def _record(self, window: Window) -> None:
        """Make this step's line from what was summed up since the last one."""
        state = self.state
        rates = {f"lr/{n}" if n else "lr": o.rate(state.step - 1) for n, o in state.optimizers.items()}
        state.record |= {
            **window.metrics(),
            **rates,
            "updates": state.updates,
            "items": state.items,
            "health/skipped": state.health.skipped,
            "time/wall": state.wall_s,
            **window.times(),
            "memory/peak_mb": peak_mb(state.device),
        }
        if state.scale.enabled:
            state.record["health/loss_scale"] = state.scale.scale

    def _update(self, collected: Collected, update: int) -> int:
        """Let every group that is due take its step, turn by turn; returns the largest number of items of one."""
        state, algorithm, stepped, items = self.state, self.algorithm, [], 0
        due = {name: o for name, o in state.optimizers.items() if (state.begun + 1) % o.group.every == 0}
        for turn in sorted({optimizer.group.turn for optimizer in due.values()}):
            groups = {name: optimizer for name, optimizer in due.items() if optimizer.group.turn == turn}
            context = self._context(tuple(filter(None, groups)))
            sums = {name: Sums() for name in groups}
            for optimizer in groups.values():
                optimizer.zero_grad()
            # gradients of sums over all micro-batches of this rank, so that their split cannot matter
            with self.group.exchange(self.signals, heed=not self._quiet) as exchange:
                for micro in algorithm.minibatches(collected.data, update, context):
                    self._poll()
                    losses = algorithm.loss(micro, context)
                    self._backward(losses, groups, sums)
                if self.group.world_size > 1:
                    exchange.note = {name: part.note() for name, part in sums.items()}
            batches = sums if self.group.world_size == 1 else {name: Sums() for name in groups}
            if self.group.world_size > 1:
                for note in exchange.notes:
                    for name, batch in batches.items():
                        batch.add(note[name])
            ready = self._ready({name: o for name, o in groups.items() if batches[name].count}, batches)
            taken = self._healthy(ready, batches, collected, update)
            if taken and collected.updates > 1:
                state.freeze()
            # from here on the step is finished whatever signal comes: its boundary is no longer in memory
            self._quiet = self._quiet or (bool(taken) and update == collected.updates - 1)
            for name in taken:
                groups[name].step(groups[name].rate(state.step + update / collected.updates))
                state.window.add_update(name, batches[name], ready[name])
            stepped += taken
            items = max([items, *(batches[name].count for name in taken)])
        if stepped:
            state.updates += 1
            algorithm.after_update(self._context(tuple(filter(None, stepped))), update)
        state.begun += 1
        return items

    def _backward(
        self, losses: LossOut | Mapping[str, LossOut], groups: Mapping[str, Optimizer], sums: Mapping[str, Sums]
    ) -> None:
        """Add the gradients of a micro-batch, each loss to the parameters of its own group alone."""
        scale = self.state.scale.scale
        if isinstance(losses, LossOut):
            if "" not in groups:
                raise UsageError(
                    f"loss() returned one LossOut; with parameter_groups() it is one of {sorted(groups)} each."
                )
            self.layout.backward(losses.total * scale)
            sums[""].add(losses)
            return
        unknown = sorted(losses.keys() - self.state.optimizers.keys())
        if unknown or "" in groups:
            raise UsageError(
                f"loss() returned losses of the groups {unknown or sorted(losses)}, which parameter_groups() "
                "does not declare."
            )
        asked = [name for name in groups if name in losses]
        for name in asked:
            # losses may share a part of their graph: it is kept until the last of them
            keep = name != asked[-1]
            (losses[name].total * scale).backward(inputs=groups[name].parameters(), retain_graph=keep)
            sums[name].add(losses[name])

    def _ready(self, groups: Mapping[str, Optimizer], batches: dict[str, Sums]) -> dict[str, float]:
        """Sum gradients over the ranks, divide and clip them; returns their norms, and makes all sums floats."""
        norms: dict[str, float] = {}
        for name, optimizer in groups.items():
            parameters, batch = optimizer.parameters(), batches[name]
            self.layout.sum_gradients(parameters)
            grads = self.layout.local(gradients(parameters))
            scale_gradients(grads, 1.0 / (batch.count * self.state.scale.scale))
            # one wait for the device: the norm is not finite when any gradient is not
            norm, total, *rest = numbers([self.layout.norm(parameters), batch.total, *batch.metrics.values()])
            batches[name] = Sums(batch.count, total, dict(zip(batch.metrics, rest, strict=True)))
            norms[name] = clip_gradients(grads, norm, optimizer.max_grad_norm)
        return norms

    def _healthy(
        self, norms: Mapping[str, float], batches: Mapping[str, Sums], collected: Collected, update: int
    ) -> list[str]:
        """Return the groups that may step; counts it when one may not, and stops the run past the budget."""
        state = self.state
        if not norms:
            return []
        totals = {name: float(batches[name].total) / batches[name].count for name in norms}
        good = [name for name in norms if math.isfinite(totals[name]) and math.isfinite(norms[name])]
        bad = len(good) < len(norms)
        searching = state.scale.enabled and all(map(math.isfinite, totals.values())) and state.scale.scale > 1
        state.scale.update(overflow=bad)
        if bad and searching:  # fp16 finds its scale by overflowing now and then
            return good
        reason = state.health.note(bad=bad)
        if reason is None:
            return good
        name = next(name for name in norms if name not in good)
        folder = self.run_dir / "dump" / f"step_{state.step:08d}"
        weights = self.layout.whole({"policy": state.named})["policy"]
        if self.writes:
            facts = {"seed": self.config.seed, "step": state.step, "update": update, "loss": repr(totals[name])}
            facts |= {"grad_norm": repr(norms[name]), "health": state.health.state_dict(), "group": name}
            with disk_errors("the dump", folder):
                write_dump(folder, facts, collected.data, weights)
        what = f"{name}: " if name else ""
        raise NumericsError(
            f"step {state.step}: {what}{reason}; loss {totals[name]}, gradient norm {norms[name]}. Batch and weights "
            f"are in '{folder}'; try a lower lr or precision = bf16/fp32, then run the same command to go on from the "
            "last checkpoint."
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
            result: Evaluation | None = None
            with global_rng_untouched(self.state.device), self.group.exchange(self.signals) as exchange:
                try:
                    result = self.algorithm.evaluate(smaller)
                except torch.OutOfMemoryError:
                    if self.config.shard:  # the other ranks wait inside this very pass
                        raise
                    if self.state.device.type == "cuda":
                        torch.cuda.empty_cache()
                exchange.note = result is not None
            if result is not None and all(exchange.notes):
                return result
            self._say(f"warning: evaluation at step {self.state.step} ran out of memory (micro_batch {micro_batch}).")
        return Evaluation({"eval/failed": 1.0})

    def _save(self) -> None:
        if self.writes:
            with disk_errors("metrics.jsonl", self.run_dir):
                self.metrics.sync()
        self.state.save()

    # ---------------------------------------------------------------- start and end

    def _resume(self) -> bool:
        """Load the newest intact checkpoint; returns whether its line of metrics.jsonl is written."""
        with self.group.exchange(self.signals):
            self._prepare_folder()
        with self.group.exchange(self.signals) as exchange:
            saved = self.checkpoints.load_newest()
            exchange.note = saved.step if saved else None
        if len(set(exchange.notes)) > 1:
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

    def _make_layout(self) -> Layout:
        """Return how the weights lie; with `shard` the network and its roles are split over the ranks in place."""
        if not self.config.shard:
            return Layout(self.group)
        if isinstance(self.algorithm, HasParameterGroups):
            raise UsageError("train.shard splits one network with one loss; leave it out for several parameter groups.")
        from gencontrol.train.distributed.shard import Shards  # takes half a second to import

        return Shards(self.algorithm.roles, self.group, self.signals)

    def _context(self, due: tuple[str, ...] = ()) -> StepContext:
        place = (self.state.step, self.state.begun, due)
        if place == self._place:
            return self._at
        self._place = place
        self._at = StepContext(
            seed=self.config.seed,
            step=self.state.step,
            micro_batch=self.config.micro_batch,
            rank=self.group.rank,
            world_size=self.group.world_size,
            group=self.group,
            updates=self.state.begun,
            due=due,
            poll=self._poll,
            autocast=self._autocast,
        )
        return self._at

    def _poll(self) -> None:
        if not self._quiet:
            self.group.poll(self.signals)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.config.precision, self.state.device.type)

    def _say(self, text: str) -> None:
        if self.writes:
            print(text, file=sys.stderr, flush=True)
