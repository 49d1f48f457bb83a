"""Every method on two processes, plain (DDP) and sharded (FSDP2), against one process: losses, samples, weights.

Two processes are forked once and run all cases in both layouts; the reference runs here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cfg_finetune import make_cfg, write_labelled
from test_ctrl import small as make_ctrl
from test_ctrl import stirred
from test_diffusion_dpo import make_dpo, write_pairs
from test_draft import make_draft
from test_flow_grpo import make_ddpo, make_grpo
from test_rwr import make_rwr
from torch import Tensor, nn

from gencontrol.algorithms.forward.awm import Awm
from gencontrol.algorithms.forward.crd import Crd
from gencontrol.algorithms.forward.nft import Nft
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.roles import LoraConfig
from gencontrol.process import GaussianProcess, Linear
from gencontrol.testing.algorithm import metric_lines
from gencontrol.train.trainer import TrainConfig, Trainer
from gencontrol.types import Prediction, RewardContext, RewardOut
from tests.helpers.dragon_worlds import FirstAxis, make_dragon
from tests.helpers.forward_worlds import guided_task, make
from tests.helpers.gaussian_world import Parabola
from tests.helpers.shim import Forked

STEPS = 2
LAYOUTS = ("plain", "sharded")
CONFIG = TrainConfig(steps=STEPS, micro_batch=4, lr=1e-3, eval_every=STEPS, max_grad_norm=0.1)


class Picky:
    """The first coordinate; samples on the left are invalid, so ranks have different numbers of them."""

    name, kind, differentiable = "picky", "item", False

    def __call__(self, samples: Tensor, context: RewardContext) -> RewardOut:
        valid = samples[:, 0] > -0.1
        return RewardOut(torch.where(valid, samples[:, 0], torch.nan), valid)


class Recorded:
    """A reward that keeps the samples it is asked about until `closed`."""

    def __init__(self, reward: Any) -> None:
        self.reward, self.seen, self.closed = reward, [torch.zeros(0)], False
        self.name, self.kind, self.differentiable = reward.name, reward.kind, reward.differentiable

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reward, name)

    def __call__(self, samples: Tensor, context: RewardContext) -> RewardOut:
        if not self.closed:
            self.seen.append(samples.detach()[:, 0].clone())
        out: RewardOut = self.reward(samples, context)
        return out

    def values(self) -> Tensor:
        """First coordinates of the distinct samples, in order."""
        return torch.cat(self.seen).sort().values


class Blocks(nn.Module):
    """A network of blocks for `guided_task`: three units under fully_shard, sizes that two ranks cannot halve."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first, self.last = nn.Linear(3 + 1 + 7, 9), nn.Linear(9, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(9, 9), nn.Tanh()) for _ in range(2))
        self.to_q = nn.Linear(9, 9)
        self.scale = nn.Parameter(torch.tensor(0.5))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        h = self.first(torch.cat([xt, t[:, None], cond], 1))
        for block in self.blocks:
            h = h + block(h)
        out: Tensor = self.last(h + torch.tanh(self.to_q(h))) * self.scale
        return out


def blocks_task() -> Any:
    return dataclasses.replace(
        guided_task(), denoiser=Denoiser(Blocks(), GaussianProcess(Linear()), Prediction.VELOCITY)
    )


#: only with GENCONTROL_FULL=1: further paths of methods that CASES has
MORE = ("crd", "crd-batch", "draft-lv", "ctrl-adjoint")
CASES: dict[str, Callable[[Path, Any], Any]] = {
    "crd": lambda data, r: make(Crd, r(FirstAxis()), ema_decay=0.9),
    "crd-batch": lambda data, r: make(Crd, r(FirstAxis()), center="batch", weight_temp=0.3),
    "crd-picky": lambda data, r: make(Crd, r(Picky()), min_valid=0.0, generations=4, updates_per_round=3),
    "crd-blocks": lambda data, r: make(Crd, r(FirstAxis()), task=blocks_task(), ema_decay=0.9),
    "crd-lora": lambda data, r: make(Crd, r(FirstAxis()), task=blocks_task(), lora=LoraConfig(2), ema_decay=0.9),
    "nft": lambda data, r: make(Nft, r(FirstAxis()), ema_decay=0.9),
    "awm": lambda data, r: make(Awm, r(FirstAxis())),
    "rwr": lambda data, r: make_rwr(r(FirstAxis()), ema_decay=0.9),
    "flow-grpo": lambda data, r: make_grpo(reward=r(FirstAxis()), guidance_scale=2.0),
    "ddpo": lambda data, r: make_ddpo(reward=r(FirstAxis())),
    "draft": lambda data, r: make_draft(reward=r(Parabola(0.5)), grad_steps=3, kl_coef=0.2, kl_guidance=2.0),
    "draft-lv": lambda data, r: make_draft(reward=r(Parabola(0.5)), low_variance=2),
    "diffusion-dpo": lambda data, r: make_dpo(data / "pairs" / "pairs.jsonl"),
    "cfg-finetune": lambda data, r: make_cfg(data / "labelled" / "labels.jsonl"),
    "ctrl": lambda data, r: stirred(make_ctrl(ema_decay=0.9, checkpointing=True)),
    "ctrl-adjoint": lambda data, r: stirred(make_ctrl(backprop="adjoint")),
    "ctrl-pool": lambda data, r: stirred(make_ctrl(backprop="pool", pool=64, pool_batch=24, base_updates=2)),
    "dragon": lambda data, r: make_dragon(r(FirstAxis()), prompts_per_round=12),
}
if not os.environ.get("GENCONTROL_FULL"):
    CASES = {name: case for name, case in CASES.items() if name not in MORE}


