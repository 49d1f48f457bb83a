"""Which pipelines can be searched: ours, and those of diffusers.

A further pipeline is one class with the methods of `Searchable` and one line in `SEARCHABLE`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor

from gencontrol.errors import UsageError, nearest
from gencontrol.pipelines import arguments
from gencontrol.pipelines.backends.foreign_images import ForeignImage
from gencontrol.pipelines.class_to_image import ClassToImagePipeline
from gencontrol.pipelines.search.diffusers import IMAGES
from gencontrol.pipelines.search.problem import (
    Guided,
    Problem,
    Searchable,
    both_sides,
    closed,
    frozen,
    refuse_offloaded,
)
from gencontrol.pipelines.text_to_audio import TextToAudioPipeline
from gencontrol.pipelines.text_to_image import TextToImagePipeline

Texts = str | Sequence[str]


class AudioSearch:
    """TextToAudioPipeline, and so Stable Audio and AudioLDM2: the length in seconds is part of the law."""

    kind: Literal["image", "audio"] = "audio"
    owner = "a text-to-audio pipeline"

    def __init__(self, pipe: TextToAudioPipeline) -> None:
        refuse_offloaded(pipe.network, type(pipe).__name__)
        self.pipe = pipe

    @torch.no_grad()
    def problem(
        self,
        prompt: Texts,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: Texts | None = None,
        audio_end_in_s: float | None = None,
    ) -> Problem:
        """Encode prompts and length; sounds are decoded and cropped as the pipeline does."""
        pipe, backend = self.pipe, self.pipe.backend
        texts = arguments.texts(prompt, "prompt")
        seconds = arguments.seconds(audio_end_in_s, pipe.max_audio_length_in_s)
        scale, negative = _guidance(guidance_scale, backend.defaults.guidance_scale, negative_prompt, len(texts))
        free = None
        if scale > 1:
            free = pipe.uncond(seconds) if negative is None else pipe.encode_prompt(negative, seconds)
        steps = num_inference_steps or backend.defaults.steps
        times = closed(backend.times(steps))

        def decode(x: Tensor) -> Tensor:
            return pipe.crop(backend.decode(x).float().clamp(-1, 1), seconds)

        return Problem(
            Guided(pipe.denoiser, scale, times[0] if times else None),
            both_sides(pipe.encode_prompt(texts, seconds), free),
            backend.latent_shape(seconds),
            len(times) - 1 if times else steps,
            times,
            decode,
            texts,
            pipe.sampling_rate,
        )

    def at_work(self) -> AbstractContextManager[None]:
        """Freeze all networks."""
        return frozen(*self.pipe.modules().values())


class ClassSearch:
    """ClassToImagePipeline: prompts are names or numbers of classes, states are pixels."""

    kind: Literal["image", "audio"] = "image"
    owner = "a class-to-image pipeline"

    def __init__(self, pipe: ClassToImagePipeline) -> None:
        refuse_offloaded(pipe.network, type(pipe).__name__)
        self.pipe = pipe

    @torch.no_grad()
    def problem(
        self,
        prompt: int | str | Sequence[int | str],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: Texts | None = None,
    ) -> Problem:
        """Encode the labels; a reward sees their names as prompts."""
        pipe, spec = self.pipe, self.pipe.spec
        labels = [prompt] if isinstance(prompt, (int, str)) else list(prompt)
        known = dict(enumerate(pipe.class_names))
        names = arguments.texts([known.get(x, str(x)) if isinstance(x, int) else x for x in labels], "prompt")
        scale, negative = _guidance(guidance_scale, spec.guidance_scale, negative_prompt, len(names))
        free = None
        if scale > 1:
            free = pipe.uncond() if negative is None else pipe.encode(negative)
        law, cond = Guided(pipe.denoiser, scale, None), both_sides(pipe.encode(names), free)
        return Problem(law, cond, pipe.latent_shape, num_inference_steps or spec.steps, None, pipe.decode, names)

    def at_work(self) -> AbstractContextManager[None]:
        """Freeze the network."""
        return frozen(self.pipe.network)


class ImageSearch:
    """TextToImagePipeline around our own architecture; around diffusers' pipelines it is theirs that is searched."""

    kind: Literal["image", "audio"] = "image"
    owner = "a text-to-image pipeline"

    def __init__(self, pipe: TextToImagePipeline) -> None:
        refuse_offloaded(pipe.network, type(pipe).__name__)
        self.pipe = pipe

    @torch.no_grad()
    def problem(
        self,
        prompt: Texts,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: Texts | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Problem:
        """Encode the prompts."""
        pipe, backend = self.pipe, self.pipe.backend
        texts = arguments.texts(prompt, "prompt")
        scale, negative = _guidance(guidance_scale, backend.defaults.guidance_scale, negative_prompt, len(texts))
        shape = backend.latent_shape(backend.size(height, width))
        free = None
        if scale > 1:
            free = pipe.uncond() if negative is None else pipe.encode_prompt(negative)
        law, cond = Guided(pipe.denoiser, scale, None), both_sides(pipe.encode_prompt(texts), free)
        return Problem(law, cond, shape, num_inference_steps or backend.defaults.steps, None, pipe.decode, texts)

    def at_work(self) -> AbstractContextManager[None]:
        """Freeze all networks."""
        return frozen(*self.pipe.modules().values())


def _guidance(
    given: float | None, default: float, negative: Texts | None, count: int
) -> tuple[float, list[str] | None]:
    """The guidance scale, and a negative prompt for each prompt or None."""
    scale = arguments.guidance(default if given is None else given)
    return scale, arguments.negatives(negative, count, 1, scale)


def _text_to_image(pipe: TextToImagePipeline) -> Searchable:
    """Our own architecture, or the diffusers pipeline inside."""
    backend = pipe.backend
    return searchable(backend.pipe) if isinstance(backend, ForeignImage) else ImageSearch(pipe)


def _foreign_audio(pipe: Any) -> AudioSearch:
    """diffusers' audio pipelines, through ours."""
    return AudioSearch(TextToAudioPipeline(pipe))


#: Class name of a pipeline → its Searchable.
SEARCHABLE: Mapping[str, Callable[[Any], Searchable]] = {
    "TextToAudioPipeline": AudioSearch,
    "ClassToImagePipeline": ClassSearch,
    "TextToImagePipeline": _text_to_image,
    "StableAudioPipeline": _foreign_audio,
    "AudioLDM2Pipeline": _foreign_audio,
    **IMAGES,
}


def searchable(pipe: Any) -> Searchable:
    """Return a loaded pipeline as something to search.

    Raises:
        UsageError: a pipeline of another class (the message lists those that are), or an offloaded one.
    """
    if isinstance(pipe, Searchable):
        return pipe
    name, home = type(pipe).__name__, type(pipe).__module__
    if name not in SEARCHABLE or not home.startswith(("diffusers.", "gencontrol.")):
        raise UsageError(
            f"a {name} cannot be searched.{nearest(name, SEARCHABLE)} Give a loaded {', '.join(SEARCHABLE)}, or an "
            "object with the methods of gencontrol.pipelines.search.problem.Searchable."
        )
    return SEARCHABLE[name](pipe)
