"""A reward as a service on starlette and uvicorn: the protocol of `wire`, no pickle, bounded in every direction.

One thread scores, for a device does one thing at a time; requests wait for it in a bounded queue, and those that wait
together may be merged into one call of the reward.  A connection that drips, a body that is too large, too many
connections, a wrong token and anything that is not the protocol are refused with a status and one line; the server goes
on.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import math
import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gencontrol._version import __version__
from gencontrol.errors import EnvironmentMissing, UsageError
from gencontrol.files import digest
from gencontrol.rewards.base import Reward, checked
from gencontrol.rewards.remote.wire import PROTOCOL, TENSORS, WireError, one_line, pack, unpack
from gencontrol.types import RewardContext, RewardOut

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.routing import Route
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as missing:
    raise EnvironmentMissing(
        f'a reward server needs starlette and uvicorn ({missing}): pip install "gencontrol[serve]".'
    ) from missing

_GRACE_S = 5  # for requests under way when the server stops


@dataclass(frozen=True)
class Limits:
    """What one server takes.

    Args:
        max_bytes: of one request's body.
        connections: at once; more are refused with 503.
        waiting: requests in the queue; more are refused with 503.
        read_s: seconds in which a request must have arrived whole.
        score_s: seconds after which a request that was not scored is given up with 503.
        merge: samples up to which waiting requests are scored in one call; 0 never merges.  Only for rewards whose
            value of a sample does not depend on the others in the batch.
    """

    max_bytes: int = 64 * 2**20
    connections: int = 32
    waiting: int = 64
    read_s: float = 60.0
    score_s: float = 600.0
    merge: int = 0

    def __post_init__(self) -> None:
        if min(self.max_bytes, self.connections, self.waiting) < 1 or self.merge < 0:
            raise UsageError("max_bytes, connections and waiting are at least 1, merge is not negative.")
        if min(self.read_s, self.score_s) <= 0:
            raise UsageError("read_s and score_s are positive numbers of seconds.")


@dataclass
class _Job:
    """Samples that wait for their scores."""

    samples: Tensor
    context: RewardContext
    answer: Future[RewardOut] = field(default_factory=Future)

    def fits(self, other: _Job) -> bool:
        """Whether both can be scored in one call."""
        mine, its = self.context, other.context
        return (
            self.samples.shape[1:] == other.samples.shape[1:]
            and (mine.prompts is None) == (its.prompts is None)
            and mine.sampling_rate == its.sampling_rate
            and mine.metadata.keys() == its.metadata.keys()
        )


class ScoreQueue:
    """The one thread that calls the reward, and the queue before it."""

    def __init__(self, reward: Reward, limits: Limits) -> None:
        """Start the thread; it ends with the process."""
        self._reward, self._limits = reward, limits
        self._jobs: queue.Queue[_Job] = queue.Queue(limits.waiting)
        self._kept: _Job | None = None  # taken from the queue, did not fit the last call
        threading.Thread(target=self._loop, daemon=True).start()

    def add(self, samples: Tensor, context: RewardContext) -> Future[RewardOut]:
        """Queue samples; the future gives their scores, or what the reward raised.

        Raises:
            queue.Full: too many requests wait.
        """
        job = _Job(samples, context)
        self._jobs.put_nowait(job)
        return job.answer

    def waiting(self) -> int:
        """Requests in the queue."""
        return self._jobs.qsize()

    def _loop(self) -> None:
        while True:
            jobs = [job for job in self._take() if job.answer.set_running_or_notify_cancel()]
            if len(jobs) > 1 and self._together(jobs):
                continue
            for job in jobs:  # alone, so that one bad request does not fail its neighbours
                try:
                    job.answer.set_result(self._call(job.samples, job.context))
                except Exception as error:  # belongs to the request that asked
                    job.answer.set_exception(error)

    def _take(self) -> list[_Job]:
        """The next job, and those behind it that fit into one call."""
        jobs = [self._kept or self._jobs.get()]
        self._kept = None
        count = len(jobs[0].samples)
        while count < self._limits.merge:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if not jobs[0].fits(job) or count + len(job.samples) > self._limits.merge:
                self._kept = job
                break
            jobs.append(job)
            count += len(job.samples)
        return jobs

    def _call(self, samples: Tensor, context: RewardContext) -> RewardOut:
        with torch.no_grad():
            return checked(self._reward.name, self._reward(samples, context), len(samples))

    def _together(self, jobs: list[_Job]) -> bool:
        """Score jobs that fit in one call; False where that raised."""
        first = jobs[0].context
        prompts = None if first.prompts is None else [p for job in jobs for p in job.context.prompts or ()]
        metadata = {key: [v for job in jobs for v in job.context.metadata[key]] for key in first.metadata}
        context = RewardContext(prompts, first.sampling_rate, metadata)
        try:
            out = self._call(torch.cat([job.samples for job in jobs]), context)
        except Exception:
            return False
        sizes = [len(job.samples) for job in jobs]
        for job, values, valid in zip(jobs, out.values.split(sizes), out.valid.split(sizes), strict=True):
            job.answer.set_result(RewardOut(values, valid))
        return True


class _Connection(H11Protocol):
    """A connection that is refused where too many are open, and cut when a request does not arrive whole in time.

    uvicorn itself bounds neither: a client that sends a byte of its header now and then would be served for ever.
    """

    def __init__(self, limits: Limits, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._limits, self._refused, self._told = limits, False, False
        self._cut: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the clock; a connection too many gets a second to take its refusal."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            self._refused = True
            self.connections.discard(self)
        self._wind(1.0 if self._refused else self._limits.read_s)

    def data_received(self, data: bytes) -> None:
        """Stop the clock when a request has arrived whole."""
        if not self._refused:
            super().data_received(data)
            if self._cut is not None and self.cycle is not None and not self.cycle.more_body:
                self._cut.cancel()
        elif not self._told:
            self._told = True  # closing at once would reset the connection, and the client would not see why
            self._say(503, "too many connections")
            self.transport.write_eof()

    def on_response_complete(self) -> None:
        """Start the clock of the next request."""
        self._wind(self._limits.read_s)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        super().connection_lost(exc)
        if self._cut is not None:
            self._cut.cancel()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, in the words of the protocol."""
        self._say(400, msg)
        self.transport.close()

    def _say(self, status: int, text: str) -> None:
        """Answer what uvicorn did not let through to the application."""
        body = json.dumps({"error": text}) + "\n"
        head = f"HTTP/1.1 {status} Refused\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(f"{head}Retry-After: 1\r\nConnection: close\r\n\r\n{body}".encode())

    def _wind(self, seconds: float) -> None:
        if self._cut is not None:
            self._cut.cancel()
        self._cut = self.loop.call_later(seconds, self.transport.abort)


