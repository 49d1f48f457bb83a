"""Classifier-free fine-tuning: a new label condition learnt from labelled files by denoising regression.

The peer of CTRL (docs/methods/ctrl.md#e-ctrl-2): Ho & Salimans' recipe (2022, arXiv 2207.12598) on a pretrained model.
The condition is CTRL's zero-initialised one with a further value "none" for every attribute; for a share of the items
the whole condition is dropped, prompt and labels, so that guidance u + s·(c − u) is defined.  Data: JSON lines
{"prompt", "file", "labels": {attribute: value}}.  The reward that a run names serves evaluation only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gencontrol.algorithms.base import LossOut, StepContext
from gencontrol.algorithms.offline.base import Encoded, Offline, OfflineConfig
from gencontrol.algorithms.online.rollout import denoising_error
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.config import BelowOne, options
from gencontrol.data.manifest import Entry, check_labels
from gencontrol.errors import UsageError
from gencontrol.models.conditions.base import Conditioned, add_condition, conditioned, with_labels
from gencontrol.models.conditions.labels import join_prompt, split_prompt
from gencontrol.models.roles import Roles
from gencontrol.process.gaussian import GaussianProcess
from gencontrol.rewards.base import Reward, SetReward
from gencontrol.rng import stream
from gencontrol.sampling.control.controlled import plan_of
from gencontrol.sampling.control.files import save_control
from gencontrol.types import Cond, Grouped, cond_to, index_cond

#: Name of the condition, and the value of an attribute that is not given.
NAME, NONE = "labels", "none"


@options
class CfgFinetuneConfig(OfflineConfig):
    """Options of `CfgFinetune`; the shared ones are `OfflineConfig`'s.

    Args:
        dropout: share of the items whose condition is dropped, in [0, 1) (PAPER: 0.1 to 0.2).
        inject: where the condition enters; see `gencontrol.models.conditions.base`.
    """

    dropout: BelowOne = 0.1
    inject: Literal["time", "residual"] = "time"


@dataclass(frozen=True)
class LabelledMicro:
    """Labelled samples of one micro-batch with times and noise; dropped ones have the empty condition."""

    latents: Float[Tensor, "n *d"]
    cond: Cond
    t: Float[Tensor, " n"]
    noise: Float[Tensor, "n *d"]


def attributes_of(entries: Sequence[Entry]) -> dict[str, tuple[str, ...]]:
    """Return all values of every attribute that occurs, sorted, and NONE."""
    found: dict[str, set[str]] = {}
    for entry in entries:
        for attribute, value in entry.other["labels"].items():
            found.setdefault(attribute, set()).add(value)
    return {attribute: (*sorted(found[attribute]), NONE) for attribute in sorted(found)}


def text_of(entry: Entry) -> str:
    """Return an entry's labels as prompts carry them."""
    return ", ".join(f"{attribute}={value}" for attribute, value in sorted(entry.other["labels"].items()))


def mixed(drop: Bool[Tensor, " b"], cond: Cond, empty: Cond) -> Cond:
    """Return a condition with the rows that `drop` marks replaced by the row of `empty` (batch 1)."""
    if isinstance(cond, Tensor):
        return torch.where(drop.reshape(-1, *[1] * (cond.ndim - 1)), empty.to(cond), cond)
    return {key: mixed(drop, value, empty[key]) for key, value in cond.items()}


def labelled_task(task: PromptTask, network: Conditioned, texts: Sequence[str]) -> PromptTask:
    """Return the task whose prompts carry labels ("a cube | style=ink").

    Evaluation prompts without labels get `texts` in turn.  The empty condition is the model's with all labels NONE, or
    None where the model's condition cannot be dropped.
    """
    labels = network.labels
    nothing = dict.fromkeys(labels.attributes, NONE)
    prompts = list(task.eval_prompts)
    if not any(split_prompt(prompt)[1] for prompt in prompts):
        prompts = [join_prompt(prompt, texts[i % len(texts)]) for i, prompt in enumerate(prompts)]

    def encode(given: Sequence[str]) -> Cond:
        parts = [split_prompt(text) for text in given]
        rows = labels.encode([{**nothing, **found} for _, found in parts])
        device = next(task.denoiser.parameters()).device
        return with_labels(cond_to(task.encode([prompt for prompt, _ in parts]), device), rows.to(device), name=NAME)

    device = next(task.denoiser.parameters()).device
    droppable = task.uncond is not None or task.encode([prompts[0]]) is None
    empty = with_labels(task.uncond, labels.encode([nothing]).to(device), name=NAME) if droppable else None
    return replace(task, encode=encode, eval_prompts=prompts, uncond=empty)


