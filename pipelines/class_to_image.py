"""Class label to image: our patch transformer behind diffusers' interface, with the classifier that judges it.

A call is: labels → prior noise, one stream per image → sampler steps of the (guided) denoiser → pixels in [0, 1].  The
model works on pixels; "latents" are images in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.data.images import png_grid, to_pil
from gencontrol.errors import UsageError, nearest
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.networks.image_transformer import PatchTransformer
from gencontrol.models.readers.image_classifier import ImageClassifier
from gencontrol.pipelines import arguments
from gencontrol.pipelines.backends.audio import ProcessSpec, write_index
from gencontrol.pipelines.base import Pipeline
from gencontrol.pipelines.hub.hub import LoadOptions, check_component, check_pipeline_class, download_folder, own_memory
from gencontrol.pipelines.outputs import ImagePipelineOutput
from gencontrol.process import GaussianProcess
from gencontrol.types import Cond

Label = int | str | None

_PARTS: Mapping[str, tuple[str, ...]] = {"transformer": ("PatchTransformer",), "classifier": ("ImageClassifier",)}


class ClassToImagePipeline(Pipeline):
    """Generate small images of a class; `from_pretrained("bundled-digits")` loads the digits of this package."""

    bundled: ClassVar[str] = "digits"
    fixed_precision: ClassVar[frozenset[str]] = frozenset({"classifier"})

    def __init__(
        self, *, transformer: PatchTransformer, classifier: ImageClassifier, process: ProcessSpec | None = None
    ) -> None:
        """Assemble from loaded components; the classifier, whose class names are the labels, is frozen.

        Raises:
            UsageError: the two are made for other images or another number of classes.
        """
        ours = (transformer.config.channels, transformer.config.size, transformer.classes)
        theirs = (classifier.config.channels, classifier.config.size, len(classifier.config.classes))
        if ours != theirs:
            raise UsageError(f"transformer and classifier have (channels, size, classes) {ours} and {theirs}.")
        super().__init__({"transformer": transformer, "classifier": classifier}, "transformer")
        classifier.requires_grad_(False).eval()
        self.spec = process if process is not None else ProcessSpec()
        self._denoiser = self.spec.denoiser(transformer)

    # ---- loading and saving ---------------------------------------------------------------------------------------

    def _load(self, index: Mapping[str, Any], where: str | Path, options: LoadOptions) -> None:
        name = type(self).__name__
        check_pipeline_class(index, {name: None}, where, name)
        if options.variant is not None:
            raise UsageError(f"'{where}' was saved by gencontrol and has no variants; drop variant= and use dtype=.")
        folder = where if isinstance(where, Path) else download_folder(where, options)
        for part in _PARTS:
            check_component(index, part, _PARTS, folder)
        transformer = PatchTransformer.from_pretrained(folder / "transformer", options.dtype).eval()
        own_memory(transformer)
        classifier = ImageClassifier.from_pretrained(folder / "classifier")
        parts: dict[str, Any] = {"transformer": transformer, "classifier": classifier}
        ClassToImagePipeline.__init__(self, **parts, process=ProcessSpec.read(folder))

    def _share(self, pipeline: Any) -> None:
        if not isinstance(pipeline, ClassToImagePipeline):
            raise UsageError(f"a {type(pipeline).__name__} makes no images of classes; give a ClassToImagePipeline.")
        ClassToImagePipeline.__init__(self, **pipeline.components, process=pipeline.spec)

    def _rebuild(self, components: Mapping[str, Any]) -> None:
        parts: dict[str, Any] = dict(components)
        ClassToImagePipeline.__init__(self, **parts, process=self.spec)

    def _save(self, folder: Path) -> None:
        for name in _PARTS:
            self._components[name].save_pretrained(folder / name)
        self.spec.write(folder)
        write_index(folder, "ClassToImagePipeline", {name: ("gencontrol", kinds[0]) for name, kinds in _PARTS.items()})

    def _offload_order(self) -> list[torch.nn.Module]:
        return [self.network]

    def _moved(self) -> None:
        pass  # no condition is cached

    # ---- the parts ------------------------------------------------------------------------------------------------

    @property
    def denoiser(self) -> Denoiser:
        """Network, process and prediction; called with `cond=None` it is the unconditional model."""
        return self._denoiser

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, …; `encode` takes either."""
        names: tuple[str, ...] = self._components["classifier"].config.classes
        return names

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one sample of the denoiser, without the batch axis: [c s s]."""
        config = self._components["transformer"].config
        return (config.channels, config.size, config.size)

    def encode(self, labels: Label | Sequence[Label]) -> dict[str, Tensor]:
        """Return the condition of labels, batch axis first, on the pipeline's device.

        Args:
            labels: numbers, class names, or None or "" for no condition; one or several.

        Raises:
            UsageError: a label that the model does not have, or an empty list.
        """
        several = [labels] if labels is None or isinstance(labels, (int, str)) else list(labels)
        if not several:
            raise UsageError("class labels are an empty list; give a label or a list of labels.")
        places = [self._place(label) for label in several]
        index = torch.tensor([0 if place is None else place for place in places], device=self.device)
        drop = torch.tensor([place is None for place in places], device=self.device)
        pooled = torch.nn.functional.one_hot(index, len(self.class_names)).to(self.device, torch.float32)
        return {"pooled": torch.where(drop[:, None], 0.0, pooled), "drop": drop}

    #: a label's name is its prompt: the method under the name that the text pipelines have
    encode_prompt = encode

    def _place(self, label: Label) -> int | None:
        """Number of a label; None for no condition."""
        names = self.class_names
        if label is None or label == "":
            return None
        if isinstance(label, str) and label.strip() in names:
            return names.index(label.strip())
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
            return label
        hint = nearest(label, names) if isinstance(label, str) else ""
        raise UsageError(
            f"class label {label!r} is unknown.{hint} Give a number from 0 to {len(names) - 1}, a name "
            f"({', '.join(names)}), or None for no condition."
        )

    def uncond(self) -> Cond:
        """Return the condition of batch 1 that stands for "no label" in classifier-free guidance."""
        return self.encode(None)

    def decode(self, x0: Float[Tensor, "b c s s"]) -> Float[Tensor, "b c s s"]:
        """Return the images in [0, 1] of clean samples, float32; differentiable where nothing is clipped."""
        return ((x0.float() + 1.0) / 2.0).clamp(0.0, 1.0)

    def artefacts(self, stem: str, sample: Float[Tensor, "c s s"]) -> dict[str, bytes]:
        """Return {"<stem>.png": …} of one image in [0, 1], enlarged."""
        return {f"{stem}.png": png_grid(sample[None], columns=1, zoom=16)}

    # ---- the call -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] = None,
        num_images_per_label: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Float[Tensor, "b c s s"] | None = None,
        output_type: Literal["pil", "pt", "np", "latent"] = "pil",
        *,
        return_dict: bool = True,
        seed: int | Sequence[int] | None = None,
        step: Any | None = None,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Generate images; image i·num_images_per_label + j is the j-th of label i.

        Args:
            class_labels: numbers, names, or None or "" for the unconditional model; one or several.
            num_images_per_label: images per label.
            num_inference_steps: sampler steps; the model's own default if not given.
            guidance_scale: weight of classifier-free guidance; at 1 or below there is none, and none is possible for
                images without a label.
            generator: one source of noise, or one for each image.
            latents: standard normal noise to start from, [b *latent_shape], instead of a draw.
            output_type: "pil" images, "pt" tensor [b c s s], "np" array [b s s c], or "latent" (samples in [-1, 1]).
            return_dict: False returns the tuple (images,).
            seed: instead of a generator; an int gives image i the stream (seed, i), a list gives each its own.
            step: name of a sampler step, or a Step, of `gencontrol.sampling`; the model's own default if not given.

        Raises:
            UsageError: an argument out of its range or against another one; the message says what to give.
        """
        kinds = ("pil", "pt", "np", "latent")
        if output_type not in kinds:
            raise UsageError(f"output_type is '{output_type}'.{nearest(output_type, kinds)} Known: {', '.join(kinds)}.")
        repeats = arguments.positive(num_images_per_label, "num_images_per_label")
        steps = self.spec.steps if num_inference_steps is None else num_inference_steps
        steps = arguments.positive(steps, "num_inference_steps")
        scale = arguments.guidance(self.spec.guidance_scale if guidance_scale is None else guidance_scale)
        cond = {key: value.repeat_interleave(repeats, 0) for key, value in self.encode(class_labels).items()}
        count = len(cond["drop"])
        generators = arguments.sources(generator, seed, count)
        noise = arguments.noise(latents, (count, *self.latent_shape), generators, self.device)
        samples = self._sample(noise, cond, scale, steps, step, generators)
        self.maybe_free_model_hooks()
        output = ImagePipelineOutput(self._as(samples, output_type))
        return output if return_dict else output.to_tuple()

    def _sample(
        self,
        noise: Float[Tensor, "b c s s"],
        cond: Mapping[str, Tensor],
        scale: float,
        steps: int,
        step: Any,
        generators: arguments.Generators,
    ) -> Float[Tensor, "b c s s"]:
        """Run the sampler from unit noise to clean samples, with progress."""
        from gencontrol.sampling import sample
        from gencontrol.sampling.guidance import cfg

        process = self.denoiser.process
        assert isinstance(process, GaussianProcess)  # ProcessSpec makes no other
        guided = scale > 1.0 and not bool(cond["drop"].all())
        with self.progress_bar(total=steps) as bar:

            def after(index: int, t: float, x: Tensor) -> None:
                bar.update()

            return sample(
                cfg(self.denoiser, scale, self.uncond()) if guided else self.denoiser,
                noise.shape,
                steps=steps,
                step=step or self.spec.step,
                generator=generators,
                cond=cond,
                callback=after,
                x_init=process.schedule.at(1.0).s * noise,
            )

    def _as(self, samples: Float[Tensor, "b c s s"], output_type: str) -> Any:
        if output_type == "latent":
            return samples
        images = self.decode(samples)
        if output_type == "pt":
            return images
        return [to_pil(image) for image in images] if output_type == "pil" else images.permute(0, 2, 3, 1).cpu().numpy()
