"""Checks of a call's arguments: each returns the value in its one form, or raises a sentence that says what to give."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.rng import item_generators, randn, stream

Generators = torch.Generator | list[torch.Generator] | None


def texts(value: object, name: str) -> list[str]:
    """Return one prompt or several as a list.

    Raises:
        UsageError: empty, or not text.
    """
    items: list[Any] = [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
    wrong = next((item for item in items if not isinstance(item, str)), None)
    if wrong is not None or not items:
        got = "an empty list" if not items else f"a {type(wrong).__name__}"
        raise UsageError(f"{name} holds {got}; give a text or a list of texts.")
    return items


def positive(value: int, name: str) -> int:
    """Return a whole number of at least 1, or raise UsageError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{name} is {value!r}; give a whole number of at least 1.")
    return value


def guidance(value: float) -> float:
    """Return a finite guidance scale of at least 0, or raise UsageError."""
    if not math.isfinite(value) or value < 0:
        raise UsageError(f"guidance_scale is {value}; give a number of at least 0 (no guidance at 1 or below).")
    return float(value)


def seconds(value: float | None, longest: float) -> float | None:
    """Return a length in seconds within (0, longest], None meaning the longest, or raise UsageError."""
    if value is None:
        return None
    if not math.isfinite(value) or value <= 0 or value > longest * (1 + 1e-9):
        raise UsageError(f"audio_end_in_s is {value}; this model makes more than 0 and at most {longest:g} seconds.")
    return float(value)


def negatives(value: str | Sequence[str] | None, prompts: int, repeats: int, scale: float) -> list[str] | None:
    """Return one negative prompt for each sound, or None.

    Raises:
        UsageError: it would have no effect, or their number is not that of the prompts.
    """
    if value is None:
        return None
    if scale <= 1.0:
        raise UsageError(f"negative_prompt has no effect at guidance_scale {scale:g}; give a scale above 1 or drop it.")
    items = texts(value, "negative_prompt")
    if isinstance(value, str):
        items = items * prompts
    if len(items) != prompts:
        raise UsageError(f"{len(items)} negative prompts for {prompts} prompts; give one for each, or a single text.")
    return [item for item in items for _ in range(repeats)]


def sources(
    generator: torch.Generator | Sequence[torch.Generator] | None, seed: int | Sequence[int] | None, count: int
) -> Generators:
    """Return the noise sources of `count` samples; a seed gives each a stream of its own.

    Raises:
        UsageError: generator and seed, or a list of another length.
    """
    if generator is not None and seed is not None:
        raise UsageError("generator and seed are both given; give one of them.")
    if isinstance(seed, int):
        return item_generators(seed, "pipeline", range(count))
    if seed is not None:
        if len(seed) != count:
            raise UsageError(f"{len(seed)} seeds for {count} samples; give one for each, or a single one.")
        return [stream(item, "pipeline", 0) for item in seed]
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if len(generator) != count:
        raise UsageError(f"{len(generator)} generators for {count} samples; give one for each, or a single one.")
    return list(generator)


def noise(
    latents: Float[Tensor, "b *d"] | None, shape: tuple[int, ...], generators: Generators, device: torch.device
) -> Float[Tensor, "b *d"]:
    """Return standard normal noise in fp32 on a device: the caller's own, or a draw from the sources.

    Raises:
        UsageError: latents of another shape.
    """
    if latents is None:
        return randn(shape, generators, device)
    if tuple(latents.shape) != shape:
        raise UsageError(f"latents have shape {tuple(latents.shape)}; this call needs {shape}.")
    return latents.to(device, torch.float32)


def whole_or_parts(name: str, own: Mapping[str, Any], pipeline: Any, process: Any) -> None:
    """Raise UsageError unless either a whole pipeline or all of our own components (and no pipeline) are given."""
    given = sorted(part for part, value in own.items() if value is not None)
    if (pipeline is None and len(given) < len(own)) or (pipeline is not None and (given or process is not None)):
        raise UsageError(
            f"{name} takes either a diffusers pipeline or all of {', '.join(own)}; got "
            f"{'a pipeline and ' if pipeline is not None else ''}{', '.join(given) or 'nothing'}."
        )
