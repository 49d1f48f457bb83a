"""Two processes over gloo, plain and sharded: same sums as one, an error or a signal on one rank ends both.

P2, R5, D3, G2, W5 of the fault plan.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gencontrol.errors import GencontrolError, UsageError
from gencontrol.files import FileLayer
from gencontrol.testing.algorithm import metric_lines, state_hash
from gencontrol.train.distributed.dist import Group
from gencontrol.train.trainer import TrainConfig, Trainer
from tests.helpers.actor_critic import CONFIG as AC_CONFIG
from tests.helpers.actor_critic import ActorCritic
from tests.helpers.shim import Forked, Shim, kill_self, limit_s, newest, wait_for_line
from tests.helpers.training_toy import Toy, main


def start(folder: Path, work: Callable[[int], object]) -> list[Forked]:
    """Start `work(rank)` on two ranks, with the environment that torchrun gives."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        Forked(functools.partial(work, rank), shared | {"RANK": str(rank)}, folder.parent / f"log{rank}")
        for rank in range(2)
    ]


def finish(processes: list[Forked], folder: Path) -> tuple[list[int], list[str]]:
    codes = [process.wait() for process in processes]
    return codes, [(folder.parent / f"log{rank}").read_text() for rank in range(2)]


def test_p2_r5_g2_two_ranks_equal_one_and_a_signal_to_one_rank_stops_both(tmp_path: Path) -> None:
    arguments = [
        "steps=200",
        "micro_batch=2",
        "lr=0.001",
        "delay_s=0.03",
        "updates=2",
        "save_every=1000",
        "eval_every=100",
    ]
    processes = start(tmp_path / "two", lambda rank: main([str(tmp_path / "two"), *arguments]))
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


