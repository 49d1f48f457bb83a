"""What the tests of `search` share: user rewards with bad habits, and the command on a tiny model."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

REWARD = '''
import os
import pathlib
import signal

import torch

calls = 0
HERE = pathlib.Path(__file__).parent


def loud(samples, context):
    return samples.square().flatten(1).mean(1) * 100


def stopped(samples, context):
    """`loud`, and a signal in one call, once."""
    global calls
    calls += 1
    flag = HERE / "signal"
    if flag.exists() and calls == 3:
        number = int(flag.read_text())
        flag.unlink()
        os.kill(os.getpid(), number)
    return loud(samples, context)


def slow(samples, context):
    import time
    time.sleep(0.05)
    return loud(samples, context)


def picky(samples, context):
    if len(samples) > 1:
        raise RuntimeError("one at a time")
    if float(samples.sum()) > 0:
        raise ValueError("too positive")
    return loud(samples, context)


def hopeless(samples, context):
    raise RuntimeError("no judge today")
'''


def search_command(model: Path, reward: str, output: Path, *options: str, nfe: int = 24) -> list[str]:
    """The arguments of a search with few calls."""
    names = ["--model", str(model), "--prompt", "a bell", "--reward", reward, "--output", str(output)]
    return ["search", *names, "--steps", "3", "--nfe", str(nfe), "--leaf-batch", "2", "--threads", "1", *options]


def table_rows(folder: Path) -> list[dict[str, str]]:
    """The table of results."""
    with open(folder / "results.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def same_tree(a: Path, b: Path) -> None:
    """Equal tensors and equal facts."""
    from gencontrol.sampling.tree.store import read_tree

    (facts, tensors), (others, theirs) = read_tree(a / "tree.safetensors"), read_tree(b / "tree.safetensors")
    assert facts == others
    assert tensors.keys() == theirs.keys()
    for name, tensor in tensors.items():
        assert torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(theirs[name])), name


def same_results(a: Path, b: Path) -> None:
    """Equal files of samples and equal tables, but for the clock."""
    names = sorted(file.name for file in (a / "samples").iterdir())
    assert names == sorted(file.name for file in (b / "samples").iterdir())
    for name in names:
        assert (a / "samples" / name).read_bytes() == (b / "samples" / name).read_bytes(), name
    for row, other in zip(table_rows(a), table_rows(b), strict=True):
        assert row | {"seconds": ""} == other | {"seconds": ""}