class CfgFinetune(Offline):
    """Classifier-free fine-tuning; see the module docstring."""

    Config = CfgFinetuneConfig
    config: CfgFinetuneConfig
    name = "cfg-finetune"
    title = "classifier-free fine-tuning (Ho & Salimans 2022)"
    paper = "arXiv:2207.12598"
    summary = "A new label condition is learnt from labelled files by denoising regression, for guidance by it."
    fields = (("prompt",), ("file",), ("labels",))

    @classmethod
    def read(cls, config: Any) -> list[Entry]:
        """Return the manifest's entries with their labels checked."""
        entries = super().read(config)
        for entry in entries:
            check_labels(entry)
            labels = entry.other["labels"]
            if NONE in (*labels, *labels.values()):
                raise UsageError(f"{entry.place}: label '{NONE}' stands for an attribute that is not given; rename it.")
        return entries

    @staticmethod
    def prepare(task: PromptTask, reward: Reward | SetReward, config: Any) -> PromptTask:
        """Return the task with a condition made of the manifest's labels, all weights trainable.

        Raises:
            UsageError: the manifest has a fault, or a backbone that inject "time" does not know.
        """
        if isinstance(task.denoiser.network, Conditioned):
            return task
        denoiser = add_condition(
            task.denoiser,
            shape=task.latent_shape,
            name=NAME,
            kind="multi",
            cardinality=attributes_of(CfgFinetune.read(config)),
            inject=config.inject,
        )
        denoiser.network.requires_grad_(True)
        return replace(task, denoiser=denoiser)

    @staticmethod
    def whole_parameters(config: Any) -> tuple[str, ...]:
        """All of the condition is trained beside LoRA."""
        return ("embed", "control") if config.inject == "residual" else ("embed",)

    def __init__(
        self, task: PromptTask, reward: Reward | SetReward, config: CfgFinetuneConfig, *, roles: Roles, seed: int
    ) -> None:
        """Set up; the task's denoiser has the condition (`prepare`), and `roles` hold its network.

        Raises:
            UsageError: no condition, a fault of the manifest, labels that the condition does not have, a missing role,
                or dropout or guidance where the model's own condition cannot be dropped.
        """
        self.network, self.base_task = conditioned(task.denoiser), task
        entries = self.read(config)
        for entry in entries:
            self.network.labels.encode([entry.other["labels"]])
        whole = labelled_task(task, self.network, sorted({text_of(entry) for entry in entries}))
        if whole.uncond is None and config.dropout > 0:
            raise UsageError(f"dropout = {config.dropout}: this model has no unconditional branch; use 0.")
        super().__init__(whole, reward, config, roles=roles, seed=seed)

    def prompt_of(self, entry: Entry) -> str:
        """Return the prompt with its labels."""
        return join_prompt(entry.texts["prompt"], text_of(entry))

    def minibatches(self, data: Encoded, update: int, ctx: StepContext) -> Iterable[LabelledMicro]:
        """Yield an update's samples, part of them with the empty condition."""
        cfg, latents = self.config, data.latents["file"]
        rows = data.rows(update, cfg.updates_per_round)
        places = data.place[rows]
        chance = torch.rand(cfg.batch, generator=stream(self.seed, "cfg-finetune/drop", ctx.step, update))
        drop = (chance < cfg.dropout)[places].to(latents.device)
        for part, t, noise in self.noised(places, cfg.batch, latents, ctx.micro_batch, ctx, update):
            own = rows[part].to(latents.device)
            shared = index_cond(data.cond, own)
            cond = shared.expand() if isinstance(shared, Grouped) else shared
            if cfg.dropout:
                cond = mixed(drop[part], cond, self.task.uncond)
            yield LabelledMicro(latents[own], cond, t, noise)

    def loss(self, micro: LabelledMicro, ctx: StepContext) -> LossOut:
        """Denoising error under the condition, or without it where it was dropped."""
        ctx.poll()
        with self.roles.use("policy"), ctx.autocast():
            errors = denoising_error(self.task.denoiser, micro.latents, micro.t, micro.noise, micro.cond)
        return LossOut(errors.sum(), len(errors), {"loss/denoising": errors.detach().sum()})

    def save_final(self, folder: Path) -> None:
        """Write the model, loadable by `from_pretrained`, and beside it control/ for `load_control`.

        With LoRA the model is the untouched base; without, its weights are the tuned ones.
        """
        with self.roles.use("ref" if self.roles.lora is not None else self.role):
            self.base_task.save_final(folder)
        process = self.base_task.denoiser.process
        assert isinstance(process, GaussianProcess)  # `Conditioned` takes no other
        plan = plan_of(process, self.config.eval_steps)
        save_control(self.network, self.roles, self.role, plan, folder / "control")
