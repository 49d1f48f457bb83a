"""A trained control on a pipeline's network: labels of a call, the chain that it was trained on, loading and removal.

Without labels a call does not touch any of it: LoRA layers of the control are off except inside `acting`, so that the
pipeline is the base, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.models.conditions.base import conditioned, with_labels
from gencontrol.models.denoiser import Denoiser
from gencontrol.pipelines.hub import lora
from gencontrol.sampling.control.controlled import ControlGuided, check_schedule, controlled
from gencontrol.sampling.control.files import control_folder, load_control
from gencontrol.sampling.steps import Ddim
from gencontrol.types import Cond


class Control:
    """A control that is loaded onto a network; see `gencontrol.sampling.control.files`."""

    def __init__(self, denoiser: Denoiser, folder: str | Path, *, force: bool) -> None:
        """Load.

        Args:
            denoiser: of the pipeline; shared, and the same function as before without labels.
            force: allow another number of steps than the trained one.

        Raises:
            UsageError: no control there, one of another backbone or schedule, or the network carries LoRA adapters.
        """
        self.folder, self.force, self._network = control_folder(folder), force, denoiser.network
        self._loaded = self._adapters()
        if self._loaded:
            raise UsageError(
                f"the network carries the LoRA adapters {', '.join(self._loaded)}, but a control belongs to the model "
                "that it was trained on: load the control first thing, or unload_lora_weights() before."
            )
        wanted = [(p, p.requires_grad) for p in denoiser.network.parameters()]
        try:
            self.denoiser, self.plan = load_control(denoiser, self.folder)
        except UsageError:
            lora.delete(self._network, self._adapters())
            raise
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
        self._loaded = self._adapters()
        self._switch(on=False)
        schedule = repr(denoiser.process.schedule)
        check_schedule(self.plan, steps=None, eta=None, schedule=schedule, force=force)

    @property
    def attributes(self) -> Mapping[str, tuple[str, ...]]:
        """Attribute → names of its labels; empty for a control by numbers."""
        return conditioned(self.denoiser).labels.attributes

    def to(self, device: torch.device) -> None:
        """Move what is new; the backbone's LoRA moves with the backbone."""
        network = conditioned(self.denoiser)
        network.embed.to(device)
        if network.control is not None:
            network.control.to(device)

    def remove(self) -> None:
        """Take the control off the network."""
        conditioned(self.denoiser).unhook()
        lora.delete(self._network, self._loaded)

    def labels(self, y: Any, count: int, repeats: int) -> Tensor:
        """Return the label tensor of a call: one label for all of `count` prompts, or a list with one for each.

        Raises:
            UsageError: an unknown attribute or label (the known ones are named), or a list of another length.
        """
        found = conditioned(self.denoiser).labels
        several = isinstance(y, Sequence) and not isinstance(y, str)
        if several and found.config.kind == "vector":
            several = bool(y) and isinstance(y[0], (Sequence, Tensor))
        if isinstance(y, Mapping) and not y:
            raise UsageError(f"y is an empty mapping; attributes: {', '.join(self.attributes)}; None gives the base.")
        if not several:
            return found.encode([y]).expand(count * repeats, -1)
        if len(y) != count:
            raise UsageError(f"{len(y)} labels for {count} prompts; give one for each, or a single one.")
        return found.encode(list(y)).repeat_interleave(repeats, 0)

    def times(self, steps: int | None) -> Sequence[float]:
        """Return the trained grid, or with `force` the model's own one of another number of steps.

        Raises:
            UsageError: another number of steps without `force`.
        """
        schedule = repr(self.denoiser.process.schedule)
        check_schedule(self.plan, steps=steps, eta=None, schedule=schedule, force=self.force)
        if steps is None or steps == len(self.plan.grid) - 1:
            return self.plan.grid
        from gencontrol.process.gaussian import GaussianProcess
        from gencontrol.sampling.control.controlled import plan_of

        assert isinstance(self.denoiser.process, GaussianProcess)  # `Conditioned` takes no other
        return plan_of(self.denoiser.process, steps).grid

    def step(self) -> Ddim:
        """Return the sampler step of the trained chain."""
        return Ddim(eta=self.plan.eta)

    def model(self, prompt_scale: float | None, strength: float, uncond: Cond) -> ControlGuided:
        """Return the model with two strengths; prompt_scale None is the trained one."""
        return controlled(self.denoiser, self.plan, uncond, strength=strength, prompt_scale=prompt_scale)

    def join(self, cond: Cond, labels: Tensor) -> Cond:
        """Return a condition with labels."""
        return with_labels(cond, labels, name=conditioned(self.denoiser).config.name)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Check that samples have the trained shape, which a residual control is made for.

        Raises:
            UsageError: they have not.
        """
        config = conditioned(self.denoiser).config
        if config.inject == "residual" and tuple(shape) != tuple(config.shape):
            raise UsageError(
                f"this control was trained on latents of shape {list(config.shape)}, not {list(shape)}; leave height, "
                "width or length out."
            )

    @contextmanager
    def acting(self) -> Iterator[None]:
        """The control's LoRA is on inside the block.

        Raises:
            UsageError: other adapters came after the control.
        """
        if others := [name for name in self._adapters() if name not in self._loaded]:
            raise UsageError(
                f"y with the LoRA adapters {', '.join(others)}: the control was trained without them; "
                "unload_lora_weights() first, or leave y out."
            )
        self._switch(on=True)
        try:
            yield
        finally:
            self._switch(on=False)

    def _adapters(self) -> list[str]:
        return lora.adapter_names(self._network) if lora.has_adapters(self._network) else []

    def _switch(self, *, on: bool) -> None:
        if self._loaded:
            for layer in lora.tuner_layers(self._network).values():
                layer._disable_adapters = not on  # enable_adapters() would also change requires_grad


def parse_labels(texts: Sequence[str]) -> str | dict[str, str]:
    """Return the labels of command-line texts: ["shape=circle", "size=2"] a mapping, ["circle"] one label.

    Raises:
        UsageError: an attribute twice, several labels without attributes, or an empty one.
    """
    parts = [part.strip() for text in texts for part in text.split(",")]
    if len(parts) == 1 and parts[0] and "=" not in parts[0]:
        return parts[0]
    found: dict[str, str] = {}
    for part in parts:
        attribute, equals, label = (piece.strip() for piece in part.partition("="))
        if not (attribute and equals and label) or attribute in found:
            why = "is given twice" if attribute in found else "is no label"
            raise UsageError(f"--y {part or texts[0]!r} {why}; write ATTRIBUTE=LABEL, once for each attribute.")
        found[attribute] = label
    return found
