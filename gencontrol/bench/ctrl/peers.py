"""Peers of CTRL on the digits (docs/methods/ctrl.md#e-ctrl-2): the base, classifier-free fine-tuning on the same
labels, and DPS.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencontrol.algorithms.offline.cfg_finetune import CfgFinetune, CfgFinetuneConfig
from gencontrol.bench.base import Loop, run_in_memory
from gencontrol.bench.dts.measure import Peer, one_root
from gencontrol.models.roles import Roles
from gencontrol.recipes.digits.data import CLASSES, DigitImages
from gencontrol.rewards.image.classifier import ClassifierReward
from gencontrol.rng import item_generators
from gencontrol.sampling import sample
from gencontrol.sampling.chain import make_chain
from gencontrol.sampling.guidance import cfg
from gencontrol.sampling.steps import Ddim
from gencontrol.types import RewardContext

STEPS, PER_CLASS = 30, 36
SHAPE = (1, 8, 8)
#: updates of classifier-free fine-tuning between two looks at its files
_ROUND = 50


def base_samples(world: Any, count: int, seed: int) -> Tensor:
    """Samples without any control."""
    with torch.no_grad():
        return sample(
            world.pipe.denoiser,
            (count, *SHAPE),
            steps=STEPS,
            step=Ddim(eta=1.0),
            generator=item_generators(seed, "bench/base", range(count)),
        )


def write_manifest(images: DigitImages, folder: Path) -> Path:
    """Write labelled images as the files and the manifest that `cfg-finetune` reads; returns the manifest."""
    from safetensors.torch import save_file

    lines = []
    for row, (image, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
        save_file({"latent": image.contiguous()}, str(folder / f"{row}.safetensors"))
        lines.append({"prompt": "a digit", "file": f"{row}.safetensors", "labels": {"y": CLASSES[label]}})
    path = folder / "labels.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def cfg_samples(
    world: Any, few: DigitImages, labels: Tensor, scales: Sequence[float], stops: Sequence[int], seed: int
) -> dict[tuple[int, float], Tensor]:
    """The algorithm `cfg-finetune` on the labelled images, all weights of the network trained.

    Args:
        stops: numbers of updates at which the averaged weights are sampled, multiples of min(50, the first).

    Returns:
        (updates, scale) → samples [n 1 8 8], one for each label.
    """
    size = min(_ROUND, *stops)
    own = world.task()
    own = replace(own, denoiser=copy.deepcopy(own.denoiser))
    found: dict[tuple[int, float], Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = str(write_manifest(few, Path(folder)))
        config = CfgFinetuneConfig(data=data, batch=64, updates_per_round=size, eval_steps=STEPS)
        reward = ClassifierReward(device="cpu")  # for evaluations, of which there are none
        task = CfgFinetune.prepare(own, reward, config)
        roles = Roles(task.denoiser.network, CfgFinetune.role_names(config))
        algorithm = CfgFinetune(task, reward, config, roles=roles, seed=seed)

        def after(step: int) -> None:
            if (step + 1) * size in stops:
                with roles.use("ema"):
                    for scale in scales:
                        found[(step + 1) * size, scale] = _labelled(algorithm, labels, scale, seed)

        run_in_memory(algorithm, max(stops) // size, Loop(3e-4, 64), seed=seed, on_step=after)
    return found


@torch.no_grad()
def _labelled(algorithm: CfgFinetune, labels: Tensor, scale: float, seed: int) -> Tensor:
    """Samples of labels by the tuned model under classifier-free guidance."""
    task = algorithm.task
    model = task.denoiser if scale == 1.0 else cfg(task.denoiser, scale, task.uncond)
    parts = [
        sample(
            model,
            (len(rows), *SHAPE),
            steps=STEPS,
            step=Ddim(eta=1.0),
            generator=item_generators(seed, "bench/cfg", rows.tolist()),
            cond=task.encode([f"a digit | y={CLASSES[label]}" for label in labels[rows].tolist()]),
        )
        for rows in torch.arange(len(labels)).split(256)
    ]
    return torch.cat(parts)


def dps_samples(world: Any, classifier: Any, repeats: int, scale: float, seed: int) -> Tensor:
    """This library's DPS with the method's classifier, class by class."""
    chain = one_root(make_chain(world.pipe.denoiser, SHAPE, steps=STEPS))
    peer = Peer("DPS", "dps", {"scale": scale})
    parts = []
    for label, name in enumerate(CLASSES):
        reward = ClassifierReward(reward_model=classifier, label=name, device="cpu")
        found = peer.run(
            chain,
            reward,
            STEPS * PER_CLASS * repeats,
            temperature=1.0,
            seed=seed * len(CLASSES) + label,
            decode=world.pipe.decode,
            context=RewardContext(),
        )
        parts.append(found.samples)
    return torch.cat(parts)
