"""One row of `Envs`: in this process, or in a process of its own that may crash or hang."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

from gencontrol.errors import EnvironmentMissing, UsageError
from gencontrol.robotics.envs.make import env_name, make_env
from gencontrol.robotics.envs.types import Array, EnvSpec, RobotEnv, Timeouts, Transition
from gencontrol.robotics.envs.worker import describe, pack, spec_from_json, unpack, unpack_transition

_LOG_BYTES = 1 << 20


class InlineRow:
    """A row in this process; exceptions are its only faults."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._request = request
        self._env: RobotEnv | None = None
        self._answer: Transition | str = "nothing was asked"
        self._frame: Array | str = "nothing was asked"

    def start(self) -> EnvSpec:
        """Make the environment and return its description."""
        try:
            self._env = make_env(**self._request)
        except (UsageError, EnvironmentMissing):
            raise
        except Exception as error:
            raise UsageError(_not_made(self._request, describe(error))) from error
        return self._env.spec

    def send_reset(self, seed: int) -> None:
        """Ask for a reset."""
        try:
            if self._env is None:
                self.start()
            assert self._env is not None
            self._answer = Transition(self._env.reset(seed), 0.0, False, False, None)
        except Exception as error:
            self._answer = f"crash: {describe(error)}"

    def send_step(self, action: Array) -> None:
        """Ask for a step."""
        assert self._env is not None
        try:
            self._answer = self._env.step(action.copy())
        except Exception as error:
            self._answer = f"crash: {describe(error)}"

    def receive(self) -> Transition | str:
        """Return what the last reset or step gave, or why it gave nothing."""
        return self._answer

    def send_render(self) -> None:
        """Ask for a frame."""
        assert self._env is not None
        try:
            self._frame = self._env.render()
        except Exception as error:
            self._frame = describe(error)

    def receive_frame(self) -> Array | str:
        """Return the frame, or why there is none."""
        return self._frame

    def restart(self) -> None:
        """Throw the environment away; the next reset makes it anew."""
        self.close()

    def close(self) -> None:
        """Free the environment; what it raises on the way is of no use to anyone."""
        env, self._env = self._env, None
        if env is not None:
            try:
                env.close()
            except Exception as error:
                print(f"closing {env_name(self._request['env'])}: {describe(error)}", file=sys.stderr)


class ProcessRow:
    """A row in a process of its own; see `env_worker`."""

    def __init__(self, request: dict[str, Any], timeouts: Timeouts) -> None:
        self._request, self._timeouts = request, timeouts
        self._log = tempfile.TemporaryFile()
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._wait_s = timeouts.make_s
        self._lost = ""
        self._launch()

    def _launch(self) -> None:
        """Start the process; it makes its environment while others are busy."""
        ours, theirs = socket.socketpair()
        paths = [path or os.getcwd() for path in sys.path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment.setdefault(name, "1")  # one thread per row; rows are the parallelism
        command = [sys.executable, "-m", "gencontrol.robotics.envs.worker", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                [*command, json.dumps(self._request)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=environment,
            )
        self._link = Connection(ours.detach())
        self._ready, self._lost = False, ""

    def start(self) -> EnvSpec:
        """Wait until the environment is made and return its description.

        Raises:
            EnvironmentMissing, UsageError: it cannot be made.
        """
        answer = self._receive(self._timeouts.make_s, "making it")
        if isinstance(answer, str):
            raise UsageError(_not_made(self._request, answer))
        head, _ = answer
        if head.get("kind"):
            raise (EnvironmentMissing if head["kind"] == "EnvironmentMissing" else UsageError)(head["error"])
        if "error" in head:
            raise UsageError(_not_made(self._request, head["error"]))
        self._ready = True
        return spec_from_json(head["spec"])

    def send_reset(self, seed: int) -> None:
        """Ask for a reset."""
        self._send({"op": "reset", "seed": seed}, None, self._timeouts.reset_s)

    def send_step(self, action: Array) -> None:
        """Ask for a step."""
        self._send({"op": "step"}, {"action": action}, self._timeouts.step_s)

    def send_render(self) -> None:
        """Ask for a frame."""
        self._send({"op": "render"}, None, self._timeouts.step_s)

    def receive(self) -> Transition | str:
        """Return what the last reset or step gave, or why it gave nothing."""
        answer = self._answer()
        return answer if isinstance(answer, str) else unpack_transition(*answer)

    def receive_frame(self) -> Array | str:
        """Return the frame, or why there is none."""
        answer = self._answer()
        return answer.removeprefix("crash: ") if isinstance(answer, str) else answer[1]["frame"]

    def restart(self) -> None:
        """End the process and start another one."""
        self._stop()
        self._launch()

    def close(self) -> None:
        """End the process: kindly when it listens, by force when it does not."""
        if self._process is not None and self._ready and not self._lost:
            self._link.close()
            try:
                self._process.wait(2.0)
            except subprocess.TimeoutExpired:
                pass
        self._stop()
        self._log.close()

    def _stop(self) -> None:
        self._link.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _send(self, head: dict[str, Any], arrays: dict[str, Array] | None, wait_s: float) -> None:
        self._wait_s, self._lost = wait_s, ""
        if not self._ready:
            try:
                self.start()
            except (UsageError, EnvironmentMissing) as error:
                self._lost = f"crash: {error}"
                return
        try:
            self._link.send_bytes(pack(head, arrays))
        except OSError:
            self._lost = self._death()

    def _answer(self) -> tuple[dict[str, Any], dict[str, Array]] | str:
        if self._lost:
            return self._lost
        answer = self._receive(self._wait_s, "it")
        if isinstance(answer, str):
            self._lost = answer
            return answer
        return f"crash: {answer[0]['error']}" if "error" in answer[0] else answer

    def _receive(self, wait_s: float, what: str) -> tuple[dict[str, Any], dict[str, Array]] | str:
        """Return the next message, or why there is none."""
        begin = time.monotonic()
        try:
            while not self._link.poll(max(0.0, wait_s - (time.monotonic() - begin))):
                if time.monotonic() - begin >= wait_s:
                    return f"hang: {what} took longer than {wait_s:g} s"
            return unpack(self._link.recv_bytes())
        except (EOFError, OSError):
            return self._death()

    def _death(self) -> str:
        """Say how the process ended, with the last line that it wrote."""
        assert self._process is not None
        try:
            code = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            return "crash: its process closed the connection"
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _LOG_BYTES))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f"crash: its process ended with {name}" + (f" ({lines[-1].strip()[:200]})" if lines else "")


def _not_made(request: dict[str, Any], reason: str) -> str:
    return f"environment '{env_name(request['env'])}' cannot be made: {reason}."
