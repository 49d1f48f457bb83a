"""The smallest algorithm that fulfils the protocol: a 2-d regression with an EMA role, and hooks to inject faults.

As a program: `python tests/training_toy.py RUN_DIR key=value…` trains it, with TrainConfig keys and the toy's own
(`delay_s`, `updates`, `nan_from`, `fail_rank`); it exits with the code of the error, as the command line does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gencontrol.algorithms.base import Collected, Evaluation, LossOut, StepContext
from gencontrol.errors import GencontrolError
from gencontrol.models.roles import Roles
from gencontrol.rng import item_noise, stream

BATCH = 8


def network() -> nn.Module:
    """A fixed tiny network, 2 → 2."""
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=stream(0, "toy/init", index)) * 0.5)
    return model


class Toy:
    """Learns y = −x on normal points; `on_loss(step, calls, rank)` runs before each loss and may scale it.

    `drift` is state that `collect` changes and the loss uses, so that forgetting it would show.
    """

    def __init__(
        self,
        updates: int = 1,
        on_loss: Callable[[int, int], float] | None = None,
        on_evaluate: Callable[[], None] | None = None,
        delay_s: float = 0.0,
    ) -> None:
        self.roles = Roles(network(), ("policy", "ema"))
        self.updates, self.on_loss, self.on_evaluate, self.delay_s = updates, on_loss, on_evaluate, delay_s
        self.drift = torch.zeros(2)
        self.rounds, self.calls = 0, 0

    def collect(self, ctx: StepContext) -> Collected:
        """Draw this step's points, each a function of its own number; a rank takes every world_size-th one."""
        time.sleep(self.delay_s)
        ctx.poll()
        items = range(ctx.step * BATCH, (ctx.step + 1) * BATCH)
        points = item_noise((2,), ctx.seed, "toy/points", items)
        self.drift.mul_(0.9).add_(points.mean(0))  # in place: a checkpoint that keeps a reference would be wrong
        self.rounds += 1
        return Collected(points[ctx.rank :: ctx.world_size], self.updates, {"reward/mean": float(points.mean())})

    def minibatches(self, data: Any, update: int, ctx: StepContext) -> Iterable[Tensor]:
        """Split into micro-batches."""
        return data.split(ctx.micro_batch)

    def loss(self, micro: Tensor, ctx: StepContext) -> LossOut:
        """Sum of squared errors."""
        self.calls += 1
        factor = 1.0 if self.on_loss is None else self.on_loss(ctx.step, self.calls)
        context = ctx.autocast() if ctx.autocast is not None else torch.autocast("cpu", enabled=False)
        with context:
            out = self.roles.module(micro + 0.01 * self.drift)
        squares = (out.float() + micro).square().sum(-1)
        return LossOut(squares.sum() * factor, len(micro), {"loss/square": squares.sum().detach()})

    def after_update(self, ctx: StepContext, update: int) -> None:
        """Move the average."""
        self.roles.lerp("ema", 0.9)
        ctx.poll()

    def evaluate(self, ctx: StepContext) -> Evaluation:
        """Error of the average weights on fixed points."""
        points = item_noise((2,), ctx.seed, "toy/eval", range(4))
        with self.roles.use("ema") as module, torch.no_grad():
            if self.on_evaluate is not None:
                self.on_evaluate()
            ctx.poll()
            error = float((module(points) + points).square().mean())
        return Evaluation({"eval/square": error}, {"points.json": b"[]"})

    def state_dict(self) -> dict[str, Any]:
        """Drift and number of rounds."""
        return {"drift": self.drift, "rounds": self.rounds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore."""
        self.drift, self.rounds = state["drift"].clone(), state["rounds"]

    def save_final(self, folder: Path) -> None:
        """Write something to look for."""
        (folder / "toy.json").write_text("{}")


def main(arguments: list[str]) -> int:
    """Train as a program; see the module docstring."""
    from gencontrol.config import apply_overrides, build
    from gencontrol.train.trainer import TrainConfig, Trainer

    torch.set_num_threads(1)
    table = apply_overrides({}, arguments[1:])
    delay_s, updates = float(table.pop("delay_s", 0.0)), int(table.pop("updates", 1))
    fail_rank = int(table.pop("fail_rank", -1))

    def on_loss(step: int, calls: int) -> float:
        import os

        if step == 1 and int(os.environ.get("RANK", "0")) == fail_rank:
            raise RuntimeError("the reward of this rank broke")
        return 1.0

    try:
        Trainer(build(TrainConfig, table, "train"), arguments[0]).fit(Toy(updates, on_loss, delay_s=delay_s))
    except GencontrolError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
