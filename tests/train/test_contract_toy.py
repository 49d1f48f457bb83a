"""The algorithm contract on the toy, with one and with several updates per step (R1, R2, R4, E1, P3)."""

from __future__ import annotations

from gencontrol.testing.algorithm import AlgorithmContract
from tests.helpers.training_toy import Toy


class TestOneUpdate(AlgorithmContract):
    steps = 4

    def make(self) -> Toy:
        return Toy()


class TestThreeUpdates(AlgorithmContract):
    train = {"lr_schedule": "cosine", "warmup": 1, "weight_decay": 0.1}

    def make(self) -> Toy:
        return Toy(updates=3)