def test_two_ranks_equal_one_for_several_parameter_groups(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        algorithm = ActorCritic()
        Trainer(AC_CONFIG, tmp_path / "two").fit(algorithm)
        (tmp_path / f"hash{rank}").write_text(state_hash(algorithm))

    codes, said = finish(start(tmp_path / "two", work), tmp_path / "two")
    assert codes == [0, 0], said
    assert (tmp_path / "hash0").read_text() == (tmp_path / "hash1").read_text()
    Trainer(AC_CONFIG, tmp_path / "one").fit(ActorCritic())
    for a, b in zip(metric_lines(tmp_path / "one"), metric_lines(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-3), a["step"]  # float32 sums in another order, through AdamW


def test_several_parameter_groups_are_not_sharded(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        Trainer(dataclasses.replace(AC_CONFIG, shard=True), tmp_path / "run").fit(ActorCritic())

    codes, said = finish(start(tmp_path / "run", work), tmp_path / "run")
    assert all(codes) and "leave it out for several parameter groups" in said[0]


def test_r5_a_run_of_one_rank_goes_on_with_two(tmp_path: Path) -> None:
    config = TrainConfig(steps=12, micro_batch=2, lr=1e-3, save_every=6, eval_every=100)
    Trainer(config, tmp_path / "grown").fit(Toy(updates=2), stop_at=6)
    Trainer(config, tmp_path / "alone").fit(Toy(updates=2))

    def work(rank: int) -> None:
        Trainer(config, tmp_path / "grown").fit(Toy(updates=2))

    codes, said = finish(start(tmp_path / "grown", work), tmp_path / "grown")
    assert codes == [0, 0], said
    grown, alone = metric_lines(tmp_path / "grown"), metric_lines(tmp_path / "alone")
    assert [row["step"] for row in grown] == [row["step"] for row in alone]
    assert [row.get("items") for row in grown] == [row.get("items") for row in alone]
    for a, b in zip(grown, alone, strict=True):
        for key in a.keys() & {"loss/total", "loss/square", "grad_norm"}:
            # up to step 6 it is the same process; then float32 sums in another order
            assert a[key] == pytest.approx(b[key], rel=0 if a["step"] <= 6 else 1e-3), (a["step"], key)


def test_w5_error_on_one_rank_stops_both_with_its_message(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "run"), "steps=50", "delay_s=0.2", "fail_rank=1"]
    processes = start(tmp_path / "run", lambda rank: main(arguments))
    wait_for_line(tmp_path / "run", 1)
    begin = time.monotonic()
    codes, said = finish(processes, tmp_path / "run")
    assert time.monotonic() - begin < limit_s()
    assert all(code not in (0, 143) for code in codes)
    assert "rank 1 failed: RuntimeError: the reward of this rank broke" in said[0]
    assert "the reward of this rank broke" in said[1]


def broken_layer(toy: Toy, rank: int, begun: Path) -> None:
    """Let rank 1 fail inside the network at its third training pass, where the other rank waits for it."""
    passes: list[int] = []

    def hook(*_: object) -> None:
        passes.append(1)
        if rank == 1 and torch.is_grad_enabled() and len(passes) > 3:
            begun.touch()
            raise RuntimeError("a layer of this rank broke")

    toy.roles.module[1].register_forward_hook(hook)  # type: ignore[operator]


@pytest.mark.parametrize("place", ["between passes", "inside a pass"])
def test_sharded_an_error_on_one_rank_stops_both_with_its_message(tmp_path: Path, place: str) -> None:
    begun = tmp_path / "begun"

    def work(rank: int) -> None:
        def on_loss(step: int, calls: int) -> float:
            if rank == 1 and step == 1 and place == "between passes":
                begun.touch()
                raise RuntimeError("the reward of this rank broke")
            return 1.0

        toy = Toy(on_loss=on_loss)
        if place == "inside a pass":
            broken_layer(toy, rank, begun)
        Trainer(TrainConfig(steps=50, shard=True), tmp_path / "run").fit(toy)

    codes, said = finish(start(tmp_path / "run", work), tmp_path / "run")
    assert time.time() - begun.stat().st_mtime < limit_s()
    assert codes == [1, 1], said
    assert all("rank 1 failed: RuntimeError" in text or "of this rank broke" in text for text in said), said
    assert "rank 1 failed: RuntimeError" in said[0]


def test_sharded_runs_stop_at_a_signal_and_resume_on_one_or_two_ranks(tmp_path: Path) -> None:
    """G2 and R5 of a sharded run: 2 → 1 → 2 processes, equal to one process up to float32 sums in another order."""
    config = TrainConfig(steps=200, micro_batch=2, lr=1e-3, save_every=1000, eval_every=100, shard=True)
    two = tmp_path / "two"
    processes = start(two, lambda rank: run_toy(config, two, delay_s=0.03))
    wait_for_line(two, 2)
    processes[1].send_signal(signal.SIGTERM)
    codes, said = finish(processes, two)
    assert codes == [143, 143], said
    saved = max(int(p.name.removeprefix("step_")) for p in (two / "checkpoints").iterdir())
    assert saved == metric_lines(two)[-1]["step"] < 190
    whole = dataclasses.replace(config, shard=False)
    Trainer(whole, two).fit(Toy(updates=2), stop_at=saved + 2)
    codes, said = finish(start(two, lambda rank: run_toy(config, two, stop_at=saved + 4)), two)
    assert codes == [0, 0], said
    Trainer(whole, tmp_path / "one").fit(Toy(updates=2), stop_at=saved + 4)
    one, two_lines = metric_lines(tmp_path / "one"), metric_lines(two)
    assert [row["step"] for row in one] == [row["step"] for row in two_lines]
    for a, b in zip(one, two_lines, strict=True):
        for key in a.keys() & {"loss/total", "loss/square", "grad_norm"}:
            assert a[key] == pytest.approx(b[key], rel=1e-3), (a["step"], key)


def run_toy(config: TrainConfig, folder: Path, *, delay_s: float = 0.0, stop_at: int | None = None) -> int:
    """Train the toy; returns the exit code of the command line."""
    try:
        Trainer(config, folder).fit(Toy(updates=2, delay_s=delay_s), stop_at=stop_at)
    except GencontrolError as error:
        return error.exit_code
    return 0


def test_sharding_needs_several_processes_and_no_compiler(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is one; start with torchrun") as caught:
        Trainer(TrainConfig(shard=True), tmp_path / "run").fit(Toy())
    assert caught.value.exit_code == 2 and not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="shard = true with compile = true"):
        TrainConfig(shard=True, compile=True)


def test_n2_nan_on_one_rank_skips_the_update_on_both(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        toy = Toy(on_loss=lambda step, calls: math.nan if rank == 1 and step == 1 else 1.0)
        Trainer(TrainConfig(steps=3), tmp_path / "run").fit(toy)
        (tmp_path / f"hash{rank}").write_text(state_hash(toy))

    codes, _ = finish(start(tmp_path / "run", work), tmp_path / "run")
    rows = metric_lines(tmp_path / "run")
    assert codes == [0, 0] and [row["health/skipped"] for row in rows] == [0, 1, 1]
    assert (tmp_path / "hash0").read_text() == (tmp_path / "hash1").read_text()


def test_k3_killed_writer_leaves_the_previous_checkpoint_and_the_other_rank_ends(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        shim = Shim()

        def in_second_save(operation: str, path: Path) -> None:
            shim(operation, path)
            if rank == 0 and operation == "write" and ".tmp_step_00000002" in str(path):
                kill_self()

        config = TrainConfig(steps=50, save_every=1)
        Trainer(config, tmp_path / "run", files=FileLayer(in_second_save)).fit(Toy(delay_s=0.02))

    begin = time.monotonic()
    codes, _ = finish(start(tmp_path / "run", work), tmp_path / "run")
    assert codes[0] == -signal.SIGKILL and codes[1] == 1 and time.monotonic() - begin < limit_s()
    state = newest(tmp_path / "run")
    assert state is not None and state.step == 1


def test_bad_settings_on_the_writing_rank_are_told_to_the_other(tmp_path: Path) -> None:
    Trainer(TrainConfig(steps=3), tmp_path / "run").fit(Toy(), stop_at=1)
    arguments = [str(tmp_path / "run"), "steps=3", "lr=0.5"]
    codes, said = finish(start(tmp_path / "run", lambda rank: main(arguments)), tmp_path / "run")
    assert codes[0] == 2 and codes[1] == 1
    assert "train.lr was 0.0001, now 0.5" in said[0] and "rank 0 failed: UsageError" in said[1]


def test_environment_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="RANK = 2 and WORLD_SIZE = 2"):
        Group()
