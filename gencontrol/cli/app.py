"""The command table and the one place where an exception becomes a line of text and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import Annotated, Any

import typer

from gencontrol._version import __version__
from gencontrol.cli.generate import JobCommand
from gencontrol.cli.table import COMMANDS
from gencontrol.errors import GencontrolError, is_out_of_memory

_HELP = "Steer a pretrained generative model towards a reward: fine-tune, search, sample, measure."
_LESS_MEMORY = "lower --micro-batch, or add --gradient-checkpointing or --precision bf16."


def _version(value: bool | None) -> None:
    if value:
        print(f"gencontrol {__version__}")
        raise typer.Exit


def group() -> Any:
    """Return the group of all commands; what a command takes is read from its job when it is called."""
    app = typer.Typer(
        help=_HELP,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def root(
        version: Annotated[
            bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
        ] = None,
    ) -> None:
        pass

    made: Any = typer.main.get_group(app)
    made.help, made.name = _HELP, "gencontrol"
    made.commands.update({name: JobCommand(name, entry) for name, entry in COMMANDS.items()})
    return made


def _say(message: str, code: int) -> int:
    print(f"gencontrol: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def explain(error: BaseException) -> int:
    """Print what happened and what to do next; return the exit code."""
    if os.environ.get("GENCONTROL_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    if isinstance(error, typer.TyperException):
        message = error.format_message()
        return _say(message if message.rstrip().endswith("?") else f"{message.rstrip('.')}; see --help.", 2)
    if isinstance(error, GencontrolError):
        full = "out of memory" in str(error).lower()
        return _say(f"{error} {_LESS_MEMORY.capitalize()}" if full else str(error), error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return _say("interrupted; run the same command again (a training or search goes on from its last save).", 130)
    if isinstance(error, typer.Abort):
        return _say("aborted at a question; run again and answer it.", 130)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, OSError):
        return _explain_os(error)
    return _explain_unknown(error)


def _explain_os(error: OSError) -> int:
    if error.errno == errno.EPIPE:
        sys.stderr.close()
        return 0
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return _say(f"the disk is full{where}; free some space and run the same command again: it resumes.", 7)
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return _say(f"no permission to write or read{where}; choose another --output or mend the permission.", 7)
    return _explain_unknown(error)


def _explain_unknown(error: BaseException) -> int:
    text = f"{type(error).__name__}: {error}"
    if is_out_of_memory(error):
        where = "".join(f" {note}" for note in dict.fromkeys(getattr(error, "__notes__", [])))
        return _say(f"out of memory{where} ({text[:200]}); {_LESS_MEMORY}", 6)
    if isinstance(error, ImportError):
        name = error.name or "a package"
        return _say(f"{name} is missing or broken ({error}); `gencontrol doctor` lists the install lines.", 6)
    return _say(f"unexpected {text[:400]}; run again with GENCONTROL_DEBUG=1 for the trace and report it.", 1)
