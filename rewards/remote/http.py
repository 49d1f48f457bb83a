"""One HTTP exchange of the reward client, bounded in time and size, and the circuit breaker around many of them.

Redirects are not followed and proxies of the environment are not used, so a token goes to the named host only.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import quote, unquote, urlsplit

from gencontrol.errors import UsageError
from gencontrol.rewards.remote.wire import TENSORS, TOKEN_VARIABLE, deadline, one_line, token_from_environment

_OPEN_AFTER, _OPEN_S = 5, 15.0  # failures in a row; seconds until a trial (reliability.md §4: breaker after 5)


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


def check_url(url: str) -> tuple[str, str, int, str]:
    """Scheme, host, port and path of a reward server's address.

    Raises:
        UsageError: not http(s)://host[:port][/name], or a password in it.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"'{url}' is no address of a reward server ({error}); give http://host:port/name.") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UsageError(f"'{url}' is no address of a reward server; give http://host:port/name.")
    if parts.username is not None or parts.password is not None:
        raise UsageError(f"a token does not belong into the address; set the environment variable {TOKEN_VARIABLE}.")
    path = quote(unquote(parts.path or "/"))
    return parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80), path


class Endpoint:
    """The address of a reward server, with the token of the environment."""

    def __init__(self, url: str) -> None:
        """Take the address apart.

        Raises:
            UsageError: a wrong address or token.
        """
        self.scheme, self.host, self.port, self.path = check_url(url)
        self._token = token_from_environment()

    def exchange(self, method: str, body: bytes | None, seconds: float, limit: int) -> bytes:
        """Send a request; return the body of the answer.

        Args:
            seconds: from connecting to the last byte.
            limit: bytes that the answer may have.

        Raises:
            Failed: no connection, no whole answer in time, or a status that may pass (5xx, 408, 429).
            Refused: another status.
        """
        kind = http.client.HTTPSConnection if self.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=seconds)
        end = time.monotonic() + seconds
        try:
            connection.connect()
            with deadline(connection.sock, end - time.monotonic()):
                connection.request(method, self.path, body, self._headers())
                response = connection.getresponse()
                data = response.read(limit + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= end - 0.01:
                raise Failed(f"no answer within {seconds:.3g} s") from error
            raise Failed(one_line(f"no connection: {type(error).__name__}: {error}", 160)) from error
        finally:
            connection.close()
        if response.length and time.monotonic() >= end - 0.01:
            raise Failed(f"no whole answer within {seconds:.3g} s")
        if len(data) > limit:
            raise Failed(f"answered more than {limit} bytes")
        if response.length:
            raise Failed("broke off in the middle of its answer")
        if response.status != 200:
            _refuse(response.status, data)
        return data

    def _headers(self) -> dict[str, str]:
        headers = {"Accept": TENSORS, "Content-Type": TENSORS, "Connection": "close"}
        return headers if self._token is None else {**headers, "Authorization": f"Bearer {self._token}"}


def _refuse(status: int, data: bytes) -> None:
    """Raise what a status other than 200 means."""
    try:
        said = f": {one_line(json.loads(data)['error'], 200)}"
    except (ValueError, KeyError, TypeError):
        said = ""
    if status >= 500 or status in (408, 429):
        raise Failed(f"HTTP {status}{said}")
    hint = f" (is {TOKEN_VARIABLE} the server's?)" if status in (401, 403) else ""
    raise Refused(f"HTTP {status}{said}{hint}")