class _Uvicorn(uvicorn.Server):
    """Lets the owner stop the server by an exception of `poll`, which comes out of `run` when all is answered."""

    def __init__(self, config: uvicorn.Config, poll: Callable[[], None]) -> None:
        super().__init__(config)
        self._poll = poll
        self.stopped_by: BaseException | None = None

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        try:
            self._poll()
        except BaseException as error:
            self.stopped_by = error
            return True
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the owner."""
        yield


class RewardServer:
    """Serves one item reward at /NAME until `poll` raises or `stop` is called."""

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
            poll: called ten times a second; may raise to stop the server.

        Raises:
            UsageError: a set reward, or an address that cannot be bound.
        """
        if reward.kind != "item":
            raise UsageError(
                f"reward '{reward.name}' scores whole sets, which a server cannot know; serve an item reward (the "
                "per-clip 'fad' instead of 'fad-set')."
            )
        self.reward_name, self.limits, self._token = name, limits or Limits(), token
        self.facts = {
            "protocol": PROTOCOL,
            "reward": name,
            "kind": reward.kind,
            "version": __version__,
            # a client notices when a restart changes what the reward is made from
            "identity": digest({"reward": reward.name, "version": __version__, **(made_from or {})}, 12),
            "max_bytes": self.limits.max_bytes,
        }
        self.queue = ScoreQueue(reward, self.limits)
        try:
            self._socket = socket.create_server(
                address, family=socket.AF_INET6 if ":" in address[0] else socket.AF_INET, backlog=128
            )
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"cannot listen at {address[0]} port {address[1]} ({error}); choose another --host or --port."
            ) from error
        #: host and port
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        routes = [Route("/health", self._health), Route("/{name:path}", self._answer, methods=["GET", "POST"])]
        app = Starlette(routes=routes, exception_handlers={HTTPException: _other_method})
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                app,
                http=partial(_Connection, self.limits),  # type: ignore[arg-type]  # called like the class
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",  # strangers must not be able to fill the terminal
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_GRACE_S,
            ),
            poll,
        )

    @property
    def url(self) -> str:
        """Where clients find the reward."""
        host, port = self.address
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/{self.reward_name}"

    def serve(self) -> None:
        """Serve until `poll` raises, which is passed on, or `stop` is called; requests under way get their answers."""
        self._uvicorn.run(sockets=[self._socket])
        if self._uvicorn.stopped_by is not None:
            raise self._uvicorn.stopped_by

    def stop(self) -> None:
        """End `serve`, from another thread."""
        self._uvicorn.should_exit = True

    async def _health(self, request: Request) -> Response:
        return _json(200, {"status": "ok"})

    async def _answer(self, request: Request) -> Response:
        """Facts or scores; whatever goes wrong becomes a status."""
        try:
            if self._token is not None:
                given = request.headers.get("Authorization", "").encode("latin-1")
                if not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
                    raise HTTPException(401, "the token is missing or wrong")
            name = request.path_params["name"].strip("/") + (f"?{request.url.query}" if request.url.query else "")
            if name not in ("", self.reward_name):
                raise HTTPException(404, f"there is no reward of that name; this server has '{self.reward_name}'")
            return await self._score(request) if request.method == "POST" else _json(200, self.facts)
        except HTTPException as refusal:
            return _json(refusal.status_code, {"error": one_line(refusal.detail)})
        except WireError as error:
            return _json(400, {"error": one_line(str(error))})
        except ClientDisconnect:
            return _json(400, {"error": "the body broke off"})
        except queue.Full:
            return _json(503, {"error": "too many requests wait"})
        except TimeoutError:
            return _json(503, {"error": f"not scored within {self.limits.score_s:g} s"})
        except UsageError as error:
            return _json(422, {"error": one_line(str(error))})
        except Exception as error:
            text = one_line(f"{type(error).__name__}: {error}")
            print(f"reward server: {text}", file=sys.stderr, flush=True)
            return _json(500, {"error": text})

    async def _score(self, request: Request) -> Response:
        """Scores of the samples in the body."""
        length = request.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 16):
            raise HTTPException(411, "Content-Length is missing")
        if int(length) > self.limits.max_bytes:
            raise HTTPException(413, f"the body has {length} bytes; at most {self.limits.max_bytes} are taken")
        if request.headers.get("Content-Encoding", "identity") != "identity":
            raise HTTPException(415, "compressed bodies are not taken")
        # large messages are read and written beside the loop, which goes on answering others
        samples, context = await asyncio.to_thread(_request, await request.body())
        scores = asyncio.wrap_future(self.queue.add(samples, context))
        out = await asyncio.wait_for(scores, self.limits.score_s)
        facts = {
            "protocol": PROTOCOL,
            "reward": self.reward_name,
            "identity": self.facts["identity"],
            "reasons": {str(key): int(value) for key, value in out.extras.get("reasons", {}).items()},
        }
        return Response(pack({"values": out.values, "valid": out.valid}, facts), 200, media_type=TENSORS)


def _json(status: int, facts: Mapping[str, Any]) -> Response:
    return Response(json.dumps(facts).encode() + b"\n", status, media_type="application/json")


async def _other_method(request: Request, error: Exception) -> Response:
    """What starlette itself refuses: the protocol has GET and POST alone."""
    return _json(501, {"error": f"{request.method} is not part of the protocol"})


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

    def is_list(value: Any) -> bool:
        return isinstance(value, list) and len(value) == count

    if prompts is not None and not (is_list(prompts) and all(isinstance(text, str) for text in prompts)):
        raise WireError(f"prompts are null or a list of {count} texts")
    if rate is not None and not (type(rate) is int and rate > 0):
        raise WireError("sampling_rate is null or a positive whole number of Hz")
    if not isinstance(metadata, dict) or not all(is_list(value) for value in metadata.values()):
        raise WireError(f"metadata is an object of lists of {count} values")
    if math.prod(samples.shape) == 0 and count:
        raise WireError(f"samples of shape {list(samples.shape)} are empty")
    return samples.float(), RewardContext(prompts, rate, metadata)
