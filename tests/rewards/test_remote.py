"""Remote rewards: equal to local ones when all is well, invalid with a reason and in bounded time when it is not."""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
from collections.abc import Callable

import pytest
import torch

from gencontrol.errors import Preempted, RewardError, UsageError
from gencontrol.rewards import ItemAsSet, Reward, load_reward, load_rewards
from gencontrol.rewards.loading import UserItemReward
from gencontrol.rewards.remote import client
from gencontrol.rewards.remote.client import RemoteReward
from gencontrol.rewards.remote.wire import TOKEN_VARIABLE, pack
from gencontrol.types import RewardContext, RewardOut
from tests.helpers.reward_servers import FACTS, MEAN, FakeServer, good_answer, http, mean_reward, served

NONE = RewardContext()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses between tries, a short open circuit, no token."""
    monkeypatch.setattr(client, "_PAUSE_S", 0.01)
    monkeypatch.setattr(client, "_OPEN_S", 0.3)
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


def samples(count: int = 7, *shape: int) -> torch.Tensor:
    return torch.rand(count, *(shape or (3, 4, 4)), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("shape", "rate"), [((3, 4, 4), None), ((100,), 16_000), ((2, 50), 44_100)])
def test_equal_to_the_local_reward(shape: tuple[int, ...], rate: int | None) -> None:
    """Images and sound, in parts, in order; prompts and metadata arrive with their samples."""
    seen: list[RewardContext] = []

    def spy(x: torch.Tensor, context: RewardContext) -> torch.Tensor:
        seen.append(context)
        return mean_reward(x, context)

    x = samples(7, *shape)
    context = RewardContext(["a" * i for i in range(7)], rate, {"label": list(range(7))})
    with served(UserItemReward("spy", spy), "mean") as server:
        reward = load_reward(server.url, batch_size=3)
        assert isinstance(reward, Reward) and reward.kind == "item" and not reward.differentiable
        assert reward.name == f"mean@127.0.0.1:{server.address[1]}"
        out = reward(x, context)
    assert torch.equal(out.values, mean_reward(x, context)) and bool(out.valid.all()) and not out.extras
    assert sorted(c.metadata["label"] for c in seen) == [[0, 1, 2], [3, 4, 5], [6]]
    assert all(c.prompts == ["a" * i for i in c.metadata["label"]] and c.sampling_rate == rate for c in seen)


def test_names_weights_and_sums() -> None:
    with served() as server:
        x = samples()
        local = mean_reward(x, NONE)
        base = server.url.rpartition("/")[0]
        for url in (base, base + "/", server.url):
            assert torch.equal(load_reward(url)(x, NONE).values, local)
        torch.testing.assert_close(load_reward(f"{server.url}:0.5")(x, NONE).values, 0.5 * local)
        both = load_rewards([f"{server.url}:2", server.url], device="cpu")
        torch.testing.assert_close(both(x, NONE).values, 3 * local)
        assert load_reward("remote", url=server.url)(samples(0), NONE).values.shape == (0,)


def test_precision_on_the_wire_and_small_requests() -> None:
    with served(limits={"max_bytes": 2000}) as server:
        x = samples(20)
        exact = load_reward(server.url)
        assert torch.equal(exact(x, NONE).values, mean_reward(x, NONE))  # 192 bytes an image: parts of 9
        rough = load_reward(server.url, dtype="uint8")(x, NONE).values
        assert 0 < float((rough - mean_reward(x, NONE)).abs().max()) < 0.5 / 255
        half = load_reward(server.url, dtype="float16")(x, NONE).values
        torch.testing.assert_close(half, mean_reward(x, NONE), atol=1e-3, rtol=0)


def test_invalid_samples_and_reasons_from_the_server() -> None:
    def picky(x: torch.Tensor, context: RewardContext) -> RewardOut:
        values = mean_reward(x, context)
        return RewardOut(values, torch.arange(len(x)) != 0, {"reasons": {"too dark": 1}})

    with served(UserItemReward("picky", picky)) as server:
        x = samples(5)
        x[2] = float("nan")
        for dtype in ("float32", "uint8"):
            out = load_reward(server.url, dtype=dtype)(x, NONE)
            assert out.valid.tolist() == [False, True, False, True, True] and bool(out.values[[0, 2]].isnan().all())
            assert out.extras["reasons"] == {"too dark": 1, "NaN or infinity": 1}


def drip(connection: socket.socket, number: int) -> None:
    """One byte of the header every 50 ms: each read succeeds, the whole never ends."""
    for byte in b"HTTP/1.0 200 OK\r\nX: " + b"y" * 200:
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


def drip_body(connection: socket.socket, number: int) -> None:
    """A good header, then a body that never comes to its end."""
    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 500\r\n\r\n")
    for _ in range(200):
        connection.sendall(b"z")
        time.sleep(0.05)


def send(answer: bytes) -> Callable[[socket.socket, int], None]:
    return lambda connection, number: connection.sendall(answer)


REDIRECT = b"HTTP/1.0 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
FAULTS = [
    (lambda c, n: time.sleep(2), "no answer within", 2),
    (drip, "no answer within", 2),
    (drip_body, "no whole answer within", 2),
    (lambda c, n: c.close(), "no connection", 2),
    (send(http(b"<html>oops</html>")), "answered garbage", 2),
    (send(http(b"\x80\x04\x95pickle")), "answered garbage", 2),
    (send(b"rubbish\r\n\r\n"), "no connection", 2),
    (send(http(good_answer(3))), r"answered \[3\] values for 4 samples", 2),
    (send(http(good_answer(4), length=5000)), "broke off", 2),
    (send(http(b"x" * (2**20 + 300))), "answered more than", 2),
    (send(http(b'{"error": "cuda died\\n\\u001b[31m"}', "500 X")), r"HTTP 500: cuda died \[31m", 2),
    (send(http(b"", "503 Busy")), "HTTP 503", 2),
    (send(http(b'{"error": "no"}', "400 Bad")), "HTTP 400: no", 1),
    (send(http(b"", "401 No")), TOKEN_VARIABLE, 1),
    (send(REDIRECT), "HTTP 302", 1),
    (send(http(good_answer(4, identity="other"))), "now serves another reward", 1),
    (send(http(good_answer(4, protocol=2))), "protocol 1", 2),
]


@pytest.mark.parametrize(("behave", "reason", "posts"), FAULTS)
def test_faults_are_invalid_with_a_reason(
    behave: Callable[[socket.socket, int], None], reason: str, posts: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Never a 0, never an exception, never a hang; 4xx is not tried again, the rest is."""
    with FakeServer(behave) as server, caplog.at_level(logging.WARNING):
        reward = RemoteReward(server.url, timeout_s=0.4, tries=2)
        began = time.monotonic()
        out = reward(samples(4), NONE)
        took = time.monotonic() - began
    assert took < 3 and not bool(out.valid.any()) and bool(out.values.isnan().all())
    ((named, count),) = out.extras["reasons"].items()
    assert count == 4 and re.search(reason, named) and "\n" not in named and "\x1b" not in named
    assert server.posts == posts
    assert "4 samples not scored" in caplog.text and reward.reasons == {named: 4}


