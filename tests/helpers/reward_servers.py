"""Servers for the tests of remote rewards: our own in a thread, and one that misbehaves as it is told."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gencontrol.rewards.loading import UserItemReward
from gencontrol.rewards.remote.server import Limits, RewardServer
from gencontrol.rewards.remote.wire import pack
from gencontrol.types import RewardContext

FACTS = {"protocol": 1, "reward": "fake", "kind": "item", "version": "9", "identity": "abc", "max_bytes": 2**20}


def mean_reward(samples: torch.Tensor, context: RewardContext) -> torch.Tensor:
    """Mean of each sample, plus the length of its prompt where there is one."""
    lengths = [len(text) for text in context.prompts] if context.prompts else [0] * len(samples)
    return samples.flatten(1).mean(1) + torch.tensor(lengths, dtype=torch.float32)


MEAN = UserItemReward("mean", mean_reward)


@contextmanager
def served(reward: Any = MEAN, name: str = "mean", *, port: int = 0, **options: Any) -> Iterator[RewardServer]:
    """Our server in a thread."""
    limits = Limits(**options.pop("limits", {}))
    server = RewardServer(reward, name, ("127.0.0.1", port), limits=limits, **options)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(10)


def good_answer(count: int, **changes: Any) -> bytes:
    """Message of zeros as our server would send it."""
    facts = {"protocol": 1, "reward": "fake", "identity": "abc", "reasons": {}, **changes}
    return pack({"values": torch.zeros(count), "valid": torch.ones(count, dtype=torch.bool)}, facts)


def http(body: bytes, status: str = "200 OK", length: int | None = None) -> bytes:
    """An HTTP answer."""
    size = len(body) if length is None else length
    return f"HTTP/1.0 {status}\r\nContent-Length: {size}\r\n\r\n".encode() + body


class FakeServer:
    """Answers GET with FACTS (or `facts`) and every POST as `behave(connection, number)` says."""

    def __init__(self, behave: Callable[[socket.socket, int], None], facts: Any = FACTS) -> None:
        self.posts = 0
        self._behave, self.facts = behave, facts
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/fake"
        threading.Thread(target=self._loop, daemon=True).start()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _loop(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                data = b""
                while b"\r\n\r\n" not in data:
                    data += connection.recv(65536)
                head, _, body = data.partition(b"\r\n\r\n")
                if head.startswith(b"GET"):
                    raw = self.facts if isinstance(self.facts, bytes) else http(json.dumps(self.facts).encode())
                    connection.sendall(raw)
                    return
                length = next(
                    int(x.split(b":")[1]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length")
                )
                while len(body) < length:
                    body += connection.recv(65536)
                self.posts += 1
                self._behave(connection, self.posts)
            except OSError:
                return
