"""What people watch: a progress bar on a terminal, a line every few seconds elsewhere, and TensorBoard.

TensorBoard writes from a thread behind a bounded queue; whatever fails there is counted and never stops the run.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

#: Seconds between two lines where there is no terminal.
LINE_EVERY_S = 5.0


class Tracker(Protocol):
    """A second log; calls return at once and never raise."""

    dropped: int

    def log(self, step: int, metrics: Mapping[str, Any], artefacts: Mapping[str, bytes]) -> None: ...
    def close(self) -> None: ...


class NoTracker:
    """Keeps nothing."""

    dropped = 0

    def log(self, step: int, metrics: Mapping[str, Any], artefacts: Mapping[str, bytes]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class TensorBoardTracker:
    """Event files under `folder`: scalars, and wav and png artefacts as they are.

    Args:
        folder: where event files go; must be writable, else everything is dropped and counted.
        resume_step: events after it, of an earlier process, are hidden by TensorBoard.
    """

    def __init__(self, folder: Path, resume_step: int, capacity: int = 256) -> None:
        self.dropped = 0
        self._queue: queue.Queue[tuple[int, dict[str, float], dict[str, bytes]] | None] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._work, args=(folder, resume_step), daemon=True, name="tensorboard")
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, Any], artefacts: Mapping[str, bytes]) -> None:
        """Queue one step; when the queue is full it is dropped and counted."""
        scalars = {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float)) and k != "step"}
        try:
            self._queue.put_nowait((step, scalars, dict(artefacts)))
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what is queued, waiting at most 5 s."""
        try:
            self._queue.put(None, timeout=2)
            self._thread.join(timeout=5)
        except queue.Full:
            self.dropped += self._queue.qsize()

    def _work(self, folder: Path, resume_step: int) -> None:
        writer = None
        while (item := self._queue.get()) is not None:
            try:
                if writer is None:
                    writer = _open_events(folder, resume_step)
                for event in _events(*item):
                    writer.add_event(event)
                writer.flush()
            except Exception as error:  # a tracker must not end a run: counted, said once
                self.dropped += 1
                if self.dropped == 1:
                    print(f"warning: TensorBoard: {error}; metrics.jsonl goes on.", file=sys.stderr)
        if writer is not None:
            writer.close()


def _open_events(folder: Path, resume_step: int) -> Any:
    from tensorboard.compat.proto import event_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    writer.add_event(event_pb2.Event(wall_time=time.time(), step=resume_step + 1, session_log=start))
    return writer


def _events(step: int, scalars: Mapping[str, float], artefacts: Mapping[str, bytes]) -> list[Any]:
    from tensorboard.compat.proto import event_pb2, summary_pb2

    values = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
    for name, data in artefacts.items():
        stem, _, kind = name.rpartition(".")
        if kind == "png":
            image = summary_pb2.Summary.Image(encoded_image_string=data)
            values.append(summary_pb2.Summary.Value(tag=f"samples/{stem}", image=image))
        elif kind == "wav":
            audio = summary_pb2.Summary.Audio(encoded_audio_string=data, content_type="audio/wav")
            values.append(summary_pb2.Summary.Value(tag=f"samples/{stem}", audio=audio))
    return [event_pb2.Event(wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=values))]


def open_tracker(kind: str, run_dir: Path, resume_step: int) -> Tracker:
    """Return the chosen tracker; a missing tensorboard package is said once and replaced by none."""
    import importlib.util

    if kind == "none":
        return NoTracker()
    if importlib.util.find_spec("tensorboard") is None:
        print("warning: track = tensorboard, but it is not installed (pip install tensorboard).", file=sys.stderr)
        return NoTracker()
    return TensorBoardTracker(run_dir / "tensorboard", resume_step)


def headline(record: Mapping[str, Any]) -> str:
    """Return the numbers a person wants to see of a step: reward first, then loss."""
    for name in ("reward/mean", "eval/reward/mean", "loss/total"):
        if isinstance(record.get(name), (int, float)):
            shown = [(name, record[name])]
            break
    else:
        shown = []
    if shown and shown[0][0] != "loss/total" and isinstance(record.get("loss/total"), (int, float)):
        shown.append(("loss/total", record["loss/total"]))
    return " ".join(f"{name.removesuffix('/mean').removesuffix('/total')} {value:.4g}" for name, value in shown)


class Progress:
    """A bar on a terminal, else a line on stderr every few seconds; silent on ranks other than 0.

    Args:
        steps: of the whole run.
        visible: whether anything is shown.
        unit: what a step is called.
        describe: record → the numbers to show.
    """

    def __init__(
        self,
        steps: int,
        *,
        visible: bool,
        unit: str = "step",
        describe: Callable[[Mapping[str, Any]], str] = headline,
    ) -> None:
        self.steps, self.first = steps, 0
        self._visible, self._unit, self._describe = visible, unit, describe
        self._begin = time.monotonic()
        self._last = -LINE_EVERY_S
        self._bar: Any = None

    def start(self, done: int) -> None:
        """Begin at a step; opens the bar on a terminal."""
        self.first, self._begin = done, time.monotonic()
        if self._visible and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.steps, initial=done, unit=self._unit, file=sys.stderr, dynamic_ncols=True)

    def show(self, step: int, record: Mapping[str, Any]) -> None:
        """Show a finished step."""
        if not self._visible:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(self._describe(record), refresh=False)
            self._bar.update(step - self._bar.n)
            self._bar.refresh()  # update() draws at most ten times a second, and the last numbers must stand
            return
        now = time.monotonic()
        if now - self._last >= LINE_EVERY_S or step == self.steps:
            self._last = now
            taken = step - self.first
            rate = f" ({taken / max(now - self._begin, 1e-9):.2f} {self._unit}s/s)" if taken else ""
            print(f"{self._unit} {step}/{self.steps} {self._describe(record)}{rate}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()