def test_wrong_numbers_are_invalid_one_by_one() -> None:
    values = torch.tensor([1.0, float("nan"), float("inf"), 2.0])
    body = pack(
        {"values": values, "valid": torch.tensor([True, True, True, False])}, {"protocol": 1, "identity": "abc"}
    )
    with FakeServer(send(http(body))) as server:
        out = RemoteReward(server.url, tries=1)(samples(4), NONE)
    assert out.valid.tolist() == [True, False, False, False] and float(out.values[0]) == 1.0
    assert out.extras["reasons"] == {"NaN or infinity": 3}


def test_a_second_try_can_succeed() -> None:
    def behave(connection: socket.socket, number: int) -> None:
        connection.sendall(http(good_answer(4)) if number > 2 else http(b"", "503 Busy"))

    with FakeServer(behave) as server:
        out = RemoteReward(server.url, tries=3)(samples(4), NONE)
        assert bool(out.valid.all()) and server.posts == 3


def test_one_part_fails_the_others_stay() -> None:
    """Three requests of two; the reward refuses the one with a dark picture."""

    def picky(x: torch.Tensor, context: RewardContext) -> torch.Tensor:
        if bool((x.flatten(1).mean(1) < 0.01).any()):
            raise ValueError("too dark")
        return mean_reward(x, context)

    x = samples(6)
    x[3] = 0
    with served(UserItemReward("picky", picky)) as server:
        out = load_reward(server.url, batch_size=2, tries=1)(x, NONE)
    assert out.valid.tolist() == [True, True, False, False, True, True]
    assert torch.equal(out.values[out.valid], mean_reward(x, NONE)[out.valid])
    ((reason, count),) = out.extras["reasons"].items()
    assert count == 2 and "HTTP 500" in reason and "too dark" in reason


def test_budget_bounds_the_whole_call() -> None:
    """Eight slow requests through two workers would take 4 × 0.3 × 3 tries; the budget ends them."""
    with FakeServer(lambda c, n: time.sleep(5)) as server:
        reward = RemoteReward(server.url, timeout_s=0.3, budget_s=0.5, tries=3, batch_size=1, workers=2)
        began = time.monotonic()
        out = reward(samples(8), NONE)
        assert time.monotonic() - began < 1.5 and not bool(out.valid.any())
        assert sum(out.extras["reasons"].values()) == 8


