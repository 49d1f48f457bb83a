"""A reward on another machine: the client of `gencontrol serve-reward`, or of any server that speaks `wire`'s protocol.

Every call ends within `budget_s`, whatever the server does: each try has its own time limit over connecting, sending
and reading together; connection errors, 5xx and garbage are tried again with growing pauses; after five failed
requests in a row the circuit opens and requests fail at once until a trial succeeds.  What could not be scored is
invalid (never 0) and `extras["reasons"]` counts why.  Redirects are not followed and proxies of the environment are not
used, so a token goes to the named host only.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import httpx
import torch
from jaxtyping import Bool, Float
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, stop_before_delay
from tenacity.wait import wait_exponential_jitter
from torch import Tensor

from gencontrol.errors import RewardError, UsageError
from gencontrol.rewards.base import checked
from gencontrol.rewards.pool import bounded_map
from gencontrol.rewards.remote.wire import (
    PROTOCOL,
    TENSORS,
    TOKEN_VARIABLE,
    WireError,
    check_url,
    one_line,
    pack,
    token_from_environment,
    unpack,
)
from gencontrol.types import RewardContext, RewardOut

_LOG = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "uint8": torch.uint8}
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 10.0
# failures in a row; seconds until a trial (docs/guarantees.md#remote-rewards: breaker after 5)
_OPEN_AFTER, _OPEN_S = 5, 15.0
_ANSWER_BYTES = 2**20  # and 64 for each item
Result = TypeVar("Result")


class Refused(Exception):
    """The request failed for good; the text is the reason."""


class Failed(Exception):
    """The request failed and may be tried again; the text is the reason."""


@dataclass
class Breaker:
    """Opens after five failed requests in a row; then lets one trial through at a time until one succeeds."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    failures: int = 0
    open_until: float = 0.0
    last: str = ""

    def enter(self) -> None:
        """Raise Refused while the circuit is open."""
        with self.lock:
            if self.failures >= _OPEN_AFTER:
                if time.monotonic() < self.open_until:
                    raise Refused(f"not asked after {_OPEN_AFTER} failures in a row: {self.last}")
                self.open_until = time.monotonic() + _OPEN_S  # this caller is the trial

    def leave(self, error: str) -> None:
        """Record how a request ended; "" is success."""
        with self.lock:
            self.failures = self.failures + 1 if error else 0
            self.last = error
            if error:
                self.open_until = time.monotonic() + _OPEN_S


@dataclass(frozen=True)
class ServerFacts:
    """What a server says about itself: name and kind of its reward, its version, and what must not change in a run."""

    reward: str
    kind: str
    version: str
    identity: str
    max_bytes: int


@dataclass(frozen=True)
class _Scored:
    """Scores of some rows, and why some are missing."""

    values: Float[Tensor, " b"]
    valid: Bool[Tensor, " b"]
    reasons: Mapping[str, int]

    @classmethod
    def nothing(cls, count: int, reason: str) -> _Scored:
        """No scores, for one reason."""
        return cls(torch.full((count,), float("nan")), torch.zeros(count, dtype=torch.bool), {reason: count})


