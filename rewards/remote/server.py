"""A reward as a service: standard library HTTP, the protocol of `wire`, no pickle, bounded in every direction.

A connection that drips, a body that is too large, too many connections, a wrong
token and anything that is not the protocol are refused with a status and one line; the server goes on.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import queue
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import TimeoutError as WaitedTooLong
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import torch
from torch import Tensor

from gencontrol._version import __version__
from gencontrol.errors import UsageError
from gencontrol.rewards.base import Reward
from gencontrol.rewards.remote.queue import Limits, ScoreQueue
from gencontrol.rewards.remote.wire import PROTOCOL, TENSORS, WireError, deadline, one_line, pack, unpack
from gencontrol.types import RewardContext


def identity_of(facts: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of what a reward was made from; a client notices when a restart changes them."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=6).hexdigest()


class RewardServer(ThreadingHTTPServer):
    """Serves one item reward at /NAME until `poll` raises."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(
        self,
        reward: Reward,
        name: str,
        address: tuple[str, int] = ("127.0.0.1", 0),
        *,
        limits: Limits | None = None,
        token: str | None = None,
        made_from: Mapping[str, Any] | None = None,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        """Bind the address.

        Args:
            reward: an item reward.
            name: path under which it is served.
            address: host and port; port 0 takes a free one.
            limits: None takes the defaults.
            token: what clients must send; None lets everybody in.
            made_from: JSON-able settings of the reward, part of its identity.
            poll: called twice a second; may raise to stop the server.

        Raises:
            UsageError: a set reward, or an address that cannot be bound.
        """
        if reward.kind != "item":
            raise UsageError(
                f"reward '{reward.name}' scores whole sets, which a server cannot know; serve an item reward (the "
                "per-clip 'fad' instead of 'fad-set')."
            )
        self.reward_name, self.limits, self.token = name, limits or Limits(), token
        facts = {"reward": reward.name, "version": __version__, **(made_from or {})}
        self.facts = {
            "protocol": PROTOCOL,
            "reward": name,
            "kind": reward.kind,
            "version": __version__,
            "identity": identity_of(facts),
            "max_bytes": self.limits.max_bytes,
        }
        self.queue = ScoreQueue(reward, self.limits)
        self._poll = poll
        self._places = threading.BoundedSemaphore(self.limits.connections)
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        try:
            super().__init__(address, _Handler)
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"cannot listen at {address[0]} port {address[1]} ({error}); choose another --host or --port."
            ) from error

    @property
    def url(self) -> str:
        """Where clients find the reward."""
        host, port = self.server_address[:2]
        shown = f"[{host!s}]" if ":" in str(host) else str(host)
        return f"http://{shown}:{port}/{self.reward_name}"

    def server_bind(self) -> None:
        """Bind without asking a name server for the host's name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def service_actions(self) -> None:
        """Let the owner stop the server."""
        self._poll()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hand a connection to a thread, or refuse it when too many are open."""
        if not self._places.acquire(blocking=False):
            try:
                request.settimeout(1.0)
                request.sendall(b'HTTP/1.0 503 Busy\r\nRetry-After: 1\r\n\r\n{"error": "too many connections"}')
            except OSError:
                pass  # it has gone
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke concerns nobody else."""
        error = sys.exc_info()[1]
        if not isinstance(error, (OSError, ValueError)):
            print(f"reward server: {type(error).__name__}: {one_line(str(error))}", file=sys.stderr, flush=True)

    def drain(self, seconds: float) -> None:
        """Wait for the connections that are open, at most so long."""
        end = time.monotonic() + seconds
        for _ in range(self.limits.connections):
            if not self._places.acquire(timeout=max(0.0, end - time.monotonic())):
                return


class _Refusal(Exception):
    """A status and the line that goes with it."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    """One request on one connection."""

    server: RewardServer
    server_version = "gencontrol"
    sys_version = ""
    error_content_type = "application/json"
    error_message_format = '{"error": "%(message)s"}\n'
    timeout = 30  # seconds for one read or write on the socket

    def handle(self) -> None:
        """Read and answer within the limits of time."""
        with deadline(self.connection, self.server.limits.read_s) as self._reading:
            super().handle()

    def do_GET(self) -> None:
        """Health, or the facts of the reward."""
        if self.path == "/health":
            self._json(200, {"status": "ok"})
            return
        self._answer(lambda: self._json(200, self.server.facts))

    def do_POST(self) -> None:
        """Scores of the samples in the body."""
        self._answer(self._score)

    def _answer(self, work: Callable[[], None]) -> None:
        """Check token and name, do the work, and turn what it raises into a status."""
        try:
            self._check()
            work()
        except _Refusal as refusal:
            self._json(refusal.status, {"error": one_line(str(refusal))})
            self._linger()
        except WireError as error:
            self._json(400, {"error": one_line(str(error))})
        except queue.Full:
            self._json(503, {"error": "too many requests wait"})
        except WaitedTooLong:
            self._json(503, {"error": f"not scored within {self.server.limits.score_s:g} s"})
        except UsageError as error:
            self._json(422, {"error": one_line(str(error))})
        except OSError:
            raise
        except Exception as error:
            text = one_line(f"{type(error).__name__}: {error}")
            print(f"reward server: {text}", file=sys.stderr, flush=True)
            self._json(500, {"error": text})

    def _check(self) -> None:
        """Raise _Refusal unless token and name are right."""
        if self.server.token is not None:
            given = self.headers.get("Authorization", "").encode("utf-8", "replace")
            if not hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
                raise _Refusal(401, "the token is missing or wrong")
        name = unquote(self.path).strip("/")
        if name not in ("", self.server.reward_name):
            raise _Refusal(404, f"there is no reward of that name; this server has '{self.server.reward_name}'")

    def _score(self) -> None:
        samples, context = _request(self._body())
        self._reading.cancel()
        out = self.server.queue.score(samples, context)
        facts = {
            "protocol": PROTOCOL,
            "reward": self.server.reward_name,
            "identity": self.server.facts["identity"],
            "reasons": {str(key): int(value) for key, value in out.extras.get("reasons", {}).items()},
        }
        self._send(200, TENSORS, pack({"values": out.values, "valid": out.valid}, facts))

    def _body(self) -> bytes:
        """The whole body.

        Raises:
            _Refusal: no length, too long, compressed, or broken off.
        """
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 16):
            raise _Refusal(411, "Content-Length is missing")
        if int(length) > self.server.limits.max_bytes:
            raise _Refusal(413, f"the body has {int(length)} bytes; at most {self.server.limits.max_bytes} are taken")
        if self.headers.get("Content-Encoding", "identity") != "identity":
            raise _Refusal(415, "compressed bodies are not taken")
        body = self.rfile.read(int(length))
        if len(body) != int(length):
            raise _Refusal(400, "the body broke off")
        return body

    def _linger(self) -> None:
        """Read on for a moment, so that a client which is still sending sees the answer instead of a reset."""
        self.connection.shutdown(socket.SHUT_WR)
        with deadline(self.connection, 1.0):
            while self.rfile.read1(2**16):
                pass

    def _json(self, status: int, facts: Mapping[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(facts).encode() + b"\n")

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing about requests; errors of the reward are printed where they happen."""


