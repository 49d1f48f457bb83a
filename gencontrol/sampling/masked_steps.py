"""Steps of masked samplers: ancestral, confidence, and semi-autoregressive blocks around either.

Noise is [b n 2] uniform numbers: one chooses the token by inverse distribution function, the other whether the position
shows itself; so a position's fate does not depend on the batch or the vocabulary.  Visible tokens never change; that is
how prompts are given.  The log-probability of a step is that of the tokens it reveals at the positions it reveals.
Ancestral: Sahoo et al. 2024 eq. 7.  Confidence: Chang et al. 2022 (MaskGIT), with the largest probability of a position
as its confidence, so that the order depends on visible tokens alone and one token per step samples the exact law (ours;
greedy decoding is the same as LLaDA's low-confidence remasking).  Blocks: Nie et al. 2025 (LLaDA).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gencontrol.process.gaussian import Time
from gencontrol.process.masked import MaskedProcess, uniform
from gencontrol.sampling.state import Generators, State, Step
from gencontrol.types import Cond

_BELOW_ONE = 1 - 2.0**-22


@dataclass(frozen=True)
class MaskedStep(Step):
    """Reveals some masked positions; subclasses choose which.

    Args:
        temperature: divides the logits; 1 samples the model's law, 0 takes the likeliest token (log-prob 0).
    """

    kind: ClassVar[Literal["gaussian", "masked"]] = "masked"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be >= 0 and finite")

    @property
    def stochastic(self) -> bool:
        """Whether tokens are drawn (temperature > 0)."""
        return self.temperature > 0

    def draw(self, x: Int[Tensor, "b n"], generator: Generators) -> Float[Tensor, "b n 2"] | None:
        """Return uniform float64 numbers, or None for a deterministic step."""
        return uniform((*x.shape, 2), generator, x.device) if self.stochastic else None

    @abstractmethod
    def choose(
        self,
        log_probs: Float[Tensor, "b n v"],
        masked: Bool[Tensor, "b n"],
        process: MaskedProcess,
        t: Time,
        t_next: Time,
        draw: Float[Tensor, "b n"] | None,
    ) -> Bool[Tensor, "b n"]:
        """Return which of the masked positions are revealed in the step t → t_next."""

    def law(self, model: Any, x: Int[Tensor, "b n"], t: Time, cond: Cond = None) -> Float[Tensor, "b n v"]:
        """Return the log-probabilities that tokens are drawn from, the mask token excluded, temperature applied."""
        pred = model(x, t, cond)
        logits = model.process.forbid_mask(pred.logits)
        if self.temperature not in (0.0, 1.0):
            logits = logits / self.temperature
        return pred.replace(logits).log_probs

    def log_prob(
        self, model: Any, x: Int[Tensor, "b n"], x_next: Int[Tensor, "b n"], t: Time, cond: Cond = None
    ) -> Float[Tensor, " b"]:
        """Return the log-probability [b] of the tokens that x_next reveals (policy gradients)."""
        revealed = model.process.masked(x) & ~model.process.masked(x_next)
        return self._revealed_log_prob(self.law(model, x, t, cond), x_next, revealed)

    def advance(
        self,
        model: Any,
        x: Int[Tensor, "b n"],
        model_time: Time,
        span: tuple[Time, Time],
        cond: Cond,
        noise: Float[Tensor, "b n 2"] | None,
        allowed: Bool[Tensor, " n"] | None = None,
    ) -> tuple[Int[Tensor, "b n"], Float[Tensor, " b"]]:
        """Return tokens and log-probability after the step span[0] → span[1] on positions `allowed`; one model call."""
        if noise is None and self.stochastic:
            raise ValueError(f"{type(self).__name__} is stochastic: give noise [b n 2] (step.draw(x, generator))")
        log_probs = self.law(model, x, model_time, cond)
        masked = model.process.masked(x)
        candidates = masked if allowed is None else masked & allowed
        draw = None if noise is None else noise[..., 1]
        revealed = self.choose(log_probs, candidates, model.process, span[0], span[1], draw)
        if self.temperature == 0 or noise is None:
            tokens = log_probs.argmax(-1)
        else:
            tokens = inverse_cdf(log_probs, noise[..., 0])
        x_next = torch.where(revealed, tokens, x)
        return x_next, self._revealed_log_prob(log_probs, x_next, revealed)

    def _revealed_log_prob(
        self, log_probs: Float[Tensor, "b n v"], x: Int[Tensor, "b n"], revealed: Bool[Tensor, "b n"]
    ) -> Float[Tensor, " b"]:
        """Sum of the log-probabilities of x over the revealed positions; 0 for a greedy step."""
        if self.temperature == 0:
            return log_probs.new_zeros(len(x))
        index = torch.where(revealed, x, torch.zeros_like(x))
        found = log_probs.gather(-1, index[..., None])[..., 0]
        return torch.where(revealed, found, torch.zeros_like(found)).sum(1)

    def __call__(
        self, model: Any, state: State, t: Time, t_next: Time, cond: Cond = None, noise: Tensor | None = None
    ) -> State:
        """Return the state at t_next; at t_next = 0 every position is revealed."""
        return State(*self.advance(model, state.x, t, (t, t_next), cond, noise))


@dataclass(frozen=True)
class Ancestral(MaskedStep):
    """Every masked position shows itself independently with probability (a' - a)/(1 - a)."""

    def draw(self, x: Int[Tensor, "b n"], generator: Generators) -> Float[Tensor, "b n 2"] | None:
        """Return uniform float64 numbers; needed at any temperature, since positions are drawn too."""
        return uniform((*x.shape, 2), generator, x.device)

    @property
    def stochastic(self) -> bool:
        """True: the revealed positions are drawn even at temperature 0."""
        return True

    def choose(
        self,
        log_probs: Float[Tensor, "b n v"],
        masked: Bool[Tensor, "b n"],
        process: MaskedProcess,
        t: Time,
        t_next: Time,
        draw: Float[Tensor, "b n"] | None,
    ) -> Bool[Tensor, "b n"]:
        """Return a Bernoulli choice of positions."""
        if draw is None:
            raise ValueError("ancestral draws its positions: give uniform numbers")
        chance = process.unmask_probability(t, t_next)
        if isinstance(chance, Tensor) and chance.ndim:
            chance = chance[:, None]
        return masked & (draw < chance)


@dataclass(frozen=True)
class Confidence(MaskedStep):
    """The surest positions show themselves, as many as keep the masked share at that of the schedule.

    Args:
        temperature: see MaskedStep; the default 0 is greedy.
    """

    temperature: float = 0.0

    def choose(
        self,
        log_probs: Float[Tensor, "b n v"],
        masked: Bool[Tensor, "b n"],
        process: MaskedProcess,
        t: Time,
        t_next: Time,
        draw: Float[Tensor, "b n"] | None,
    ) -> Bool[Tensor, "b n"]:
        """Return the positions with the largest probability of their likeliest token; ties go to the left."""
        kept = 1.0 - process.unmask_probability(t, t_next)
        total = masked.sum(1)
        count = total - torch.round(total * kept).long()
        sure = log_probs.amax(-1).masked_fill(~masked, -math.inf)
        rank = sure.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return masked & (rank < count[:, None])


@dataclass(frozen=True)
class Blocks(Step):
    """Decodes blocks of positions from left to right, each by `inner` on its own clock (semi-autoregressive).

    Block k of B takes the times [1 - (k+1)/B, 1 - k/B]; with a number of steps divisible by B every step is one model
    call, otherwise a step that crosses a border calls the model once per block.  With size 1 it is exact sampling from
    left to right.  Times are floats (the whole batch stands in the same block).

    Args:
        size: positions per block.
        inner: the step inside a block.
        start: first generated position; everything before it is prompt.
    """

    kind: ClassVar[Literal["gaussian", "masked"]] = "masked"
    size: int = 1
    inner: MaskedStep = field(default_factory=Confidence)
    start: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.start < 0:
            raise ValueError(f"blocks needs size >= 1 and start >= 0, not {self.size} and {self.start}")

    @property
    def stochastic(self) -> bool:
        """Whether the inner step is."""
        return self.inner.stochastic

    def draw(self, x: Int[Tensor, "b n"], generator: Generators) -> Float[Tensor, "b n 2"] | None:
        """Return the inner step's noise; a position uses its numbers in its own block alone."""
        return self.inner.draw(x, generator)

    def __call__(
        self, model: Any, state: State, t: Time, t_next: Time, cond: Cond = None, noise: Tensor | None = None
    ) -> State:
        """Return the state at t_next.

        Raises:
            ValueError: a time per item was given, or no position is left to generate.
        """
        if isinstance(t, Tensor) or isinstance(t_next, Tensor):
            raise ValueError("blocks takes float times: the whole batch stands in one block")
        length = state.x.shape[1] - self.start
        if length < 1:
            raise ValueError(f"blocks starts at position {self.start} of a sequence of {state.x.shape[1]}")
        blocks = -(-length // self.size)
        low, high = round((1 - t) * blocks, 9), round((1 - t_next) * blocks, 9)
        positions = torch.arange(state.x.shape[1], device=state.x.device) - self.start
        x, total = state.x, torch.zeros(len(state.x), device=state.x.device)
        for block in range(math.floor(low), math.ceil(high)):
            begin, end = max(low, block), min(high, block + 1)
            allowed = (positions >= block * self.size) & (positions < (block + 1) * self.size)
            span = (1.0 - (begin - block), 1.0 - (end - block))
            x, log_prob = self.inner.advance(model, x, 1.0 - begin / blocks, span, cond, noise, allowed)
            total = total + log_prob
        return State(x, total)


def inverse_cdf(log_probs: Float[Tensor, "b n v"], draw: Float[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Return tokens whose distribution function first exceeds the uniform numbers; never one of probability 0."""
    cumulative = log_probs.exp().cumsum(-1)
    level = draw.to(cumulative.dtype).clamp(max=_BELOW_ONE)[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, level, right=True)[..., 0].clamp(max=log_probs.shape[-1] - 1)