class RemoteReward:
    """Item reward computed by a server; not differentiable; a token is read from GENCONTROL_REWARD_TOKEN."""

    title = "computed by a reward server"
    paper = ""
    medium = "any"
    kind: Literal["item", "set"] = "item"
    differentiable = False

    def __init__(
        self,
        url: str,
        timeout_s: float = 60.0,
        budget_s: float = 180.0,
        tries: int = 4,
        batch_size: int = 64,
        workers: int = 4,
        wait_s: float = 10.0,
        dtype: Literal["float32", "float16", "uint8"] = "float32",
    ) -> None:
        """Ask the server for its name, kind and version.

        Args:
            url: "http://host:port/name".
            timeout_s: seconds for one try, from connecting to the last byte.
            budget_s: seconds for one call of the reward, all tries and parts together.
            tries: of one request; pauses of 1, 2, 4 … seconds, with jitter, lie between them.
            batch_size: samples in one request (fewer where the server's size limit asks for it).
            workers: requests under way at once.
            wait_s: how long to wait now for a server that is still starting.
            dtype: of samples on the wire; "uint8" is for images in [0, 1] and rounds them to steps of 1/255.

        Raises:
            UsageError: a value out of range, a wrong URL or token, or a server of another protocol or of a set reward.
            RewardError: no server answers.
        """
        if min(timeout_s, budget_s) <= 0 or wait_s < 0 or min(tries, batch_size, workers) < 1:
            raise UsageError(
                "remote: timeout_s and budget_s are positive, wait_s is not negative, tries, batch_size and workers "
                "are at least 1."
            )
        if dtype not in _DTYPES:
            raise UsageError(f"remote: dtype is {', '.join(_DTYPES)}, not '{dtype}'.")
        host, port = check_url(url)
        self.url, self._breaker = url, Breaker()
        token = token_from_environment()
        self._headers = {"Accept": TENSORS, "Content-Type": TENSORS, "Accept-Encoding": "identity"}
        self._headers |= {} if token is None else {"Authorization": f"Bearer {token}"}
        # made once, for reading certificates takes longer than a request; they are the system's, not certifi's
        self._tls = ssl.create_default_context()
        self._timeout_s, self._budget_s, self._tries = timeout_s, budget_s, tries
        self._batch_size, self._workers, self._dtype = batch_size, workers, _DTYPES[dtype]
        #: why items were invalid, over the whole life of this reward
        self.reasons: Counter[str] = Counter()
        self.server = self._meet(time.monotonic() + wait_s)
        self.name = f"{self.server.reward}@{host}:{port}"

    def __call__(self, samples: Float[Tensor, "b *d"], context: RewardContext) -> RewardOut:
        """Score; items of requests that failed are invalid and counted in `extras["reasons"]`.

        Raises:
            UsageError: samples that are no float tensor, or metadata that JSON cannot hold.
        """
        if not isinstance(samples, Tensor) or not samples.is_floating_point() or samples.ndim < 2:
            given = f"{list(samples.shape)} {samples.dtype}" if isinstance(samples, Tensor) else type(samples).__name__
            raise UsageError(f"reward '{self.name}' takes a float tensor with the batch axis first, not {given}.")
        end = time.monotonic() + self._budget_s
        # rows of each request, within the server's limit of bytes; one request without rows for an empty batch
        item = max(1, samples[:1].numel() * self._dtype.itemsize)
        step = max(1, min(self._batch_size, int(self.server.max_bytes * 0.9) // item))
        rows = [range(i, min(i + step, len(samples))) for i in range(0, max(1, len(samples)), step)]
        parts = [(samples[r.start : r.stop], _facts_of(context.rows(r), self.name)) for r in rows]

        async def score_all(http: httpx.AsyncClient) -> list[_Scored]:
            places = asyncio.Semaphore(self._workers)
            return await asyncio.gather(*(self._score(http, places, *part, end) for part in parts))

        # 5 s more than the budget, for what no time limit of a request reaches, such as a name server that hangs
        done, error = self._run(score_all, self._budget_s + 5.0, context.poll)
        if done is None:
            done = [_Scored.nothing(len(part), error) for part, _ in parts]
        reasons: Counter[str] = Counter()
        for scored in done:
            reasons.update(scored.reasons)
        for reason, count in reasons.items():
            if reason not in self.reasons:
                _LOG.warning("reward '%s': %d samples not scored: %s", self.name, count, reason)
        self.reasons.update(reasons)
        values = torch.cat([scored.values for scored in done]).to(samples.device)
        valid = torch.cat([scored.valid for scored in done]).to(samples.device)
        out = checked(self.name, values, len(samples), valid)
        return RewardOut(out.values, out.valid, {"reasons": dict(reasons)} if reasons else {})

    def _run(
        self,
        work: Callable[[httpx.AsyncClient], Coroutine[Any, Any, Result]],
        seconds: float,
        poll: Callable[[], None] | None = None,
    ) -> tuple[Result | None, str]:
        """Result of `work` in an event loop of its own, or the reason why there is none.

        The loop has a thread of its own, for the caller's may have a loop already (notebooks do), and must poll.
        """

        async def opened() -> Result:
            async with httpx.AsyncClient(
                headers=self._headers, verify=self._tls, trust_env=False, follow_redirects=False, timeout=None
            ) as http:
                return await work(http)

        (outcome,) = bounded_map(lambda _: asyncio.run(opened()), [None], workers=1, timeout_s=seconds, poll=poll)
        return outcome.result, outcome.error

    async def _score(
        self, http: httpx.AsyncClient, places: asyncio.Semaphore, part: Tensor, facts: Mapping[str, Any], end: float
    ) -> _Scored:
        """Score the samples of one request, with a reason for each that is invalid."""
        async with places:
            part = part.detach().cpu()
            finite = torch.isfinite(part).flatten(1).all(1)
            if self._dtype == torch.uint8:
                whole = torch.where(finite.view(-1, *[1] * (part.ndim - 1)), part, 0.0)
                encoded = (whole.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
            else:
                encoded = part.to(self._dtype)
            try:
                scored = await self._with_tries(http, pack({"samples": encoded}, facts), len(part), end)
            except Refused as error:
                return _Scored.nothing(len(part), str(error))
        good = scored.valid & finite & torch.isfinite(scored.values)
        reasons = dict(scored.reasons)
        if (silent := int((~good).sum()) - sum(reasons.values())) > 0:
            reasons["NaN or infinity"] = reasons.get("NaN or infinity", 0) + silent
        return _Scored(scored.values, good, reasons)

    async def _with_tries(self, http: httpx.AsyncClient, body: bytes, count: int, end: float) -> _Scored:
        """Ask until an answer is good, the tries are used up, or the time is.

        Raises:
            Refused: the text is the reason.
        """
        self._breaker.enter()
        tries = AsyncRetrying(
            retry=retry_if_exception_type(Failed),
            stop=stop_after_attempt(self._tries) | stop_before_delay(max(0.0, end - time.monotonic())),
            wait=wait_exponential_jitter(_PAUSE_S, _LONGEST_PAUSE_S, jitter=_PAUSE_S / 2),
            reraise=True,
        )
        try:
            scored: _Scored = await tries(self._ask, http, body, count, end)
        except Failed as error:
            self._breaker.leave(str(error))
            raise Refused(str(error)) from error
        self._breaker.leave("")
        return scored

    async def _ask(self, http: httpx.AsyncClient, body: bytes, count: int, end: float) -> _Scored:
        """One request, its answer checked.

        Raises:
            Failed, Refused: the text is the reason.
        """
        if (left := end - time.monotonic()) <= 0:
            raise Failed(f"no time left of {self._budget_s:g} s")
        answer = await self._exchange(http, "POST", body, min(left, self._timeout_s), _ANSWER_BYTES + 64 * count)
        try:
            tensors, facts = unpack(answer)
        except WireError as error:
            raise Failed(f"answered garbage: {error}") from error
        if facts.get("identity") != self.server.identity:
            now = one_line(str(facts.get("reward")), 60)
            raise Refused(f"the server now serves another reward or version ({now}); start the run anew")
        values, valid = tensors.get("values"), tensors.get("valid")
        if values is None or valid is None or not values.is_floating_point() or valid.dtype != torch.bool:
            raise Failed("answered without values and valid")
        if values.shape != (count,) or valid.shape != (count,):
            raise Failed(f"answered {list(values.shape)} values for {count} samples")
        named = facts.get("reasons")
        counts = named.items() if isinstance(named, dict) else ()
        return _Scored(values.float(), valid, {one_line(str(k)): v for k, v in counts if type(v) is int and v > 0})

    async def _exchange(
        self, http: httpx.AsyncClient, method: str, body: bytes | None, seconds: float, limit: int
    ) -> bytes:
        """Send a request; return the body of the answer.

        Args:
            seconds: from connecting to the last byte.
            limit: bytes that the answer may have.

        Raises:
            Failed: no connection, no whole answer in time, or a status that may pass (5xx, 408, 429).
            Refused: another status.
        """
        data, response = bytearray(), None
        try:
            # httpx bounds each read alone; a server that drips would pass them all
            async with asyncio.timeout(seconds), http.stream(method, self.url, content=body) as response:
                async for chunk in response.aiter_raw():
                    data += chunk
                    if len(data) > limit:
                        raise Failed(f"answered more than {limit} bytes")
        except TimeoutError as error:
            raise Failed(f"no {'whole ' if response else ''}answer within {seconds:.3g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            if response is not None:
                raise Failed("broke off in the middle of its answer") from error
            raise Failed(one_line(f"no connection: {type(error).__name__}: {error}", 160)) from error
        if response.status_code == 200:
            return bytes(data)
        try:
            said = f": {one_line(json.loads(data)['error'], 200)}"
        except (ValueError, KeyError, TypeError):
            said = ""
        if response.status_code >= 500 or response.status_code in (408, 429):
            raise Failed(f"HTTP {response.status_code}{said}")
        hint = f" (is {TOKEN_VARIABLE} the server's?)" if response.status_code in (401, 403) else ""
        raise Refused(f"HTTP {response.status_code}{said}{hint}")

    def _meet(self, end: float) -> ServerFacts:
        """Ask the server what it is; waits for one that is starting.

        Raises:
            UsageError: it refuses, or is no server of an item reward.
            RewardError: nothing answers.
        """

        async def ask(http: httpx.AsyncClient) -> bytes | str | Refused:
            while True:
                seconds = min(self._timeout_s, max(1.0, end - time.monotonic()))
                try:
                    return await self._exchange(http, "GET", None, seconds, _ANSWER_BYTES)
                except Refused as error:
                    return error
                except Failed as error:
                    if time.monotonic() + 0.5 > end:
                        return str(error)
                await asyncio.sleep(0.5)

        answer, error = self._run(ask, max(1.0, end - time.monotonic()) + 5.0)
        if isinstance(answer, Refused):
            raise UsageError(f"the reward server at {self.url} refuses: {answer}.") from answer
        if not isinstance(answer, bytes):
            raise RewardError(
                f"the reward server at {self.url} does not answer ({answer or error}); start it with `gencontrol "
                "serve-reward`, or mend the address."
            )
        return _read_facts(answer, self.url)


def _facts_of(context: RewardContext, name: str) -> dict[str, Any]:
    """The facts of a request.

    Raises:
        UsageError: prompts or metadata that JSON cannot hold.
    """
    facts = {
        "protocol": PROTOCOL,
        "prompts": None if context.prompts is None else list(context.prompts),
        "sampling_rate": context.sampling_rate,
        "metadata": {key: list(value) for key, value in context.metadata.items()},
    }
    try:
        json.dumps(facts, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"reward '{name}': prompts and metadata must be plain JSON values ({error}).") from error
    return facts


def _read_facts(answer: bytes, url: str) -> ServerFacts:
    """Read what a server says about itself.

    Raises:
        UsageError: no reward server, another protocol, or a set reward.
    """
    try:
        facts = json.loads(answer)
        protocol = facts["protocol"]
        reward, kind, version, identity = (
            one_line(str(facts[k]), 80) for k in ("reward", "kind", "version", "identity")
        )
        found = ServerFacts(reward, kind, version, identity, max(1, int(facts["max_bytes"])))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"what answers at {url} is no reward server; give http://host:port/name.") from error
    if protocol != PROTOCOL:
        raise UsageError(
            f"the server at {url} speaks protocol {protocol}, this client {PROTOCOL}; install the same gencontrol on "
            "both sides."
        )
    if found.kind != "item":
        raise UsageError(
            f"the server at {url} serves the set reward '{found.reward}'; only rewards of single samples are computed "
            "remotely: load it in this process."
        )
    return found