def _request(body: bytes) -> tuple[Tensor, RewardContext]:
    """Samples and context of a request's body.

    Raises:
        WireError: they are not what the protocol says.
    """
    tensors, facts = unpack(body)
    samples = tensors.get("samples")
    if samples is None or len(tensors) != 1 or samples.ndim < 2:
        raise WireError("expected one tensor 'samples' with the batch axis first")
    if samples.dtype == torch.uint8:
        samples = samples.float() / 255.0
    if not samples.is_floating_point():
        raise WireError(f"samples are {samples.dtype}; expected floating point, or uint8 for images")
    prompts, rate, metadata = facts.get("prompts"), facts.get("sampling_rate"), facts.get("metadata", {})
    count = len(samples)
    if prompts is not None and not (_is_list(prompts, count) and all(isinstance(text, str) for text in prompts)):
        raise WireError(f"prompts are null or a list of {count} texts")
    if rate is not None and not (type(rate) is int and rate > 0):
        raise WireError("sampling_rate is null or a positive whole number of Hz")
    if not isinstance(metadata, dict) or not all(_is_list(value, count) for value in metadata.values()):
        raise WireError(f"metadata is an object of lists of {count} values")
    if math.prod(samples.shape) == 0 and count:
        raise WireError(f"samples of shape {list(samples.shape)} are empty")
    return samples.float(), RewardContext(prompts, rate, metadata)


def _is_list(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count
