"""What is asked of a search: a base law for some prompts with its decoder, and what a pipeline must have to give it.

A pipeline's call is taken apart into a law (guided model, condition, time grid) and a decoder, both for one set of
prompts.  An object with the methods of `Searchable` is searchable as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gencontrol.errors import UsageError
from gencontrol.models.denoiser import Pred, TokenPred
from gencontrol.process import GaussianProcess
from gencontrol.process.gaussian import Time
from gencontrol.rng import randn
from gencontrol.sampling.chain import Chain, cond_leaves, make_chain
from gencontrol.sampling.guidance import Control, cfg
from gencontrol.sampling.loop import model_device
from gencontrol.sampling.state import Step
from gencontrol.types import Cond, RewardContext, index_cond, map_cond


@dataclass(frozen=True)
class Problem:
    """A base law over clean states, and what turns a state into a sample.

    Args:
        model: any Model, guidance included; its process draws the states at the first time of the grid.
        cond: one row per prompt, or None.
        item_shape: shape of one state.
        steps: sampler steps of a path.
        times: steps + 1 decreasing times that end at 0, or None for equal ones.
        decode: states [b *d] → images [b c h w] in [0, 1] or sounds [b n], [b c n] in [-1, 1]; float32, differentiable.
        prompts: texts, as a reward sees them.
        sampling_rate: Hz of sounds, else None.
    """

    model: Any
    cond: Cond
    item_shape: tuple[int, ...]
    steps: int
    times: tuple[float, ...] | None
    decode: Callable[[Tensor], Tensor]
    prompts: list[str]
    sampling_rate: int | None = None

    @property
    def context(self) -> RewardContext:
        """What the reward is told: prompts and sampling rate."""
        return RewardContext(prompts=self.prompts, sampling_rate=self.sampling_rate)

    def only(self, index: int) -> Problem:
        """Return the problem of one prompt."""
        part = slice(index, index + 1)
        return replace(self, cond=index_cond(self.cond, part), prompts=self.prompts[part])

    def autocast(self, dtype: torch.dtype | None) -> Callable[[], AbstractContextManager[Any]]:
        """Return the context of the model calls in a dtype; None is none."""
        if dtype is None:
            return nullcontext
        device = model_device(self.model, None).type
        return lambda: torch.autocast(device, dtype)

    def chain(self, step: str | Step | None = None, autocast: torch.dtype | None = None) -> Chain:
        """Return the law as a Markov chain, with one root per prompt."""
        return make_chain(
            self.model,
            self.item_shape,
            roots=len(self.prompts),
            steps=self.steps,
            times=self.times,
            step=step,
            cond=self.cond,
            autocast=self.autocast(autocast),
        )


@runtime_checkable
class Searchable(Protocol):
    """A pipeline seen by a search."""

    @property
    def kind(self) -> Literal["image", "audio"]:
        """What comes out."""
        ...

    def problem(self, *prompt: Any, **asked: Any) -> Problem:
        """Encode the prompts and return the law to search.

        Args:
            prompt: the first and only argument by place: one prompt or several.
            asked: a class takes those of num_inference_steps, guidance_scale, negative_prompt, height, width and
                audio_end_in_s that have an effect; None is the pipeline's own default.

        Raises:
            UsageError: an argument that is out of range.
        """
        ...

    def at_work(self) -> AbstractContextManager[None]:
        """Context of a whole search, for what the networks need while it runs."""
        ...


# ---- parts that the classes share -------------------------------------------------------------------------------


@dataclass(frozen=True)
class StartedAt(GaussianProcess):
    """A process whose prior is its law at the first time of a grid, for data of unit variance.

    Schedulers of diffusers start at sigma·noise with a first time below 1; `prior` there is sqrt(a² + s²)·noise.
    """

    first: float = field(default=1.0, repr=False)  # a tree's file knows the grid by itself

    def prior(
        self, shape: Sequence[int], generator: Any, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> Float[Tensor, "b *d"]:
        """Draw x at the first time; arguments as in `GaussianProcess.prior`."""
        return self.schedule.at(self.first).scale2 ** 0.5 * randn(shape, generator, device, dtype or torch.float32)


class Guided(Control):
    """A denoiser whose condition holds both sides of guidance: {"given": cond, "free": uncond}, row by row.

    So a batch may mix prompts with different negative prompts, and a stored tree knows both sides.  Without "free"
    there is no guidance.

    Args:
        model: the denoiser.
        scale: of `gencontrol.sampling.guidance.cfg`.
        first: first time of the grid that it is sampled on, or None for the process's own prior.
    """

    def __init__(self, model: Any, scale: float, first: float | None) -> None:
        process = model.process if first is None else StartedAt(model.process.schedule, first)
        super().__init__(process)
        self.model, self.scale = model, scale

    def forward(self, xt: Tensor, t: Time, cond: Cond = None) -> Pred | TokenPred:
        """Predict with one network call, of the doubled batch where there is guidance."""
        if "free" not in cond:
            return self.model(xt, t, cond["given"])
        return cfg(self.model, self.scale, cond["free"])(xt, t, cond["given"])


def both_sides(given: Cond, free: Cond | None) -> Cond:
    """Return the condition of `Guided`; a `free` of batch 1 stands for every row."""
    if free is None:
        return {"given": given}
    rows = len(cond_leaves(given)[0])
    return {"given": given, "free": map_cond(lambda leaf: leaf.expand(rows, *leaf.shape[1:]), free)}


def closed(times: Float[Tensor, " k"] | None) -> tuple[float, ...] | None:
    """Return a scheduler's grid ending in clean data: a last time above 0 (DDIM without set_alpha_to_one) becomes 0.

    A search needs clean samples; the step to 0 returns the clean prediction (ours, where diffusers leaves a little
    noise in).
    """
    if times is None:
        return None
    grid = times.tolist()
    return (*grid[:-1], 0.0)


def refuse_offloaded(network: nn.Module, owner: str) -> None:
    """Raise UsageError if hooks move the network about: a search calls it thousands of times."""
    for part in network.modules():
        registry = part.__dict__.get("_diffusers_hook")
        if "_hf_hook" in part.__dict__ or (registry is not None and "group_offloading" in registry.hooks):
            raise UsageError(
                f"this {owner} is offloaded, and a search calls its network thousands of times; load it again without "
                "offloading, or call remove_all_hooks(), and move it with to(device) (its text encoders may stay on "
                "the CPU)."
            )


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Take parameters out of autograd inside the block, so that gradient samplers keep no memory for them."""
    taken = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    for parameter in taken:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in taken:
            parameter.requires_grad_(True)
