"""What text-to-X pipelines have in common: a backend, conditions remembered by prompt, the sampling loop, saving.

A call is: frozen text encoders → prior noise, one stream per sample → sampler steps of the guided denoiser → frozen
decoder.  An "extent" is what a model's condition depends on beside the text: the length of a sound, the size of an
image.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError, nearest
from gencontrol.models.denoiser import Denoiser
from gencontrol.pipelines import arguments
from gencontrol.pipelines.backends.audio import PromptBackend
from gencontrol.pipelines.control import Control
from gencontrol.pipelines.hub import lora
from gencontrol.pipelines.hub.hub import LoadOptions, check_pipeline_class, download_folder
from gencontrol.pipelines.hub.lora_pipeline import LoraPipeline
from gencontrol.process import GaussianProcess
from gencontrol.types import Cond, cat_cond, cond_to, map_cond

if TYPE_CHECKING:
    from gencontrol.algorithms.online.task import PromptTask

_CACHED_PROMPTS = 1024

#: called as (pipeline, step, time reached, {"latents": …}); latents in what it returns replace the present ones
Callback = Callable[[Any, int, float, dict[str, Tensor]], Mapping[str, Tensor] | None]


class _Interrupted(Exception):
    """Raised inside the sampler's callback to leave it with the present latents."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__("interrupted")
        self.latents = latents


@dataclass(frozen=True)
class Ask:
    """The arguments of a call that decide which latents come out; None is the model's own default.

    Args:
        prompts: as the user gave them; with `repeats` samples of each.
        extent: length or size, checked.
        steps, scale, negative, generator, latents, seed, step: see the pipelines' `__call__`.
        callback: after each step.
        y, y_scale: labels and strength of a control.
    """

    prompts: str | Sequence[str]
    extent: Hashable
    repeats: int
    steps: int | None
    scale: float | None
    negative: str | Sequence[str] | None
    generator: torch.Generator | Sequence[torch.Generator] | None
    latents: Tensor | None
    seed: int | Sequence[int] | None
    step: Any | None
    callback: Callback | None
    y: Any = None
    y_scale: float = 1.0


@dataclass(frozen=True)
class _Chain:
    """What a call samples: `times` None means `steps` equal ones, `spread` is the standard deviation at the first."""

    model: Any
    cond: Cond
    times: Sequence[float] | Tensor | None
    steps: int
    step: Any
    spread: float


