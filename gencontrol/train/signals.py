"""Signals: the first one asks for a save at the next poll, the second one ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

from gencontrol.errors import Preempted

_WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupted(Preempted):
    """Ctrl-C arrived and the state was saved."""

    exit_code = 130


class SignalGuard:
    """While entered, SIGTERM, SIGUSR1 and SIGINT only set `pending`; a second signal exits with 128 + its number.

    Outside the main thread no handler can be set; the guard is then inert.  Forked workers get the default behaviour.
    """

    def __init__(self, doing: str = "saving the last whole step") -> None:
        """Say what is still done after the first signal."""
        self._doing = doing
        self.pending: signal.Signals | None = None
        self._owner = 0
        self._previous: dict[signal.Signals, object] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self.pending is not None:
            os._exit(128 + number)
        self.pending = signal.Signals(number)
        text = f"\n{self.pending.name}: {self._doing}; a second signal exits at once.\n"
        os.write(2, text.encode())

    def __enter__(self) -> SignalGuard:
        self._owner = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in _WATCHED:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned
        self._previous.clear()

    def error(self) -> Preempted:
        """Return the exception that the pending signal stands for."""
        kind = Interrupted if self.pending == signal.SIGINT else Preempted
        name = self.pending.name if self.pending is not None else "a signal on another rank"
        return kind(f"stopped by {name}; run the same command to go on.")

    def poll(self) -> None:
        """Raise `Preempted` (or `Interrupted`) when a signal is pending."""
        if self.pending is not None:
            raise self.error()
