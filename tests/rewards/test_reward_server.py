"""Our reward server against hostile and hasty clients: refused with a status, alive afterwards, bounded."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import save

from gencontrol.errors import UsageError
from gencontrol.rewards import load_reward
from gencontrol.rewards.loading import UserItemReward
from gencontrol.rewards.remote.server import Limits, RewardServer
from gencontrol.rewards.remote.wire import WireError, one_line, pack, unpack
from gencontrol.types import RewardContext
from tests.helpers.reward_servers import mean_reward, served

NONE = RewardContext()
GOOD = {"protocol": 1, "prompts": None, "sampling_rate": None, "metadata": {}}


@pytest.fixture(scope="module")
def server() -> Iterator[RewardServer]:
    with served(token="key", limits={"max_bytes": 10_000, "read_s": 0.5}) as running:
        yield running
        assert ask(running, pack({"samples": torch.ones(2, 3)}, GOOD))[0] == 200  # alive after all that


def ask(
    server: RewardServer, body: bytes | None, path: str = "/mean", token: str | None = "key", **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*server.address, timeout=10)
    own = {} if token is None else {"Authorization": f"Bearer {token}"}
    connection.request("GET" if body is None else "POST", path, body, {**own, **headers})
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_health_needs_no_token_the_rest_does(server: RewardServer) -> None:
    assert ask(server, None, "/health", None) == (200, b'{"status": "ok"}\n')
    for token in (None, "", "kez", "key x", "ke", "ключ".encode().decode("latin-1")):
        assert ask(server, None, "/mean", token)[0] == 401
        assert ask(server, pack({"samples": torch.ones(2, 3)}, GOOD), "/mean", token)[0] == 401
    assert json.loads(ask(server, None)[1])["reward"] == "mean"


@pytest.mark.parametrize("path", ["/other", "/../mean", "/mean/../../etc/passwd", "/%2e%2e/x", "/MEAN", "/mean?x=1"])
def test_other_names(server: RewardServer, path: str) -> None:
    status, text = ask(server, None, path)
    assert status == 404 and "this server has 'mean'" in json.loads(text)["error"]


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


BODIES = [
    (b"", "not a safetensors message"),
    (b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os", "header says"),
    (header(b"not json"), "not a safetensors message"),
    (header(b"{}"), "not a safetensors message"),
    (header(b"[" * 5000), "not a safetensors message"),
    (struct.pack("<Q", 2**60) + b"{}", "header says"),
    (save({"samples": torch.ones(2, 3)}), "not a safetensors message"),
    (save({"samples": torch.ones(2, 3)}, {"json": "[1]"}), "protocol 1"),
    (save({"samples": torch.ones(2, 3)}, {"json": '{"protocol": 2}'}), "protocol 1"),
    (pack({"samples": torch.ones(2, 3)}, GOOD)[:-1], "not a safetensors message"),
    (pack({"samples": torch.ones(2, 3)}, GOOD) + b"x", "not a safetensors message"),
    (pack({"other": torch.ones(2, 3)}, GOOD), "one tensor 'samples'"),
    (pack({"samples": torch.ones(2)}, GOOD), "one tensor 'samples'"),
    (pack({"samples": torch.ones(2, 3), "more": torch.ones(1)}, GOOD), "one tensor 'samples'"),
    (pack({"samples": torch.ones(2, 3, dtype=torch.int64)}, GOOD), "floating point"),
    (pack({"samples": torch.ones(2, 0)}, GOOD), "empty"),
    (pack({"samples": torch.ones(2, 3)}, GOOD | {"prompts": ["a"]}), "list of 2 texts"),
    (pack({"samples": torch.ones(2, 3)}, GOOD | {"prompts": [1, 2]}), "list of 2 texts"),
    (pack({"samples": torch.ones(2, 3)}, GOOD | {"prompts": "ab"}), "list of 2 texts"),
    (pack({"samples": torch.ones(2, 3)}, GOOD | {"sampling_rate": -1}), "positive whole number"),
    (pack({"samples": torch.ones(2, 3)}, GOOD | {"sampling_rate": True}), "positive whole number"),
    (pack({"samples": torch.ones(2, 3)}, GOOD | {"metadata": {"a": [1]}}), "lists of 2 values"),
    (pack({"samples": torch.ones(2, 3)}, GOOD | {"metadata": [1]}), "lists of 2 values"),
]


@pytest.mark.parametrize(("body", "text"), BODIES)
def test_wrong_bodies(server: RewardServer, body: bytes, text: str) -> None:
    status, answer = ask(server, body)
    assert status == 400 and text in json.loads(answer)["error"]


def test_sizes_and_encodings(server: RewardServer) -> None:
    assert ask(server, b"x" * 20_000)[0] == 413
    assert ask(server, b"x", **{"Content-Length": "99999999999999999999"})[0] == 411
    status, answer = ask(server, b"x", **{"Content-Length": "-5"})
    assert status == 400 and "error" in json.loads(answer)
    assert ask(server, b"x", **{"Content-Encoding": "gzip"})[0] == 415
    connection = http.client.HTTPConnection(*server.address, timeout=10)
    connection.request("DELETE", "/mean")
    answer = connection.getresponse()
    assert answer.status == 501 and "error" in json.loads(answer.read())


@pytest.mark.parametrize(
    "start",
    [b"", b"POST /mean HTT", b"POST /mean HTTP/1.0\r\nAuthorization: Bearer key\r\nContent-Length: 500\r\n\r\nabc"],
)
def test_slow_clients_are_cut(server: RewardServer, start: bytes) -> None:
    """A byte now and then does not keep a connection beyond `read_s`."""
    with socket.create_connection(server.address, timeout=5) as connection:
        connection.sendall(start)
        began = time.monotonic()
        with pytest.raises((OSError, AssertionError)):
            while time.monotonic() - began < 4:
                connection.sendall(b"a")
                connection.settimeout(0.1)
                try:
                    assert connection.recv(1000) != b"", "closed"
                except TimeoutError:
                    continue
        assert time.monotonic() - began < 3


def test_too_many_connections_and_requests() -> None:
    gate = threading.Event()

    def wait(x: torch.Tensor, context: RewardContext) -> torch.Tensor:
        gate.wait(10)
        return mean_reward(x, context)

    body = pack({"samples": torch.ones(1, 3)}, GOOD)
    codes: list[int] = []
    with served(UserItemReward("wait", wait), limits={"connections": 4, "waiting": 1, "score_s": 20}) as server:
        threads = [threading.Thread(target=lambda: codes.append(ask(server, body, token=None)[0])) for _ in range(4)]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        refused = sorted(codes)  # one is scored, one waits, the others found the queue full
        gate.set()
        for thread in threads:
            thread.join(10)
        assert refused == [503, 503] and sorted(codes) == [200, 200, 503, 503]
        with socket.create_connection(server.address), socket.create_connection(server.address):
            with (
                socket.create_connection(server.address),
                socket.create_connection(server.address),
            ):
                time.sleep(0.2)
                assert ask(server, None, "/health")[0] == 503
        time.sleep(0.2)
        assert ask(server, None, "/health")[0] == 200


def test_a_reward_that_hangs_is_given_up() -> None:
    def wait(x: torch.Tensor, context: RewardContext) -> torch.Tensor:
        time.sleep(1.0)
        return mean_reward(x, context)

    with served(UserItemReward("wait", wait), limits={"score_s": 0.2}) as server:
        status, text = ask(server, pack({"samples": torch.ones(1, 3)}, GOOD))
        assert status == 503 and "not scored within 0.2 s" in json.loads(text)["error"]


def test_merging_waiting_requests() -> None:
    """While one call runs, those that wait are scored together; values go to whom they belong, odd shapes alone."""
    sizes: list[int] = []
    gate = threading.Event()

    def slow(x: torch.Tensor, context: RewardContext) -> torch.Tensor:
        sizes.append(len(x))
        gate.wait(20)  # the first call lasts until all others wait
        return mean_reward(x, context)

    inputs = [torch.rand(2, 3), *(torch.rand(2, 3) for _ in range(4)), torch.rand(2, 5)]
    results: dict[int, torch.Tensor] = {}
    with served(UserItemReward("slow", slow), limits={"merge": 6}) as server:
        reward = load_reward(server.url)

        def score(index: int) -> None:
            context = RewardContext([f"{'p' * index}", "q"], 8000, {"i": [index, index]})
            results[index] = reward(inputs[index], context).values - mean_reward(inputs[index], context)

        threads = [threading.Thread(target=score, args=(index,)) for index in range(6)]
        for index, thread in enumerate(threads):
            thread.start()
            for _ in range(1000):
                if sizes and server.queue.waiting() >= index:
                    break
                time.sleep(0.01)
        gate.set()
        for thread in threads:
            thread.join(20)
    assert sizes == [2, 6, 2, 2] and all(torch.equal(results[i], torch.zeros(2)) for i in range(6))


def test_a_bad_request_does_not_fail_its_neighbours() -> None:
    def picky(x: torch.Tensor, context: RewardContext) -> torch.Tensor:
        time.sleep(0.2)
        if bool((x > 5).any()):
            raise UsageError("too bright")
        return mean_reward(x, context)

    codes: dict[int, int] = {}
    with served(UserItemReward("picky", picky), limits={"merge": 100}) as server:

        def post(index: int) -> None:
            scale = 9.0 if index == 2 else 1.0
            codes[index] = ask(server, pack({"samples": torch.ones(1, 3) * scale}, GOOD))[0]

        threads = [threading.Thread(target=post, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
            time.sleep(0.03)
        for thread in threads:
            thread.join(10)
    assert codes == {0: 200, 1: 200, 2: 422, 3: 200}


def test_wire() -> None:
    tensors = {"a": torch.arange(6).view(2, 3), "b": torch.rand(4).half()}
    back, facts = unpack(pack(tensors, {"protocol": 1, "text": "ä\n"}))
    assert facts == {"protocol": 1, "text": "ä\n"} and all(torch.equal(back[k], v) for k, v in tensors.items())
    with pytest.raises(WireError, match="plain JSON"):
        pack({}, {"x": float("nan")})
    assert one_line("a\x1b[0m\nb\tc" + "x" * 9999) == ("a [0m b c" + "x" * 300)[:300]


def test_wrong_settings() -> None:
    for options in ({"max_bytes": 0}, {"merge": -1}, {"read_s": 0}):
        with pytest.raises(UsageError):
            Limits(**options)
    with served() as running, pytest.raises(UsageError, match="cannot listen at 127.0.0.1 port"):
        with served(port=running.address[1]):
            pass
