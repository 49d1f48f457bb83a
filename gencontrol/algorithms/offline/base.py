"""Training on files instead of own samples: the data rule that offline methods share.

A manifest (`gencontrol.data.manifest`) names the files.  A step takes the next entries of a fresh permutation per
epoch, encodes them with the model's own encoder, and cuts them into updates; times and noise depend on the entry's
place alone, so the run is the same on any number of processes.  The reward serves evaluation only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gencontrol.algorithms.base import Collected, StepContext
from gencontrol.algorithms.online.base import Tuning, TuningConfig
from gencontrol.algorithms.online.rollout import device_of, rows_of_step
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.config import Count, options
from gencontrol.data.manifest import Entry, read_manifest, read_sample
from gencontrol.errors import UsageError
from gencontrol.models.roles import Roles
from gencontrol.rewards.base import Reward, SetReward
from gencontrol.types import Cond, cond_to, grouped


@options
class OfflineConfig(TuningConfig):
    """Options that offline methods share.

    Args:
        data: the manifest, a file of JSON lines; its paths are relative to it.
        batch: entries of an optimizer step, over all processes.
        updates_per_round: optimizer steps per training step.
        eval_steps, sampler: sampler steps and sampler of the evaluation.
    """

    data: str = ""
    batch: Count = 32
    updates_per_round: Count = 8
    eval_steps: Count = 40
    sampler: str = "euler"


@dataclass(frozen=True)
class Encoded:
    """This rank's entries of a round, update by update: latents by field, conditions, entry numbers and places.

    `place` is the number of an entry inside its update's batch on all ranks.
    """

    latents: Mapping[str, Float[Tensor, "n *d"]]
    cond: Cond
    entry: Int64[Tensor, " n"]
    place: Int64[Tensor, " n"]

    def rows(self, update: int, updates: int) -> Int64[Tensor, " m"]:
        """Return the rows of an update."""
        size = len(self.entry) // updates
        return torch.arange(update * size, (update + 1) * size)


class Offline(Tuning):
    """Base of the methods that train on files."""

    config: OfflineConfig
    #: fields of a manifest's lines: texts, files, and others
    fields: ClassVar[tuple[tuple[str, ...], ...]]

    def __init__(self, task: PromptTask, reward: Reward | SetReward, config: Any, *, roles: Roles, seed: int) -> None:
        """Set up; arguments and errors are those of `Tuning`.

        Raises:
            UsageError: no manifest is given, or it has a fault; the message gives the line.
        """
        super().__init__(task, reward, config, roles=roles, seed=seed)
        self.entries = self.read(config)

    @classmethod
    def read(cls, config: Any) -> list[Entry]:
        """Return the manifest's entries; a method that asks more of them overrides it."""
        if not config.data:
            raise UsageError(f"{cls.name} trains on files: give their manifest, --set algorithm.data=FILE.jsonl.")
        texts, files, other = cls.fields
        return read_manifest(Path(config.data), texts=texts, files=files, other=other)

    def prompt_of(self, entry: Entry) -> str:
        """Return the text that the task encodes for an entry."""
        return entry.texts["prompt"]

    def collect(self, ctx: StepContext) -> Collected:
        """Load and encode this step's entries.

        Raises:
            UsageError: the batch does not divide over the ranks, or a file does not fit the model.
        """
        cfg = self.config
        if cfg.batch % ctx.world_size:
            raise UsageError(f"a batch of {cfg.batch} does not divide over {ctx.world_size} processes; use a multiple.")
        count = cfg.batch * cfg.updates_per_round
        chosen = rows_of_step(len(self.entries), count, self.seed, f"{self.name}/entries", ctx.step)
        mine = [i for i in range(count) if i % ctx.world_size == ctx.rank]
        entries = [self.entries[chosen[i]] for i in mine]
        with ctx.group.all_or_none(ctx.poll):
            cond = self._conditions([self.prompt_of(entry) for entry in entries])
            latents = {
                field: torch.stack([self._latent(entry, field, ctx) for entry in entries]) for field in entries[0].files
            }
        data = Encoded(latents, cond, torch.tensor([chosen[i] for i in mine]), torch.tensor(mine) % cfg.batch)
        return Collected(data, cfg.updates_per_round, {"data/epoch": ctx.step * count / len(self.entries)})

    def _conditions(self, prompts: Sequence[str]) -> Cond:
        """Encode each distinct prompt once."""
        distinct = sorted(set(prompts))
        cond = cond_to(self.task.encode(distinct), device_of(self.task))
        place = {prompt: row for row, prompt in enumerate(distinct)}
        return grouped(cond, torch.tensor([place[prompt] for prompt in prompts]))

    @torch.no_grad()
    def _latent(self, entry: Entry, field: str, ctx: StepContext) -> Float[Tensor, "*d"]:
        """Read a file and encode it alone, so that its latent does not depend on its neighbours.

        Raises:
            UsageError: the model has no encoder, or the latent has another shape; the message names file and line.
        """
        ctx.poll()
        task, file = self.task, entry.files[field]
        sample, is_latent = read_sample(file, task.sampling_rate)
        if not is_latent:
            if task.encode_samples is None:
                raise UsageError(f"this model has no encoder of samples; give latents (.safetensors), not '{file}'.")
            given = list(sample.shape)
            try:
                sample = task.encode_samples(sample[None].to(device_of(task)))[0]
            except (ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise UsageError(f"{entry.place}: {field} '{file.name}' of shape {given}: {reason}") from error
        if tuple(sample.shape) != tuple(task.latent_shape):
            raise UsageError(
                f"{entry.place}: {field} '{file.name}' gives a latent of shape {list(sample.shape)}; this model's is "
                f"{list(task.latent_shape)}: bring the file to the model's size."
            )
        return sample.float().to(device_of(task))
