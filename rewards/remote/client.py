"""A reward on another machine: the client of `gencontrol serve-reward`, or of any server that speaks `wire`'s protocol.

Every call ends within `budget_s`, whatever the server does: each try has its own time limit over connecting, sending
and reading together; connection errors, 5xx and garbage are tried again with growing pauses; after five failed
requests in a row the circuit opens and requests fail at once until a trial succeeds.  What could not be scored is
invalid (never 0) and `extras["reasons"]` counts why.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gencontrol.errors import RewardError, UsageError
from gencontrol.rewards.base import checked
from gencontrol.rewards.pool import bounded_map
from gencontrol.rewards.remote.http import Breaker, Endpoint, Failed, Refused
from gencontrol.rewards.remote.wire import PROTOCOL, WireError, one_line, pack, unpack
from gencontrol.types import RewardContext, RewardOut

_LOG = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "uint8": torch.uint8}
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 10.0
_ANSWER_BYTES = 2**20  # and 64 for each item


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


class RemoteReward:
    """Item reward computed by a server; not differentiable; a token is read from GENCONTROL_REWARD_TOKEN."""

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
        self.url, self._endpoint, self._breaker = url, Endpoint(url), Breaker()
        self._timeout_s, self._budget_s, self._tries = timeout_s, budget_s, tries
        self._batch_size, self._workers, self._dtype = batch_size, workers, _DTYPES[dtype]
        #: why items were invalid, over the whole life of this reward
        self.reasons: Counter[str] = Counter()
        self.server = self._meet(time.monotonic() + wait_s)
        self.name = f"{self.server.reward}@{self._endpoint.host}:{self._endpoint.port}"

    def __call__(self, samples: Float[Tensor, "b *d"], context: RewardContext) -> RewardOut:
        """Score; items of requests that failed are invalid and counted in `extras["reasons"]`.

        Raises:
            UsageError: samples that are no float tensor, or metadata that JSON cannot hold.
        """
        if not isinstance(samples, Tensor) or not samples.is_floating_point() or samples.ndim < 2:
            given = f"{list(samples.shape)} {samples.dtype}" if isinstance(samples, Tensor) else type(samples).__name__
            raise UsageError(f"reward '{self.name}' takes a float tensor with the batch axis first, not {given}.")
        end = time.monotonic() + self._budget_s
        parts = [(samples[r.start : r.stop], _facts_of(context.rows(r), self.name)) for r in self._rows(samples)]
        outcomes = bounded_map(
            lambda part: self._score(*part, end),
            parts,
            workers=self._workers,
            timeout_s=self._budget_s + 5.0,  # for what no socket limit reaches, such as a name server that hangs
            poll=context.poll,
        )
        done = [o.result or _nothing(len(part), o.error) for o, (part, _) in zip(outcomes, parts, strict=True)]
        reasons: Counter[str] = Counter()
        for scored in done:
            reasons.update(scored.reasons)
        self._note(reasons)
        values = torch.cat([scored.values for scored in done]).to(samples.device)
        valid = torch.cat([scored.valid for scored in done]).to(samples.device)
        out = checked(self.name, values, len(samples), valid)
        return RewardOut(out.values, out.valid, {"reasons": dict(reasons)} if reasons else {})

    def _rows(self, samples: Tensor) -> list[range]:
        """Rows of each request; one request without rows for an empty batch."""
        item = max(1, samples[:1].numel() * self._dtype.itemsize)
        step = max(1, min(self._batch_size, int(self.server.max_bytes * 0.9) // item))
        return [range(i, min(i + step, len(samples))) for i in range(0, max(1, len(samples)), step)]

    def _note(self, reasons: Mapping[str, int]) -> None:
        """Count reasons, and log each the first time it comes."""
        for reason, count in reasons.items():
            if reason not in self.reasons:
                _LOG.warning("reward '%s': %d samples not scored: %s", self.name, count, reason)
        self.reasons.update(reasons)

    def _score(self, part: Tensor, facts: Mapping[str, Any], end: float) -> _Scored:
        """Score the samples of one request, with a reason for each that is invalid."""
        part = part.detach().cpu()
        finite = torch.isfinite(part).flatten(1).all(1)
        try:
            scored = self._with_tries(pack({"samples": self._encoded(part, finite)}, facts), len(part), end)
        except Refused as error:
            return _nothing(len(part), str(error))
        good = scored.valid & finite & torch.isfinite(scored.values)
        reasons = dict(scored.reasons)
        if (silent := int((~good).sum()) - sum(reasons.values())) > 0:
            reasons["NaN or infinity"] = reasons.get("NaN or infinity", 0) + silent
        return _Scored(scored.values, good, reasons)

    def _encoded(self, part: Tensor, finite: Bool[Tensor, " b"]) -> Tensor:
        """Samples in the dtype of the wire."""
        if self._dtype != torch.uint8:
            return part.to(self._dtype)
        whole = torch.where(finite.view(-1, *[1] * (part.ndim - 1)), part, 0.0)
        return (whole.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)

    def _with_tries(self, body: bytes, count: int, end: float) -> _Scored:
        """Ask until an answer is good, the tries are used up, or the time is.

        Raises:
            Refused: the text is the reason.
        """
        self._breaker.enter()
        reason = f"no time left of {self._budget_s:g} s"
        jitter = random.Random()  # of pauses only: nothing that is computed depends on it
        for attempt in range(self._tries):
            if (left := end - time.monotonic()) <= 0:
                break
            try:
                scored = self._ask(body, count, min(left, self._timeout_s))
                self._breaker.leave("")
                return scored
            except Failed as error:
                reason = str(error)
            pause = min(_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S) * (0.75 + 0.5 * jitter.random())
            if attempt + 1 == self._tries or time.monotonic() + pause >= end:
                break
            time.sleep(pause)
        self._breaker.leave(reason)
        raise Refused(reason)

    def _ask(self, body: bytes, count: int, seconds: float) -> _Scored:
        """One request, its answer checked.

        Raises:
            Failed, Refused: the text is the reason.
        """
        answer = self._endpoint.exchange("POST", body, seconds, _ANSWER_BYTES + 64 * count)
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

    def _meet(self, end: float) -> ServerFacts:
        """Ask the server what it is; waits for one that is starting.

        Raises:
            UsageError: it refuses, or is no server of an item reward.
            RewardError: nothing answers.
        """
        while True:
            seconds = min(self._timeout_s, max(1.0, end - time.monotonic()))
            try:
                return _read_facts(self._endpoint.exchange("GET", None, seconds, _ANSWER_BYTES), self.url)
            except Refused as error:
                raise UsageError(f"the reward server at {self.url} refuses: {error}.") from error
            except Failed as error:
                if time.monotonic() + 0.5 > end:
                    raise RewardError(
                        f"the reward server at {self.url} does not answer ({error}); start it with `gencontrol "
                        "serve-reward`, or mend the address."
                    ) from error
                time.sleep(0.5)


def _nothing(count: int, reason: str) -> _Scored:
    """No scores, for one reason."""
    return _Scored(torch.full((count,), float("nan")), torch.zeros(count, dtype=torch.bool), {reason: count})


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
