"""What a text-to-audio pipeline needs of a model, whoever made it; and the bundled architecture's answer."""

from __future__ import annotations

import dataclasses
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol._compat import quiet
from gencontrol.errors import UsageError, nearest
from gencontrol.models.denoiser import Denoiser
from gencontrol.pipelines.hub.hub import INDEX, check_component, own_memory
from gencontrol.pipelines.hub.lora import uncompiled
from gencontrol.types import Cond, Prediction

PROCESS_FILE = "process.json"


@dataclass(frozen=True)
class Defaults:
    """What a call uses for the arguments that are not given."""

    step: str
    steps: int
    guidance_scale: float


class PromptBackend(Protocol):
    """A text-to-X model taken apart: frozen conditioning, denoiser, frozen decoding.

    `extent` is the length of a sound in seconds, or the (height, width) of an image in pixels; None is the model's own.
    """

    components: dict[str, Any]
    network_name: str
    denoiser: Denoiser
    defaults: Defaults

    def latent_shape(self, extent: Any) -> tuple[int, ...]:
        """Shape of one latent."""
        ...

    def encode(self, prompts: Sequence[str], extent: Any, device: torch.device) -> Cond:
        """Condition of prompts, batch axis first, computed on a device."""
        ...

    def uncond(self, extent: Any, device: torch.device) -> Cond:
        """Condition of batch 1 for guidance without a negative prompt, shaped as `encode`'s."""
        ...

    def offload_order(self) -> list[torch.nn.Module]:
        """Modules whose `forward` runs, in the order in which they do; under offloading all others stay resident."""
        ...

    def decode(self, latents: Float[Tensor, "b *d"]) -> Tensor:
        """Samples of latents: waveforms [b n] or [b c n], not cropped, or images [b c h w] in [0, 1]."""
        ...

    def replace(self, components: Mapping[str, Any]) -> PromptBackend:
        """The same kind of backend around other components."""
        ...

    def times(self, steps: int, extent: Any = None) -> Float[Tensor, " k"] | None:
        """Sampler times from noise to data, steps + 1 of them, or None for the sampler's own."""
        ...

    def enable_gradient_checkpointing(self) -> None:
        """Compute the activations inside the network's blocks again in the backward pass instead of keeping them."""
        ...

    def save(self, folder: Path, weights: Callable[[], dict[str, Tensor]] | None) -> None:
        """Write all components; `weights` gives the network's state where it cannot be saved as it is."""
        ...


class AudioBackend(PromptBackend, Protocol):
    """A text-to-audio model taken apart."""

    sampling_rate: int
    max_seconds: float


@dataclass(frozen=True)
class ProcessSpec:
    """Contents of `process.json`: how the network's output is to be read, and defaults for sampling.

    Args:
        schedule: "linear", "cosine", "vp" or "edm".
        parameters: of the schedule.
        prediction: name of a `gencontrol.types.Prediction`.
        sigma_data: standard deviation of the data, for EDM outputs.
        step, steps, guidance_scale: of a call that does not give them.
    """

    schedule: str = "linear"
    parameters: Mapping[str, float] = field(default_factory=dict)
    prediction: str = "velocity"
    sigma_data: float = 1.0
    step: str = "euler"
    steps: int = 32
    guidance_scale: float = 3.0

    @classmethod
    def read(cls, folder: Path) -> ProcessSpec:
        """Read `process.json` of a pipeline folder.

        Raises:
            UsageError: it is missing, not JSON, or holds an unknown key.
        """
        path = folder / PROCESS_FILE
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"'{path}' cannot be read ({error}); save or download the pipeline again.") from error
        known = {f.name for f in dataclasses.fields(cls)}
        for key in table:
            if key not in known:
                raise UsageError(
                    f"'{path}': unknown key '{key}'.{nearest(key, known)} Keys: {', '.join(sorted(known))}."
                )
        return cls(**table)

    def write(self, folder: Path) -> None:
        """Write `process.json` into a pipeline folder."""
        (folder / PROCESS_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    def denoiser(self, network: torch.nn.Module) -> Denoiser:
        """Wrap a network in the process and prediction that it was trained with.

        Raises:
            UsageError: an unknown schedule or prediction, or parameters the schedule does not take.
        """
        from gencontrol import process

        schedules: dict[str, Callable[..., Any]] = {
            "linear": process.Linear,
            "cosine": process.Cosine,
            "vp": process.VP,
            "edm": process.Edm,
        }
        name = self.schedule.lower()
        if name not in schedules:
            raise UsageError(
                f"{PROCESS_FILE}: unknown schedule '{self.schedule}'.{nearest(name, schedules)} "
                f"Known: {', '.join(schedules)}."
            )
        try:
            law = process.GaussianProcess(schedules[name](**self.parameters))
            prediction = Prediction(self.prediction)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"{PROCESS_FILE}: {error}; expected e.g. schedule 'linear', prediction 'velocity'."
            ) from error
        return Denoiser(network, law, prediction, sigma_data=self.sigma_data)


