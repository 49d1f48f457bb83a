"""What a search needs of a pipeline, and which pipelines give it: the one list of searchable classes.

A pipeline's call is taken apart into a base law (guided model, condition, time grid) and a decoder, both for one set of
prompts.  A further pipeline is one class with the methods of `Searchable` and one line in `SEARCHABLE`; an object that
has them already is searchable as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gencontrol.errors import UsageError, nearest
from gencontrol.models.denoiser import Pred, TokenPred
from gencontrol.pipelines import arguments
from gencontrol.pipelines.class_to_image import ClassToImagePipeline
from gencontrol.pipelines.text_to_audio import TextToAudioPipeline
from gencontrol.pipelines.text_to_image import TextToImagePipeline
from gencontrol.process import GaussianProcess
from gencontrol.process.gaussian import Time
from gencontrol.rng import randn
from gencontrol.sampling.chain import cond_leaves
from gencontrol.sampling.guidance import Control, cfg
from gencontrol.types import Cond, map_cond


@dataclass(frozen=True)
class Request:
    """The arguments of a call that decide which law is searched; None is the pipeline's own default.

    Args:
        prompt: one or several; of classes also their numbers.
        steps: sampler steps, ≥ 1.
        guidance_scale: of classifier-free guidance (FLUX: of its embedded guidance).
        negative_prompt: one for all prompts, or one for each.
        height, width: pixels of an image.
        seconds: length of a sound.
    """

    prompt: int | str | Sequence[int | str]
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | Sequence[str] | None = None
    height: int | None = None
    width: int | None = None
    seconds: float | None = None


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


@runtime_checkable
class Searchable(Protocol):
    """A pipeline seen by a search."""

    @property
    def kind(self) -> Literal["image", "audio"]:
        """What comes out."""
        ...

    def problem(self, ask: Request) -> Problem:
        """Encode the prompts and return the law to search.

        Raises:
            UsageError: an argument that is out of range or without effect in this pipeline.
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


def without_effect(owner: str, **given: Any) -> None:
    """Raise UsageError for the first argument that is not None: this pipeline has no use for it."""
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"{name} has no effect with {owner}; drop it.")


# ---- our own pipelines ------------------------------------------------------------------------------------------


class AudioSearch:
    """TextToAudioPipeline, and so Stable Audio and AudioLDM2: the length in seconds is part of the law."""

    kind: Literal["image", "audio"] = "audio"

    def __init__(self, pipe: TextToAudioPipeline) -> None:
        refuse_offloaded(pipe.network, type(pipe).__name__)
        self.pipe = pipe

    @torch.no_grad()
    def problem(self, ask: Request) -> Problem:
        """Encode prompts and length; sounds are decoded and cropped as the pipeline does."""
        pipe, backend = self.pipe, self.pipe.backend
        without_effect("a text-to-audio pipeline", height=ask.height, width=ask.width)
        texts = arguments.texts(ask.prompt, "prompt")
        seconds = arguments.seconds(ask.seconds, pipe.max_audio_length_in_s)
        chosen = backend.defaults.guidance_scale if ask.guidance_scale is None else ask.guidance_scale
        scale = arguments.guidance(chosen)
        negative = arguments.negatives(ask.negative_prompt, len(texts), 1, scale)
        free = None
        if scale > 1:
            free = pipe.uncond(seconds) if negative is None else pipe.encode_prompt(negative, seconds)
        steps = backend.defaults.steps if ask.steps is None else ask.steps
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

    def __init__(self, pipe: ClassToImagePipeline) -> None:
        refuse_offloaded(pipe.network, type(pipe).__name__)
        self.pipe = pipe

    @torch.no_grad()
    def problem(self, ask: Request) -> Problem:
        """Encode the labels; a reward sees their names as prompts."""
        pipe, spec = self.pipe, self.pipe.spec
        without_effect("a class-to-image pipeline", height=ask.height, width=ask.width, audio_end_in_s=ask.seconds)
        labels = [ask.prompt] if isinstance(ask.prompt, (int, str)) else list(ask.prompt)
        known = dict(enumerate(pipe.class_names))
        names = arguments.texts([known.get(x, str(x)) if isinstance(x, int) else x for x in labels], "prompt")
        scale = arguments.guidance(spec.guidance_scale if ask.guidance_scale is None else ask.guidance_scale)
        negative = arguments.negatives(ask.negative_prompt, len(names), 1, scale)
        free = None
        if scale > 1:
            free = pipe.uncond() if negative is None else pipe.encode(negative)
        return Problem(
            Guided(pipe.denoiser, scale, None),
            both_sides(pipe.encode(names), free),
            pipe.latent_shape,
            spec.steps if ask.steps is None else ask.steps,
            None,
            pipe.decode,
            names,
        )

    def at_work(self) -> AbstractContextManager[None]:
        """Freeze the network."""
        return frozen(self.pipe.network)