class PromptedPipeline(LoraPipeline):
    """Base of the text-to-X pipelines; a subclass gives its call, `decode` and where its backends come from."""

    #: what a pipeline of another kind is told that it is not
    makes: ClassVar[str]
    #: tensors that a callback may ask for and replace
    callback_tensors: ClassVar[tuple[str, ...]] = ("latents",)
    #: values of a call's `output_type`
    output_types: ClassVar[tuple[str, ...]]

    def _set_backend(self, backend: PromptBackend) -> None:
        super().__init__(backend.components, backend.network_name)
        self._backend: Any = backend
        self._prompts: OrderedDict[tuple[str, Hashable], Cond] = OrderedDict()
        self._control: Control | None = None

    # ---- loading and saving ---------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def _foreign(cls) -> Mapping[str, Callable[[Any], Any]]:
        """Class name of a diffusers pipeline → what makes a backend of it."""

    @classmethod
    @abstractmethod
    def _native(cls, index: Mapping[str, Any], folder: Path, dtype: torch.dtype) -> Any:
        """Load the backend of a folder that `save_pretrained` wrote for our own architecture."""

    def _load(self, index: Mapping[str, Any], where: str | Path, options: LoadOptions) -> None:
        from gencontrol.pipelines.backends.foreign_audio import load_foreign

        name, foreign = type(self).__name__, self._foreign()
        kind = check_pipeline_class(index, {name: None, **foreign}, where, name)
        if kind in foreign:
            self._set_backend(foreign[kind](load_foreign(kind, where, options)))
            return
        if options.variant is not None:
            raise UsageError(f"'{where}' was saved by gencontrol and has no variants; drop variant= and use dtype=.")
        folder = where if isinstance(where, Path) else download_folder(where, options)
        self._set_backend(self._native(index, folder, options.dtype))

    def _wrap(self, pipe: Any) -> PromptBackend:
        """The backend of a loaded diffusers pipeline.

        Raises:
            UsageError: a pipeline of another class.
        """
        name, foreign = type(pipe).__name__, self._foreign()
        if name not in foreign or not type(pipe).__module__.startswith("diffusers."):
            raise UsageError(f"a {name} is no {self.makes} pipeline; give a diffusers {' or '.join(foreign)}.")
        backend: PromptBackend = foreign[name](pipe)
        return backend

    def _share(self, pipeline: Any) -> None:
        if not isinstance(pipeline, type(self)):
            self._set_backend(self._wrap(pipeline))
            return
        if pipeline._hooks:
            raise UsageError("the pipeline is offloaded; call its remove_all_hooks() before sharing its components.")
        self._set_backend(pipeline._backend)

    def _rebuild(self, components: Mapping[str, Any]) -> None:
        if self._control is not None:
            raise UsageError("a control is loaded on this pipeline's network; call unload_control() first.")
        self._set_backend(self._backend.replace(components))

    def _save(self, folder: Path) -> None:
        plain = lora.uncompiled(self.network) is self.network and not lora.has_adapters(self.network)
        self._backend.save(folder, None if plain else lambda: lora.merged_state(self.network))

    def save_final(self, folder: Path) -> None:
        """Write what `from_pretrained` needs with the present weights, and active adapters as LoRA files in lora/."""
        self.save_pretrained(folder)
        active = self.get_active_adapters()
        for name in active:
            self.save_lora_weights(Path(folder) / "lora" / name if len(active) > 1 else Path(folder) / "lora", name)

    # ---- the parts ------------------------------------------------------------------------------------------------

    @property
    def denoiser(self) -> Denoiser:
        """Network, process and prediction; its network is the very component that training changes."""
        found: Denoiser = self._backend.denoiser
        return found

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent of the default extent, without the batch axis."""
        shape: tuple[int, ...] = self._backend.latent_shape(None)
        return shape

    def _offload_order(self) -> list[torch.nn.Module]:
        order: list[torch.nn.Module] = self._backend.offload_order()
        return order

    def _moved(self) -> None:
        self._prompts.clear()
        if self._control is not None:
            self._control.to(self.device)

    # ---- a control ------------------------------------------------------------------------------------------------

    def load_control(self, folder: str | Path, *, force: bool = False) -> None:
        """Load a control that `ctrl` or `cfg-finetune` trained on this model; calls with y= use it then.

        Without y the pipeline stays what it was, bit by bit.  A control that was loaded before is replaced.

        Args:
            folder: control/ of a run's final/, final/ itself, or the run.
            force: allow num_inference_steps other than the trained ones, with which the control's law is not exact.

        Raises:
            UsageError: no control there, one of another model or schedule, or the network carries LoRA adapters.
        """
        self.unload_control()
        control = Control(self.denoiser, folder, force=force)
        control.to(self.device)
        self._control = control

    def unload_control(self) -> None:
        """Remove the control, if there is one."""
        if self._control is not None:
            self._control.remove()
        self._control = None

    @property
    def control_labels(self) -> Mapping[str, tuple[str, ...]]:
        """Attribute → labels of the loaded control; empty without one, or for a control by numbers."""
        return {} if self._control is None else dict(self._control.attributes)

    def enable_gradient_checkpointing(self) -> Self:
        """Keep no activations inside the network's blocks: the backward pass computes them again. Returns the pipeline.

        Raises:
            UsageError: this network cannot.
        """
        self._backend.enable_gradient_checkpointing()
        return self

    @torch.no_grad()  # not inference_mode: training saves these tensors for its backward pass
    def _conditions(self, prompts: str | Sequence[str], extent: Hashable) -> Cond:
        """Condition of prompts, each encoded alone and remembered; see the subclasses' `encode_prompt`."""
        texts = arguments.texts(prompts, "prompt")
        for text in dict.fromkeys(texts):
            key = (text, extent)
            if key not in self._prompts:
                cond = self._backend.encode([text], extent, self.device)
                self._prompts[key] = map_cond(lambda leaf: leaf.detach().to(self.device), cond)
        result = cat_cond([self._prompts[text, extent] for text in texts])
        while len(self._prompts) > _CACHED_PROMPTS:
            self._prompts.popitem(last=False)
        return result

    @torch.no_grad()
    def _free(self, extent: Hashable) -> Cond:
        """Condition of batch 1 that stands for "no prompt" in classifier-free guidance."""
        return cond_to(self._backend.uncond(extent, self.device), self.device)

    @abstractmethod
    def _task_parts(self) -> dict[str, Any]:
        """What a `PromptTask` has of this medium alone."""

    def task(self, prompts: Sequence[str], eval_prompts: Sequence[str]) -> PromptTask:
        """Return what a fine-tuning algorithm needs of this pipeline, for training and held-out prompts.

        Samples have the model's own extent; the text of each prompt is encoded once.  The task's `uncond` is None for
        FLUX: its guidance scale is an input, at its default (3.5) in the conditions, and algorithms take 1.

        Raises:
            UsageError: an empty list, or something that is not text.
        """
        from gencontrol.algorithms.online.task import PromptTask

        pipe: Any = self  # `encode_prompt`, `uncond`, `decode` and `artefacts` have their medium's own signatures
        return PromptTask(
            denoiser=self.denoiser,
            latent_shape=self.latent_shape,
            encode=pipe.encode_prompt,
            uncond=pipe.uncond(),
            decode=pipe.decode,
            prompts=arguments.texts(prompts, "prompts"),
            eval_prompts=arguments.texts(eval_prompts, "eval_prompts"),
            artefacts=pipe.artefacts,
            save_final=self.save_final,
            **self._task_parts(),
        )

    # ---- the call -------------------------------------------------------------------------------------------------

    def _check_output(self, output_type: str, tensors: Sequence[str]) -> None:
        kinds = self.output_types
        if output_type not in kinds:
            raise UsageError(f"output_type is '{output_type}'.{nearest(output_type, kinds)} Known: {', '.join(kinds)}.")
        for name in tensors:
            if name not in self.callback_tensors:
                raise UsageError(
                    f"callback_on_step_end_tensor_inputs names '{name}'.{nearest(name, self.callback_tensors)} "
                    f"A callback can have: {', '.join(self.callback_tensors)}."
                )

    def _condition_of(self, texts: Sequence[str], extent: Hashable, scale: float) -> Cond:
        """The condition of a call; a model whose guidance scale is an input of the network puts it in here."""
        return self._conditions(texts, extent)

    def _guided(self, scale: float, negative: list[str] | None, extent: Hashable) -> Any:
        """The model with classifier-free guidance, or as it is at a scale of 1 or below."""
        if scale <= 1.0:
            return self.denoiser
        from gencontrol.sampling.guidance import cfg

        uncond = self._free(extent) if negative is None else self._conditions(negative, extent)
        return cfg(self.denoiser, scale, uncond)

    def _generate(self, ask: Ask) -> Float[Tensor, "b *d"]:
        """Check the arguments and sample clean latents; sample i·repeats + j is the j-th of prompt i."""
        prompts = arguments.texts(ask.prompts, "prompt")
        texts = [text for text in prompts for _ in range(ask.repeats)]
        control = self._asked(ask)
        chain = self._plain_chain(ask, texts) if control is None else self._controlled_chain(ask, texts, control)
        generators = arguments.sources(ask.generator, ask.seed, len(texts))
        shape = (len(texts), *self._backend.latent_shape(ask.extent))
        noise = arguments.noise(ask.latents, shape, generators, self.device)
        if control is None:
            return self._sample(chain, noise, generators, ask.callback)
        control.check_shape(shape[1:])
        with control.acting():
            return self._sample(chain, noise, generators, ask.callback)

    def _asked(self, ask: Ask) -> Control | None:
        """The control, if the call has labels.

        Raises:
            UsageError: labels without a control, or a strength without labels.
        """
        if ask.y is None:
            if ask.y_scale != 1.0:
                raise UsageError(f"y_scale {ask.y_scale:g} has no effect without y; give labels, or leave it out.")
            return None
        if self._control is None:
            raise UsageError("y is given, but no control is loaded; call load_control(FOLDER) first.")
        return self._control

    def _plain_chain(self, ask: Ask, texts: list[str]) -> _Chain:
        """The model's own chain, with classifier-free guidance."""
        defaults = self._backend.defaults
        steps = arguments.positive(defaults.steps if ask.steps is None else ask.steps, "num_inference_steps")
        scale = arguments.guidance(defaults.guidance_scale if ask.scale is None else ask.scale)
        negative = arguments.negatives(ask.negative, len(texts) // ask.repeats, ask.repeats, scale)
        model = self._guided(scale, negative, ask.extent)
        cond = self._condition_of(texts, ask.extent, scale)
        times = self._backend.times(steps, ask.extent)
        return _Chain(model, cond, times, steps, ask.step or defaults.step, self._spread(times))

    def _controlled_chain(self, ask: Ask, texts: list[str], control: Control) -> _Chain:
        """The chain that the control was trained on; guidance is the trained one unless a scale is given.

        Raises:
            UsageError: a sampler step, or labels that the control does not have.
        """
        if ask.step is not None:
            raise UsageError("step has no place beside y: a control has the sampler that it was trained with.")
        count = len(texts) // ask.repeats
        labels = control.labels(ask.y, count, ask.repeats).to(self.device)
        times = control.times(None if ask.steps is None else arguments.positive(ask.steps, "num_inference_steps"))
        scale = None if ask.scale is None else max(1.0, arguments.guidance(ask.scale))
        if self._embeds_scale:
            embedded = self._backend.defaults.guidance_scale if ask.scale is None else ask.scale
            cond, scale, uncond = self._condition_of(texts, ask.extent, embedded), None, None
        else:
            wanted = control.plan.guidance_scale if scale is None else scale
            negative = arguments.negatives(ask.negative, count, ask.repeats, wanted)
            cond = self._conditions(texts, ask.extent)
            uncond = self._free(ask.extent) if negative is None else self._conditions(negative, ask.extent)
        model = control.model(scale, ask.y_scale, uncond)
        own = self._backend.times(len(times) - 1, ask.extent)
        return _Chain(
            model,
            control.join(cond, labels),
            times,
            len(times) - 1,
            control.step(),
            self._spread(None if own is None else times),
        )

    @property
    def _embeds_scale(self) -> bool:
        """Whether guidance is an input of the network."""
        return False

    def _spread(self, times: Sequence[float] | Tensor | None) -> float:
        """Standard deviation at the first time: of pure noise, or, on a grid that may start at t < 1, of noise and
        unit-variance data."""
        process = self.denoiser.process
        assert isinstance(process, GaussianProcess)  # ProcessSpec and the adapters make no other
        start = process.schedule.at(1.0 if times is None else float(times[0]))
        return start.s if times is None else math.sqrt(start.a**2 + start.s**2)

    def _sample(
        self, chain: _Chain, noise: Float[Tensor, "b *d"], generators: arguments.Generators, callback: Callback | None
    ) -> Float[Tensor, "b *d"]:
        """Run the sampler from unit noise to clean latents, with progress, callback and interruption."""
        from gencontrol.sampling import sample

        self._interrupt = False
        times = chain.times
        count = chain.steps if times is None else len(times) - 1
        with self.progress_bar(total=count) as bar:

            def after(index: int, t: float, x: Tensor) -> Tensor | None:
                bar.update()
                return None if callback is None else self._call_back(callback, index, t, x)

            try:
                return sample(
                    chain.model,
                    noise.shape,
                    steps=count,
                    step=chain.step,
                    generator=generators,
                    cond=chain.cond,
                    callback=after,
                    x_init=chain.spread * noise,
                    times="uniform" if times is None else times,
                )
            except _Interrupted as stop:
                return stop.latents

    def _call_back(self, callback: Callback, index: int, t: float, x: Tensor) -> Tensor:
        """Give the user's callback its tensors, take the latents it returns, leave the loop if it asks for it."""
        returned = callback(self, index, float(t), {"latents": x}) or {}
        for name in returned:
            if name not in self.callback_tensors:
                raise UsageError(f"the callback returned '{name}'; it can return {', '.join(self.callback_tensors)}.")
        latents = returned.get("latents", x)
        if latents.shape != x.shape:
            raise UsageError(f"the callback returned latents {tuple(latents.shape)}; expected {tuple(x.shape)}.")
        if self._interrupt:
            raise _Interrupted(latents)
        return latents