#: class names that a tokenizer of ours may have in an index; all are loaded by AutoTokenizer
TOKENIZERS = (
    "AutoTokenizer",
    "RobertaTokenizer",
    "RobertaTokenizerFast",
    "CLIPTokenizer",
    "CLIPTokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
)


def load_text(folder: Path, kind: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load text_encoder/ (a class of transformers, by a name from a list of ours) and tokenizer/.

    Raises:
        UsageError: they are missing or damaged, or do not fit.
    """
    import transformers

    try:
        with quiet():
            text_encoder = getattr(transformers, kind).from_pretrained(
                folder / "text_encoder", dtype=dtype, use_safetensors=True, local_files_only=True
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"'{folder}': text_encoder or tokenizer cannot be loaded ({error}); copy it again.") from error
    if len(tokenizer) > text_encoder.config.vocab_size or len(tokenizer) < 16:
        raise UsageError(
            f"'{folder}': the tokenizer has {len(tokenizer)} tokens, the text encoder "
            f"{text_encoder.config.vocab_size}; its files are damaged or of another model."
        )
    return text_encoder, tokenizer


class NativeText(ABC):
    """What our own architectures share: a small text encoder of transformers, and a network that takes its states."""

    network_name = "transformer"
    #: class name of the pipeline, component → class names that its index may hold, and those that are ours
    pipeline_name: ClassVar[str]
    allowed: ClassVar[Mapping[str, tuple[str, ...]]]
    libraries: ClassVar[Mapping[str, str]]

    def __init__(self, components: Mapping[str, Any], spec: ProcessSpec) -> None:
        """Freeze all components but the network."""
        self.components = dict(components)
        for name, part in self.components.items():
            if isinstance(part, torch.nn.Module) and name != self.network_name:
                part.requires_grad_(False).eval()
        self.spec = spec
        self.denoiser = spec.denoiser(self.components[self.network_name])
        self.defaults = Defaults(spec.step, spec.steps, spec.guidance_scale)

    @abstractmethod
    def _empty(self) -> torch.nn.Module:
        """A network like this one whose weights have no memory yet."""

    def replace(self, components: Mapping[str, Any]) -> Self:
        """The same process around other components."""
        return type(self)(**components, spec=self.spec)

    def save(self, folder: Path, weights: Callable[[], dict[str, Tensor]] | None) -> None:
        """Write each component into its folder, `process.json`, and the index last."""
        parts = dict(self.components)
        if weights is not None:
            with torch.device("meta"):
                parts[self.network_name] = self._empty()
            parts[self.network_name].load_state_dict(weights(), assign=True)
        with quiet():
            for name, part in parts.items():
                part.save_pretrained(folder / name)
        self.spec.write(folder)
        index = {name: (self.libraries.get(name, "transformers"), kinds[0]) for name, kinds in self.allowed.items()}
        write_index(folder, self.pipeline_name, index)

    def encode(self, prompts: Sequence[str], extent: Any, device: torch.device) -> Cond:
        """Condition {"pooled", "tokens", "mask", "drop"} of prompts."""
        from gencontrol.models.conditions.text import MAX_TEXT_TOKENS, encode_text

        tokenizer = self.components["tokenizer"]
        for prompt, ids in zip(prompts, tokenizer(list(prompts), verbose=False)["input_ids"]):
            if len(ids) > MAX_TEXT_TOKENS:
                warnings.warn(
                    f"only the first {MAX_TEXT_TOKENS} of {len(ids)} tokens are used: '{prompt}'", stacklevel=2
                )
        return encode_text(self.components["text_encoder"], tokenizer, prompts)

    def uncond(self, extent: Any, device: torch.device) -> Cond:
        """The network's learned null condition, in the shape of `encode`'s."""
        from gencontrol.models.conditions.text import null_text

        return null_text(self.encode([""], extent, device))

    def offload_order(self) -> list[torch.nn.Module]:
        """Text encoder, transformer; what decodes is small."""
        return [self.components["text_encoder"], self.components["transformer"]]

    def times(self, steps: int, extent: Any = None) -> None:
        """The sampler's own grid."""
        return None

    def enable_gradient_checkpointing(self) -> None:
        """Checkpoint the transformer's blocks."""
        uncompiled(self.components["transformer"]).enable_gradient_checkpointing()


class NativeAudio(NativeText):
    """Our own architecture: CLAP text encoder, `Transformer`, `MelCodec`; mono, of one fixed length."""

    pipeline_name = "TextToAudioPipeline"
    allowed = {
        "transformer": ("Transformer",),
        "text_encoder": ("ClapTextModelWithProjection",),
        "tokenizer": TOKENIZERS,
        "codec": ("MelCodec",),
    }
    libraries = {"transformer": "gencontrol", "codec": "gencontrol"}

    def __init__(self, transformer: Any, text_encoder: Any, tokenizer: Any, codec: Any, spec: ProcessSpec) -> None:
        """Assemble from loaded components; the text encoder and the codec are frozen."""
        tokens, channels = codec.latent_shape
        if (transformer.config.in_dim, transformer.config.out_dim) != (channels, channels):
            raise UsageError(
                f"the transformer has {transformer.config.in_dim} channels in and {transformer.config.out_dim} out, "
                f"the codec's latents have {channels}; take both from one pipeline."
            )
        if transformer.config.max_tokens < tokens:
            raise UsageError(
                f"the transformer takes at most {transformer.config.max_tokens} tokens, the codec's latents have "
                f"{tokens}; take both from one pipeline."
            )
        parts = {"transformer": transformer, "text_encoder": text_encoder, "tokenizer": tokenizer, "codec": codec}
        super().__init__(parts, spec)
        self.sampling_rate = int(codec.sampling_rate)
        self.max_seconds = codec.config.clip_samples / codec.sampling_rate

    @classmethod
    def load(cls, index: Mapping[str, Any], folder: Path, dtype: torch.dtype) -> NativeAudio:
        """Load a folder that `save` wrote.

        Raises:
            UsageError: a component is missing, of a class that is not on the list, or does not fit.
        """
        from gencontrol.models.networks.codec import MelCodec
        from gencontrol.models.networks.transformer import Transformer

        for name in cls.allowed:
            check_component(index, name, cls.allowed, folder)
        text_encoder, tokenizer = load_text(folder, "ClapTextModelWithProjection", dtype)
        transformer = Transformer.from_pretrained(folder / "transformer").to(dtype).eval()
        codec = MelCodec.from_pretrained(folder / "codec")
        for module in (text_encoder, transformer, codec):
            own_memory(module)
        return cls(transformer, text_encoder, tokenizer, codec, ProcessSpec.read(folder))

    def latent_shape(self, seconds: float | None) -> tuple[int, ...]:
        """Shape [tokens channels] of one latent; the length is fixed, so shorter sounds are cropped."""
        return tuple(self.components["codec"].latent_shape)

    def decode(self, latents: Float[Tensor, "b tokens channels"]) -> Float[Tensor, "b n"]:
        """Waveforms of latents."""
        return self.components["codec"].decode(latents)

    def _empty(self) -> torch.nn.Module:
        from gencontrol.models.networks.transformer import Transformer

        return Transformer(self.components["transformer"].config)


def write_index(folder: Path, class_name: str, components: Mapping[str, Sequence[str]]) -> None:
    """Write `model_index.json`, the file that makes a folder a pipeline."""
    from gencontrol._version import __version__

    index = {"_class_name": class_name, "_gencontrol_version": __version__, **components}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