class ImageSearch:
    """TextToImagePipeline around our own architecture; around diffusers' pipelines it is theirs that is searched."""

    kind: Literal["image", "audio"] = "image"

    def __init__(self, pipe: TextToImagePipeline) -> None:
        refuse_offloaded(pipe.network, type(pipe).__name__)
        self.pipe = pipe

    @torch.no_grad()
    def problem(self, ask: Request) -> Problem:
        """Encode the prompts."""
        pipe, backend = self.pipe, self.pipe.backend
        without_effect("a text-to-image pipeline", audio_end_in_s=ask.seconds)
        texts = arguments.texts(ask.prompt, "prompt")
        chosen = backend.defaults.guidance_scale if ask.guidance_scale is None else ask.guidance_scale
        scale = arguments.guidance(chosen)
        negative = arguments.negatives(ask.negative_prompt, len(texts), 1, scale)
        size = backend.size(ask.height, ask.width)
        free = None
        if scale > 1:
            free = pipe.uncond() if negative is None else pipe.encode_prompt(negative)
        return Problem(
            Guided(pipe.denoiser, scale, None),
            both_sides(pipe.encode_prompt(texts), free),
            backend.latent_shape(size),
            backend.defaults.steps if ask.steps is None else ask.steps,
            None,
            pipe.decode,
            texts,
        )

    def at_work(self) -> AbstractContextManager[None]:
        """Freeze all networks."""
        return frozen(*self.pipe.modules().values())


def _text_to_image(pipe: TextToImagePipeline) -> Searchable:
    """Our own architecture, or the diffusers pipeline inside."""
    from gencontrol.pipelines.backends.foreign_images import ForeignImage

    backend = pipe.backend
    return searchable(backend.pipe) if isinstance(backend, ForeignImage) else ImageSearch(pipe)


def _foreign_audio(pipe: Any) -> AudioSearch:
    """diffusers' audio pipelines, through ours."""
    return AudioSearch(TextToAudioPipeline(pipe))


def _diffusers_image(name: str) -> Callable[[Any], Searchable]:
    """A class of `searchable_diffusers`, imported when it is asked for."""

    def build(pipe: Any) -> Searchable:
        from gencontrol.pipelines.search import diffusers as searchable_diffusers

        found: Searchable = searchable_diffusers.IMAGES[name](pipe)
        return found

    return build


#: Class name of a pipeline → its Searchable.
SEARCHABLE: Mapping[str, Callable[[Any], Searchable]] = {
    "TextToAudioPipeline": AudioSearch,
    "ClassToImagePipeline": ClassSearch,
    "TextToImagePipeline": _text_to_image,
    "StableAudioPipeline": _foreign_audio,
    "AudioLDM2Pipeline": _foreign_audio,
    "StableDiffusionPipeline": _diffusers_image("StableDiffusionPipeline"),
    "StableDiffusionXLPipeline": _diffusers_image("StableDiffusionXLPipeline"),
    "StableDiffusion3Pipeline": _diffusers_image("StableDiffusion3Pipeline"),
    "FluxPipeline": _diffusers_image("FluxPipeline"),
    "PixArtAlphaPipeline": _diffusers_image("PixArtAlphaPipeline"),
    "PixArtSigmaPipeline": _diffusers_image("PixArtSigmaPipeline"),
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
            "object with the methods of gencontrol.pipelines.search.searchable.Searchable."
        )
    return SEARCHABLE[name](pipe)
