"""torchrun and accelerate with two CPU processes: the run of one process; a failing rank ends all of them.

Plain and sharded; GENCONTROL_FULL=1 runs all combinations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gencontrol.cli import main
from tests.helpers.fixtures_scenes import tiny_text_to_image
from tests.helpers.shim import limit_s

JUDGE = '''
import atexit
import os
import pathlib
import time

here, rank = pathlib.Path(__file__).parent, os.environ.get("RANK", "")
here = here / os.environ.get("MARKS", ".")
atexit.register(lambda: (here / f"ended{rank}").touch())


def red(samples, context):
    return samples[:, 0].mean((1, 2))


calls = 0


def broken(samples, context):
    """Fail on rank 1 in its third call; rank 0 is slow, and must be told."""
    global calls
    calls += 1
    if os.environ.get("RANK") == "1" and calls == 3:
        (here / "failed").touch()
        raise RuntimeError("the judge of this rank broke")
    time.sleep(0.2)
    return samples[:, 0].mean((1, 2))
'''


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a judge, prompts, and the run of one process."""
    folder = tmp_path_factory.mktemp("launch")
    tiny_text_to_image(folder / "model")
    (folder / "launch_judge.py").write_text(JUDGE)
    (folder / "prompts.txt").write_text("a red circle\na blue square\na big green star\ntwo red circles\n")
    sys.path.insert(0, str(folder))
    try:
        assert main(command(folder, "one")) == 0
    finally:
        sys.path.remove(str(folder))
    return folder


def command(home: Path, output: str, reward: str = "red", *more: str) -> list[str]:
    names = ["--model", str(home / "model"), "--prompts", str(home / "prompts.txt"), "--output", str(home / output)]
    return [
        *("finetune", *names, "--reward", f"launch_judge:{reward}", "--algorithm", "rwr", "--batch", "4"),
        *("--steps", "2", "--micro-batch", "2", "--lora-rank", "2", "--threads", "1", "--eval-every", "2"),
        *("algorithm.demo_steps=2", "algorithm.eval_steps=2", "algorithm.updates_per_round=1", "run.eval_count=2"),
        *more,
    ]


#: words between `python -m` and `-m gencontrol`; the last is a free port.  With --cpu accelerate starts one process,
#: whatever --num_processes says (several are mpirun's); with --multi_gpu it starts two, GPUs or not.
LAUNCHERS = {
    "torchrun": "torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--main_process_port ",
}


def launch(home: Path, launcher: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run `gencontrol` under a launcher."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, str(home)])
    (home / launcher).mkdir(exist_ok=True)  # where the judge leaves its marks
    environment = {**os.environ, "MARKS": launcher, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = f"{LAUNCHERS[launcher]}{_free_port()}".split()
    return subprocess.run(
        [sys.executable, "-m", *words, "-m", "gencontrol", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=home,
        timeout=280,
    )


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


FULL = bool(os.environ.get("GENCONTROL_FULL"))
SAME = [("torchrun", ""), ("accelerate", ""), ("torchrun", "--shard"), *([("accelerate", "--shard")] if FULL else [])]
FAIL = [("torchrun", ""), ("accelerate", "--shard"), *([("accelerate", ""), ("torchrun", "--shard")] if FULL else [])]


@pytest.mark.parametrize(("launcher", "option"), SAME)
def test_two_processes_are_one(home: Path, launcher: str, option: str) -> None:
    output = f"run-{launcher}{option}"
    done = launch(home, launcher, command(home, output, "red", *option.split()))
    assert done.returncode == 0, done.stderr[-2000:]
    state = json.loads((home / output / "checkpoints" / "step_00000002" / "state.json").read_text())
    assert state["topology"]["world_size"] == 2
    one, two = lines(home / "one"), lines(home / output)
    assert [row["step"] for row in one] == [row["step"] for row in two] == [0, 1, 2]
    # the noise is the same; a batch of two differs from one of two in another order by fp32 rounding
    for name in ("loss/total", "reward/mean", "grad_norm"):
        assert two[1][name] == pytest.approx(one[1][name], rel=1e-4), name
    if option:  # weights, moments and roles were whole on disk: one process goes on from them
        more = command(home, output, "red", "--steps", "3")
        sys.path.insert(0, str(home))
        try:
            assert main(more) == 0
        finally:
            sys.path.remove(str(home))
        assert lines(home / output)[-1]["step"] == 3
    samples = "samples/step_00000000"
    names = sorted(path.name for path in (home / "one" / samples).glob("*.png"))
    assert names and all(
        (home / "one" / samples / name).read_bytes() == (home / output / samples / name).read_bytes() for name in names
    )
    # what is written is whole and loads in one process
    from gencontrol.pipelines import TextToImagePipeline

    loaded = TextToImagePipeline.from_pretrained(home / output / "final")
    base = TextToImagePipeline.from_pretrained(home / "model")
    base.load_lora_weights(home / output / "final" / "lora")
    ours, theirs = (p("a red circle", seed=0, output_type="np").images for p in (loaded, base))
    assert abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize(("launcher", "option"), FAIL)
def test_an_exception_on_one_rank_stops_all_within_10_s_with_its_message(
    home: Path, launcher: str, option: str, record_property: Callable[[str, object], None]
) -> None:
    """From the raise to the end of each rank; the start of interpreters and the launcher's own end are not counted."""
    marks = home / launcher
    for mark in ("failed", "ended0", "ended1"):
        (marks / mark).unlink(missing_ok=True)
    done = launch(
        home, launcher, command(home, f"broken-{launcher}{option}", "broken", "--steps", "50", *option.split())
    )
    over = time.time()
    assert done.returncode != 0
    assert "the judge of this rank broke" in done.stderr and "rank 1 failed" in done.stderr
    failed = (marks / "failed").stat().st_mtime
    took = [(marks / f"ended{rank}").stat().st_mtime - failed for rank in range(2)]
    record_property("seconds", [*took, over - failed])
    print(f"{launcher} {option}: seconds from the raise to the end of each rank, and of all: {took}, {over - failed}")
    assert max(took) < limit_s()


def test_sharding_one_process_is_refused_before_anything_loads(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(home, "alone", "red", "--shard")) == 2
    said = capsys.readouterr().err.strip()
    assert "train.shard = true splits the weights over processes, and there is one" in said
    assert len(said.splitlines()) == 1 and not (home / "alone").exists()