def run_case(name: str, layout: str, folder: Path) -> None:
    """Train a case in folder/name-layout; write the samples seen before the first update, and each rank's weights."""
    recorded: list[Recorded] = []

    def record(reward: Any) -> Recorded:
        recorded.append(Recorded(reward))
        return recorded[0]

    algorithm = CASES[name](folder, record)
    move = algorithm.after_update

    def after_update(*args: Any) -> None:
        if layout == "sharded" and name == "crd-blocks":  # a rank holds its part of every role, no more
            from gencontrol.train.distributed.shard import local_part

            held = [t for row in algorithm.roles.state_dict().values() for t in row.values()]
            assert sum(local_part(t).numel() for t in held) < 0.6 * sum(t.numel() for t in held)
        for reward in recorded:
            reward.closed = True
        move(*args)

    algorithm.after_update = after_update
    config = dataclasses.replace(CONFIG, shard=layout == "sharded")
    rank, run = os.environ.get("RANK", "0"), folder / f"{name}-{layout}"
    Trainer(config, run).fit(algorithm)
    seen = recorded[0].values() if recorded else torch.zeros(0)
    weights = {f"{role}/{key}": v for role, row in algorithm.roles.state_dict().items() for key, v in row.items()}
    assert all(type(v) in (Tensor, nn.Parameter) for v in weights.values())  # whole again
    save_file({"seen": seen, **{k: v.clone() for k, v in weights.items()}}, run / f"rank{rank}.safetensors")


def two_ranks(folder: Path, rank: int) -> None:
    """One of two processes: all cases in both layouts."""
    torch.distributed.init_process_group("gloo")
    for name in CASES:
        for layout in LAYOUTS:
            run_case(name, layout, folder)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("ranks")
    for name, write in (("pairs", write_pairs), ("labelled", write_labelled)):
        (home / name).mkdir()
        write(home / name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        Forked(partial(two_ranks, home, rank), shared | {"RANK": str(rank)}, home / f"log{rank}") for rank in range(2)
    ]
    for name in CASES:
        run_case(name, "one", home)
    codes = [rank.wait(500) for rank in ranks]
    logs = "\n".join((home / f"log{rank}").read_text()[-3000:] for rank in range(2))
    assert codes == [0, 0], logs
    return home


#: of the first update, relative: float32 sums in another order; DDPO divides by spreads, DPO's β is large
FIRST = 1e-4
#: of all weights after the run, relative to the largest change of AdamW (lr · updates)
AFTER = 1e-3


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(folder: Path, name: str, layout: str) -> None:
    one, two = (metric_lines(folder / f"{name}-{kind}") for kind in ("one", layout))
    assert [row["step"] for row in two] == [row["step"] for row in one] == list(range(STEPS + 1))
    before = [{k: v for k, v in rows[0].items() if k.startswith("eval/") and v is not None} for rows in (one, two)]
    assert before[1] == pytest.approx(before[0], rel=1e-5, abs=1e-6)
    assert two[1]["items"] == one[1]["items"] and two[1]["updates"] == one[1]["updates"]
    for key in ("loss/total", "reward/mean", "grad_norm"):
        if key in one[1]:
            assert two[1][key] == pytest.approx(one[1][key], rel=FIRST, abs=1e-7), key
    files = [load_file(folder / f"{name}-{layout}" / f"rank{rank}.safetensors") for rank in range(2)]
    alone = load_file(folder / f"{name}-one" / "rank0.safetensors")
    seen, expected = torch.cat([file["seen"] for file in files]), alone["seen"]
    for here, there in ((seen, expected), (expected, seen)):  # the same set; evaluations are drawn by each rank
        if len(expected):
            assert float((here[:, None] - there[None]).abs().amin(1).max()) < 1e-5
    limit = AFTER * CONFIG.lr * one[-1]["updates"]
    for key in alone.keys() - {"seen"}:
        assert torch.equal(files[0][key], files[1][key]), key  # ranks never part
        assert float((files[0][key] - alone[key]).abs().max()) <= limit, key


@pytest.mark.parametrize("name", ["crd-blocks", "crd-lora", "ctrl"])
def test_checkpoints_are_whole_whatever_the_layout(folder: Path, name: str) -> None:
    states = {}
    for layout in ("one", "sharded"):
        path = folder / f"{name}-{layout}" / "checkpoints" / f"step_{STEPS:08d}"
        states[layout] = {file.name: load_file(file) for file in path.glob("*.safetensors")}
        assert "sharded" not in json.loads((path / "state.json").read_text())["topology"]
    shapes = [{(f, k): v.shape for f, row in s.items() for k, v in row.items()} for s in states.values()]
    assert shapes[0] == shapes[1]
