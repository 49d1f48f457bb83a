"""One exception class per cause; each carries the exit code that the command line returns for it.

Exit codes (also in the README): 0 done, 2 usage, 3 no intact checkpoint, 4 numerics, 5 reward, 6 environment, 7 disk,
8 nothing learnt, 130 interrupted, 143 preempted after a save.
A message says what was given, what was expected and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GencontrolError(Exception):
    """Base of all errors that a user can mend; the command line prints the message alone, without a traceback."""

    exit_code = 1


class UsageError(GencontrolError, ValueError):
    """A wrong argument, option, file or folder named by the user."""

    exit_code = 2


class CheckpointError(GencontrolError):
    """No intact checkpoint could be loaded."""

    exit_code = 3


class NumericsError(GencontrolError):
    """Losses or gradients stayed non-finite past the allowed budget."""

    exit_code = 4


class RewardError(GencontrolError):
    """A reward failed, or too few of its values were valid."""

    exit_code = 5


class EnvironmentMissing(GencontrolError, ImportError):
    """A package, program or device that the request needs is not here; the message names the install line."""

    exit_code = 6


class DiskError(GencontrolError):
    """The disk is full or not writable."""

    exit_code = 7


class Inconclusive(GencontrolError):
    """Everything ran and its results are written, but they answer nothing; the message says why and what would help."""

    exit_code = 8


class Preempted(GencontrolError):
    """SIGTERM or SIGUSR1 arrived and the state was saved."""

    exit_code = 143


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory of the machine or of an accelerator did not suffice."""
    if isinstance(error, MemoryError):
        return True
    text = f"{type(error).__name__} {error}".lower()
    return any(sign in text for sign in ("outofmemory", "out of memory", "not enough memory", "can't allocate memory"))
