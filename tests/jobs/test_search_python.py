"""`search` as a function: objects of one's own, a folder that goes on, and how deep a search is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gencontrol
from gencontrol import search
from gencontrol.cli import main
from gencontrol.errors import UsageError
from gencontrol.sampling.steps import Sde
from tests.helpers.fixtures_images import tiny_sd
from tests.helpers.search_run import same_results, same_tree, search_command
from tests.helpers.search_toys import Watcher, brightness, tiny_digits

SMALL = {"steps": 3, "nfe": 24, "leaf_batch": 2, "threads": 1, "count": 2}


def test_objects_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A loaded pipeline and a function, as TreeSearchPipeline takes them; the folder is that of the command."""
    found = search(tiny_digits(), brightness, prompt=["3", "7"], sampler="dts", output=tmp_path / "run", **SMALL)
    assert found.tree is not None and found.tree.roots == 2 and found.folder == tmp_path / "run"
    assert [item["prompt"] for item in found.items] == ["3", "3", "7", "7"]
    assert all(file.suffix == ".png" and file.stat().st_size for file in found.files)
    for name in ("tree.safetensors", "results.csv", "metrics.jsonl", "config.toml", "run.json", "report.html"):
        assert (tmp_path / "run" / name).exists(), name
    assert 'reward = ["tests.helpers.search_toys:brightness"]' in (tmp_path / "run" / "config.toml").read_text()
    again = search(tiny_digits(), brightness, prompt=["3", "7"], sampler="dts", output=tmp_path / "run", **SMALL)
    assert again.tree is None and again.items == found.items and "finished before" in capsys.readouterr().err
    more = search(
        tiny_digits(), brightness, prompt=["3", "7"], sampler="dts", output=tmp_path / "run", **(SMALL | {"nfe": 48})
    )
    assert more.tree is not None and more.tree.nfe > found.tree.nfe


def test_a_loaded_diffusers_pipeline_and_a_reward_object(tmp_path: Path) -> None:
    watcher = Watcher()
    found = search(tiny_sd(), watcher, prompt="red cube", sampler="smc", output=tmp_path / "run", **SMALL)
    assert found.tree is None and len(found.items) == 2
    assert all(samples.shape[1:] == (3, 16, 16) for samples in watcher.samples)
    assert {prompt for context in watcher.contexts for prompt in context.prompts or []} == {"red cube"}


def test_gradients_of_a_function_are_used(tmp_path: Path) -> None:
    found = search(tiny_digits(), brightness, prompt="3", sampler="tds", output=tmp_path / "run", **SMALL)
    assert len(found.items) == 2


def test_the_function_and_the_command_give_the_same_bits(tiny_model: Path, judge: str, tmp_path: Path) -> None:
    assert main(search_command(tiny_model, f"{judge}:loud", tmp_path / "command")) == 0
    options = SMALL | {"count": 4}
    search(str(tiny_model), f"{judge}:loud", prompt="a bell", output=tmp_path / "function", **options)
    same_tree(tmp_path / "command", tmp_path / "function")
    same_results(tmp_path / "command", tmp_path / "function")


def test_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"nef": 3}, "no option 'nef'"),
        ({"sampler": "dts-stra"}, "Did you mean 'dts-star'"),
        ({"prompt": " "}, "no prompt"),
        ({"model": object()}, "a object cannot be searched"),
    ):
        with pytest.raises(UsageError, match=message):
            search(
                **({"model": tiny_digits(), "reward": brightness, "prompt": "3", "output": tmp_path / "run"} | options)
            )
    assert not (tmp_path / "run").exists()


def test_a_step_of_the_tree_is_at_most_eight_frames_away(
    tiny_model: Path, judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames of ours from the command line to the call of a sampler step."""
    package = str(Path(gencontrol.__file__).parent)
    stacks: list[list[str]] = []
    call = Sde.__call__

    def seen(self: Sde, *arguments: Any, **options: Any) -> Any:
        frame, names = sys._getframe(1), []
        while frame is not None:
            if frame.f_code.co_filename.startswith(package):
                names.append(frame.f_code.co_qualname)
            frame = frame.f_back  # type: ignore[assignment]
        stacks.append(names[::-1])
        return call(self, *arguments, **options)

    monkeypatch.setattr(Sde, "__call__", seen)
    assert main(search_command(tiny_model, f"{judge}:loud", tmp_path / "run", nfe=6)) == 8, "two paths make no tree"
    assert stacks and max(map(len, stacks)) <= 8, stacks[0]
    assert stacks[0][0] == "main" and stacks[0][-1] == "Chain.advance"


def test_samples_are_decoded_without_a_graph(tmp_path: Path) -> None:
    """A reward may keep what it is given: nothing of the network hangs on it."""
    kept: list[Tensor] = []

    def keep(samples: Tensor) -> Tensor:
        kept.append(samples)
        return brightness(samples)

    search(tiny_digits(), keep, prompt="3", output=tmp_path / "run", **SMALL)
    assert kept and not any(samples.requires_grad for samples in kept)
    assert torch.isfinite(torch.cat(kept)).all()
