"""bench epoch: both loops do the same network work, and only ours encodes once per prompt."""

from __future__ import annotations

from typing import Any

import pytest

from gencontrol.bench import epoch


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_arms_do_the_same_network_work(guidance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows through the backbone: samples × (steps to draw + stochastic steps to train) × branches, in every arm."""
    work = epoch.Work(prompts=2, group=3, steps=3, micro_batch=3, guidance=guidance, dim=16, depth=1, size=8)
    rows: list[int] = []
    texts: list[int] = []
    projected: list[int] = []
    build = epoch.make_task

    def counting(given: epoch.Work) -> Any:
        task = build(given)
        backbone = task.denoiser.network.backbone
        backbone.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
        backbone.blocks[0].cross.to_kv.register_forward_hook(lambda m, inputs, out: projected.append(len(inputs[0])))
        encode = task.encode
        object.__setattr__(task, "encode", lambda prompts: texts.append(len(prompts)) or encode(prompts))
        return task

    monkeypatch.setattr(epoch, "make_task", counting)
    measured = {}
    for arm in epoch.ARMS:
        for counts in (rows, texts, projected):
            counts.clear()
        epoch.make(arm, work)()
        measured[arm] = (sum(rows), sum(texts), sum(projected))
    branches = 1 if guidance == 1.0 else 2
    network = 6 * (3 + 2) * branches
    # ours: 2 prompts (and 1 empty row) when drawing, and again in each of the 2 trained steps of its 2 micro-batches
    own = 2 + 2 * 2 if branches == 1 else 3 + 2 * (2 + 2)
    assert measured == {"ours": (network, 2, own), "plain": (network, 6, network), "single": (network, 6, network)}


@pytest.mark.parametrize("arm", epoch.ARMS)
def test_all_arms_compile_alike(arm: epoch.Arm, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr("torch.nn.Module.compile", lambda module: compiled.append(type(module).__name__))
    epoch.make(arm, epoch.Work(prompts=2, group=2, dim=16, depth=1, size=8, compile=True))
    epoch.make(arm, epoch.Work(prompts=2, group=2, dim=16, depth=1, size=8))
    assert compiled == ["PatchTransformer"]
