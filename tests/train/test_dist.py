"""Two processes over gloo: same sums as one, an error or a signal on one rank ends both (P2, R5, D3, G2, W5)."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest

from gencontrol.errors import UsageError
from gencontrol.train.dist import Group
from gencontrol.train.trainer import TrainConfig, Trainer
from tests.contracts import metric_lines
from tests.faults.shim import Forked, limit_s, wait_for_line
from tests.training_toy import Toy, main


def start(folder: Path, *arguments: str) -> list[Forked]:
    """Start the toy on two ranks, with the environment that torchrun gives."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        Forked(lambda: main([str(folder), *arguments]), shared | {"RANK": str(rank)}, folder.parent / f"log{rank}")
        for rank in range(2)
    ]


def finish(processes: list[Forked], folder: Path) -> tuple[list[int], list[str]]:
    codes = [process.wait() for process in processes]
    return codes, [(folder.parent / f"log{rank}").read_text() for rank in range(2)]


def test_p2_r5_g2_two_ranks_equal_one_and_a_signal_to_one_rank_stops_both(tmp_path: Path) -> None:
    arguments = (
        "steps=200",
        "micro_batch=2",
        "lr=0.001",
        "delay_s=0.03",
        "updates=2",
        "save_every=1000",
        "eval_every=100",
    )
    processes = start(tmp_path / "two", *arguments)
    wait_for_line(tmp_path / "two", 5)
    begin = time.monotonic()
    processes[1].send_signal(signal.SIGTERM)  # not the rank that writes
    codes, said = finish(processes, tmp_path / "two")
    assert codes == [143, 143] and time.monotonic() - begin < limit_s()
    two = metric_lines(tmp_path / "two")
    saved = max(int(p.name.removeprefix("step_")) for p in (tmp_path / "two/checkpoints").iterdir())
    assert saved == two[-1]["step"] < 200
    # world size 2 → 1: announced once, goes on from that very step
    config = TrainConfig(steps=200, micro_batch=2, lr=1e-3, save_every=1000, eval_every=100)
    toy = Toy(updates=2)
    Trainer(config, tmp_path / "two").fit(toy, stop_at=saved + 2)
    Trainer(config, tmp_path / "one").fit(Toy(updates=2), stop_at=saved + 2)
    one, two = metric_lines(tmp_path / "one"), metric_lines(tmp_path / "two")
    assert len(one) == len(two) and [row.get("lr") for row in one] == [row.get("lr") for row in two]
    assert [row.get("items") for row in one] == [row.get("items") for row in two]
    for a, b in zip(one, two, strict=True):
        for key in a.keys() & {"loss/total", "loss/square", "grad_norm"}:
            # float32 sums in another order, carried through a few AdamW steps; the batch split itself is exact
            tolerance = 1e-6 if a["step"] == 1 else 1e-3
            assert a[key] == pytest.approx(b[key], rel=tolerance), (a["step"], key)


def test_w5_error_on_one_rank_stops_both_with_its_message(tmp_path: Path) -> None:
    processes = start(tmp_path / "run", "steps=50", "delay_s=0.2", "fail_rank=1")
    wait_for_line(tmp_path / "run", 1)
    begin = time.monotonic()
    codes, said = finish(processes, tmp_path / "run")
    assert time.monotonic() - begin < limit_s()
    assert all(code not in (0, 143) for code in codes)
    assert "rank 1 failed: RuntimeError: the reward of this rank broke" in said[0]
    assert "the reward of this rank broke" in said[1]


def test_environment_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="RANK = 2 and WORLD_SIZE = 2"):
        Group()