def test_breaker_opens_and_closes() -> None:
    """After five failures nothing is sent until the time is up; one success closes the circuit."""
    healthy = False

    def behave(connection: socket.socket, number: int) -> None:
        connection.sendall(http(good_answer(1)) if healthy else http(b"", "500 X"))

    with FakeServer(behave) as server:
        reward = RemoteReward(server.url, tries=1)
        for _ in range(5):
            reward(samples(1), NONE)
        out = reward(samples(1), NONE)
        assert server.posts == 5 and list(out.extras["reasons"]) == ["not asked after 5 failures in a row: HTTP 500"]
        time.sleep(0.35)
        reward(samples(1), NONE)  # the trial fails and opens it again
        reward(samples(1), NONE)
        assert server.posts == 6
        healthy = True
        time.sleep(0.35)
        assert bool(reward(samples(1), NONE).valid.all()) and bool(reward(samples(1), NONE).valid.all())
        assert server.posts == 8


def test_server_dies_and_comes_back() -> None:
    """In the middle of a run; afterwards the values are the same as ever."""
    x = samples(4)
    with served() as server:
        port, url = server.address[1], server.url
        reward = load_reward(url, tries=2)
        before = reward(x, NONE)
    down = reward(x, NONE)
    assert not bool(down.valid.any()) and "no connection" in next(iter(down.extras["reasons"]))
    with served(port=port):
        after = reward(x, NONE)
    assert torch.equal(after.values, before.values) and bool(after.valid.all())
    with served(port=port, made_from={"model": "another"}):
        changed = reward(x, NONE)
    assert not bool(changed.valid.any()) and "another reward" in next(iter(changed.extras["reasons"]))


def test_a_stop_of_the_run_ends_the_wait() -> None:
    def stop() -> None:
        raise Preempted("stop")

    with FakeServer(lambda c, n: time.sleep(5)) as server:
        reward = RemoteReward(server.url)
        began = time.monotonic()
        with pytest.raises(Preempted):
            reward(samples(1), RewardContext(poll=stop))
        assert time.monotonic() - began < 2


def test_token(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(token="sesame") as server:
        with pytest.raises(UsageError, match=TOKEN_VARIABLE):
            load_reward(server.url)
        monkeypatch.setenv(TOKEN_VARIABLE, "sesam")
        with pytest.raises(UsageError, match="HTTP 401"):
            load_reward(server.url)
        monkeypatch.setenv(TOKEN_VARIABLE, "sesame")
        assert bool(load_reward(server.url)(samples(), NONE).valid.all())
    monkeypatch.setenv(TOKEN_VARIABLE, "two words")
    with pytest.raises(UsageError, match="spaces"):
        load_reward(server.url)


def test_nothing_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(RewardError, match="start it with `gencontrol serve-reward`"):
        load_reward(f"http://127.0.0.1:{port}/clip", wait_s=0)


def test_waits_for_a_server_that_starts() -> None:
    with FakeServer(send(b""), http(b"", "503 loading")) as server:
        threading.Timer(0.3, lambda: setattr(server, "facts", FACTS)).start()
        assert RemoteReward(server.url, wait_s=5).server.version == "9"


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({**FACTS, "kind": "set"}, "set reward"),
        ({**FACTS, "protocol": 7}, "same gencontrol on both sides"),
        ({"hello": 1}, "no reward server"),
        (http(b"<html>"), "no reward server"),
        (http(b"[1]"), "no reward server"),
        (http(b"", "404 Not Found"), "refuses: HTTP 404"),
    ],
)
def test_wrong_servers(facts: object, text: str) -> None:
    with FakeServer(send(b""), facts) as server, pytest.raises(UsageError, match=text):
        RemoteReward(server.url, wait_s=0)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://", "no address"),
        ("http://host:port/clip", "no address"),
        ("http://host:99999/clip", "no address"),
        ("http://user:word@host/clip", "does not belong into the address"),
        ("http://host/clip?x=1", "no address"),
        ("ftp://host/clip", "no address"),
    ],
)
def test_wrong_addresses(url: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        RemoteReward(url)


def test_wrong_options_and_samples() -> None:
    for options in (
        {"timeout_s": 0},
        {"tries": 0},
        {"workers": 0},
        {"batch_size": 0},
        {"dtype": "int4"},
        {"wait_s": -1},
    ):
        with pytest.raises(UsageError, match="remote: "):
            load_reward("http://127.0.0.1:1/x", **options)
    with pytest.raises(UsageError, match="no option 'timeout'"):
        load_reward("http://127.0.0.1:1/x", timeout=3)
    with served() as server:
        reward = load_reward(server.url)
        for wrong in ([1.0], torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64), None):
            with pytest.raises(UsageError, match="float tensor"):
                reward(wrong, NONE)
        with pytest.raises(UsageError, match="plain JSON"):
            reward(samples(1), RewardContext(metadata={"x": [object()]}))
    with pytest.raises(UsageError, match="scores whole sets"):
        with served(ItemAsSet(MEAN)):
            pass
