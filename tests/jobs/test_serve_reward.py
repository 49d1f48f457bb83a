"""`serve-reward` from start to signal, what it refuses, and runs that use a served reward."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gencontrol.cli import main
from gencontrol.rewards import load_reward
from gencontrol.rewards.remote.wire import TOKEN_VARIABLE
from gencontrol.types import RewardContext
from tests.helpers.reward_servers import served

SERVER = ["serve-reward", "--threads", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def serve(arguments: list[str], port: int, use: Callable[[], object], number: int) -> tuple[int, list[object]]:
    """Run the command here, use it from a thread, then send the signal; exit code and what was found."""
    found: list[object] = []
    ended = threading.Event()

    def other_side() -> None:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).read()
                break
            except OSError:
                if ended.wait(0.05):
                    return
        try:
            found.append(use())
        except BaseException as error:
            found.append(error)
        if not ended.is_set():
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=other_side)
    thread.start()
    code = main([*SERVER, *arguments, "--port", str(port)])
    ended.set()
    thread.join(20)
    return code, found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_scores_and_stops_at_a_signal(number: int, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    images = torch.rand(5, 3, 16, 16)

    def use() -> object:
        return load_reward(f"http://127.0.0.1:{port}/compressibility")(images, RewardContext()).values

    ended, (values,) = serve(["--reward", "compressibility"], port, use, number)
    assert ended == code
    expected = load_reward("compressibility")(images, RewardContext()).values
    assert isinstance(values, torch.Tensor) and torch.equal(values, expected)
    shown = capfd.readouterr()
    assert f"serving compressibility at http://127.0.0.1:{port}/compressibility on cpu (no token needed)" in shown.out
    assert "answering what is under way" in shown.err and "Traceback" not in shown.err


def test_requests_under_way_are_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes while the reward works; the client still gets its values."""
    (tmp_path / "slow_judge.py").write_text(
        "import time\n\n\ndef judge(samples, context):\n    time.sleep(0.8)\n    return samples.flatten(1).mean(1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    port = free_port()
    answers: list[torch.Tensor] = []

    def use() -> object:
        reward = load_reward(f"http://127.0.0.1:{port}/judge", tries=1)
        working = threading.Thread(target=lambda: answers.append(reward(torch.ones(2, 3), RewardContext()).values))
        working.start()
        time.sleep(0.3)
        return working

    code, (working,) = serve(["--reward", "slow_judge:judge"], port, use, signal.SIGTERM)
    assert code == 143 and isinstance(working, threading.Thread)
    working.join(5)
    assert answers and answers[0].tolist() == [1.0, 1.0]


def test_token_name_and_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "sesame")
    port = free_port()
    images = torch.rand(3, 3, 8, 8)

    def use() -> object:
        return load_reward(f"http://127.0.0.1:{port}/both:2")(images, RewardContext()).values

    options = [
        "--reward",
        "compressibility:0.5",
        "--reward",
        "incompressibility",
        "--name",
        "both",
        "--host",
        "0.0.0.0",
    ]
    code, (values,) = serve(options, port, use, signal.SIGTERM)
    expected = load_reward("incompressibility")(images, RewardContext()).values
    assert code == 143 and isinstance(values, torch.Tensor)
    assert torch.allclose(values, expected)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "no reward is given"),
        (["--reward", "clpi"], "Did you mean 'clip'"),
        (["--reward", "http://127.0.0.1:1/x"], "served already"),
        (["--reward", "compressibility", "--host", "0.0.0.0"], TOKEN_VARIABLE),
        (["--reward", "compressibility", "--name", "a/b"], "--name a/b"),
        (["--reward", "compressibility", "--name", "health"], "not 'health'"),
        (["--reward", "compressibility", "--port", "70000"], "65535"),
        (["--reward", "compressibility", "--reward-model", "nowhere/at/all"], "does not exist"),
        (["--reward", "compressibility", "--reward-model", "owner/name"], "takes the option"),
        (["--reward", "clip", "--reward-model", "owner/name"], "--online"),
        (["--reward", "compressibility", "--host", "203.0.113.9"], TOKEN_VARIABLE),
        (["--reward", "fad-set"], "scores whole sets"),
        (["--reward", "compressibility", "--prot", "1"], "--port"),
    ],
)
def test_refusals(options: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SERVER, *options]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("gencontrol: error:") and text in err


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "gencontrol.rewards.remote.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main([*SERVER, "--reward", "compressibility"]) == 6
    assert 'pip install "gencontrol[serve]"' in capsys.readouterr().err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main([*SERVER, "--reward", "compressibility", "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another --host or --port" in capsys.readouterr().err


def test_a_run_with_a_served_reward(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores in samples.json; a training step; --dry-run asks nobody, a wrong address is refused."""
    sample = ["sample", "--model", str(tiny_model), "--prompt", "a bell", "--num", "2", "--steps", "1"]
    with served() as server:
        url = server.url
        assert main([*sample, "--reward", url, "--output", str(tmp_path / "out")]) == 0
        rows = json.loads((tmp_path / "out" / "samples.json").read_text())["samples"]
        assert all(row["reward"] == pytest.approx(6, abs=1) for row in rows)  # the mean of a sound, and six letters
        tune = ["finetune", "--model", str(tiny_model), "--reward", f"{url}:2", "--steps", "1", "--batch", "2"]
        tune += ["--threads", "1", "--eval-every", "0", "--track", "none", "algorithm.demo_steps=2"]
        assert main([*tune, "--output", str(tmp_path / "run")]) == 0
        assert (
            json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["reward/valid_fraction"] == 1
        )
    assert main([*tune, "--output", str(tmp_path / "dry"), "--dry-run"]) == 0
    capsys.readouterr()
    assert main([*sample, "--reward", "http://:8000/x", "--output", str(tmp_path / "o")]) == 2
