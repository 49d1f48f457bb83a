"""The masked (absorbing) process on tokens: a token is still visible at t with probability a(t), independently.

Shi et al. 2024 and Sahoo et al. 2024 (MDLM): the negative ELBO is a cross-entropy on masked positions weighted by
-a'(t)/(1 - a(t)), which is 1/t for the linear schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gencontrol.process.gaussian import Time
from gencontrol.process.schedule import Scalar
from gencontrol.rng import Keyed


@dataclass(frozen=True)
class MaskedProcess:
    """Noise law of a masked token model.

    Args:
        vocab_size: last axis of the model's logits.
        mask_id: id of the mask token; may lie inside the vocabulary (it is then never generated) or beyond it.
        schedule: "linear" a = 1 - t, or "cosine" a = 1 - sin(πt/2) (few masks for most of the time).
    """

    vocab_size: int
    mask_id: int
    schedule: str = "linear"

    def __post_init__(self) -> None:
        if self.vocab_size < 1 or self.mask_id < 0:
            raise ValueError(
                f"MaskedProcess needs vocab_size >= 1 and mask_id >= 0, not {self.vocab_size}, {self.mask_id}"
            )
        if self.schedule not in ("linear", "cosine"):
            raise ValueError(f"unknown masking schedule '{self.schedule}'; expected linear or cosine")

    def visible(self, t: Time) -> Scalar:
        """Return a(t), the probability that a token is still visible; a(0) = 1 and a(1) = 0 exactly."""
        if self.schedule == "linear":
            return 1.0 - t
        if isinstance(t, Tensor):
            return 1.0 - torch.sin(math.pi / 2 * t)
        return 1.0 - math.sin(math.pi / 2 * t)

    def weight(self, t: Time) -> Scalar:
        """Return the cross-entropy weight -a'(t)/(1 - a(t)) of masked positions, shaped like t.

        Raises:
            ValueError: t = 0, where it is infinite (not looked at for times on an accelerator).
        """
        on_cpu = not isinstance(t, Tensor) or t.device.type == "cpu"
        if on_cpu and bool((torch.as_tensor(t) <= 0).any()):
            raise ValueError(
                f"the masked weight is infinite at t = 0 of the {self.schedule} schedule; draw t from (0, 1]"
            )
        if self.schedule == "linear":
            return 1.0 / t
        half = math.pi / 2
        return half / (torch.tan(half * t) if isinstance(t, Tensor) else math.tan(half * t))

    def unmask_probability(self, t: Time, t_next: Time) -> Scalar:
        """Return the probability (a(t') - a(t))/(1 - a(t)) that a masked token shows itself in the step t → t' < t."""
        here = self.visible(t)
        return (self.visible(t_next) - here) / (1.0 - here)

    def prior(
        self,
        shape: Sequence[int],
        generator: torch.Generator | Sequence[torch.Generator] | Keyed | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.int64,
    ) -> Int[Tensor, "b n"]:
        """Return x at t = 1, all masks; the law is a point, so a given generator is only checked for its length."""
        if isinstance(generator, Sequence | Keyed) and len(generator) != shape[0]:
            raise ValueError(
                f"{len(generator)} generators for a batch of {shape[0]}; give one per sample or a single one"
            )
        return torch.full(tuple(shape), self.mask_id, dtype=dtype, device=device)

    def corrupt(
        self,
        x0: Int[Tensor, "b n"],
        t: Time,
        generator: torch.Generator | Sequence[torch.Generator] | Keyed | None,
    ) -> Int[Tensor, "b n"]:
        """Return x_t: every token of x0 replaced by the mask with probability 1 - a(t), t a float or [b]."""
        visible = self.visible(t)
        if isinstance(visible, Tensor) and visible.ndim:
            visible = visible[:, None]
        draw = uniform(tuple(x0.shape), generator, x0.device)
        return torch.where(draw < visible, x0, torch.full_like(x0, self.mask_id))

    def masked(self, xt: Int[Tensor, "b n"]) -> Bool[Tensor, "b n"]:
        """Return where x_t is masked."""
        return xt == self.mask_id

    def forbid_mask(self, logits: Float[Tensor, "b n v"]) -> Float[Tensor, "b n v"]:
        """Return logits with the mask token impossible; unchanged if its id lies beyond the vocabulary."""
        if self.mask_id >= logits.shape[-1]:
            return logits
        column = torch.arange(logits.shape[-1], device=logits.device) == self.mask_id
        return logits.masked_fill(column, -math.inf)


def uniform(
    shape: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | Keyed | None,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "b *d"]:
    """Draw uniform float64 numbers in [0, 1) on the generator's device and move them; a list gives one row each.

    Raises:
        ValueError: the list's length is not the batch size.
    """
    if isinstance(generator, Keyed):
        return generator.uniform(shape, device)
    if generator is None or isinstance(generator, torch.Generator):
        source = torch.device("cpu") if generator is None else generator.device
        return torch.rand(tuple(shape), generator=generator, device=source, dtype=torch.float64).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}; give one per sample or a single one")
    rows = [torch.rand(tuple(shape[1:]), generator=g, device=g.device, dtype=torch.float64) for g in generator]
    return torch.stack([row.to(device) for row in rows])
