"""CLIP models behind one small surface: images and texts → unit embeddings in one space.

Two loaders: transformers' CLIPModel (a folder or hub id; the default) and the models of `open_clip_torch`, read by
that package's own loader: a folder, one of its names, or a checkpoint file with the name of its architecture.  Weights
are frozen and in eval mode; nothing is random; the gradient reaches the images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from gencontrol.errors import EnvironmentMissing, UsageError, nearest
from gencontrol.rewards.image.clip_features import RESIZES, ImagePrep, Resize
from gencontrol.rewards.pretrained import (
    TextCache,
    check_vocabulary,
    embedding_of,
    first_line,
    load_pretrained,
    local_or_hub,
    pick_device,
    text_units,
    weights_digest,
)

Precision = Literal["fp32", "bf16", "fp16"]
FitImage = Literal["auto", "crop", "squash", "pad"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FILES = (".pt", ".pth", ".bin", ".safetensors")
_OPEN_CLIP = "open_clip:"
_REMEDY = ", an open_clip folder, 'open_clip:NAME', or an open_clip checkpoint file with its architecture"


class ClipBackend(Protocol):
    """What the rewards need of a CLIP model; `logit_scale` is its factor on cosines, `width` the size of embeddings."""

    name: str
    device: torch.device
    prep: ImagePrep
    logit_scale: float
    width: int

    def images(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Unit embeddings, float32, of inputs made by `prep`, with gradient."""
        ...

    def text(self, texts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Unit embeddings, float32, of texts, without gradient."""
        ...


class TransformersClip:
    """A transformers CLIPModel with its tokenizer and the settings of its image processor."""

    def __init__(
        self, model: Any, tokenizer: Any, prep: ImagePrep, source: str, device: torch.device, precision: Precision
    ) -> None:
        """Freeze the model; `source` names it in messages.

        Raises:
            UsageError: the tokenizer does not fit the model, or the processor's size not the vision tower.
        """
        text, edge = model.config.text_config, model.config.vision_config.image_size
        check_vocabulary(tokenizer, text.vocab_size, source)
        if (prep.height, prep.width) != (edge, edge):
            raise UsageError(
                f"the image processor of '{source}' makes {prep.height}×{prep.width} pixels, its model takes "
                f"{edge}×{edge}; the files belong to different models."
            )
        self.device, self.prep = device, prep
        self.name = f"clip:{weights_digest(model)}"
        self.logit_scale = float(model.logit_scale.detach().float().exp())
        self.width = int(model.config.projection_dim)
        self._dtype = _DTYPES[precision]
        self._model = model.eval().requires_grad_(False).to(device, self._dtype)
        self._tokenizer, self._max_tokens = tokenizer, text.max_position_embeddings

    def images(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Unit embeddings."""
        with torch.autocast(self.device.type, enabled=False):
            output = self._model.get_image_features(pixel_values=pixels.to(self.device, self._dtype))
        return F.normalize(embedding_of(output).float(), dim=-1)

    def text(self, texts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Unit embeddings of texts, cut at the model's length."""
        return text_units(self._model, self._tokenizer, texts, self._max_tokens, self.device)


def load_transformers_clip(
    source: str | Path, device: torch.device, precision: Precision, processor: str | Path | None = None
) -> TransformersClip:
    """Load a CLIPModel, its tokenizer and its image settings from a folder or the hub.

    Args:
        processor: where tokenizer and image settings lie; None takes the model's own source.

    Raises:
        UsageError: not found (or offline), not a CLIP model, missing weights, or an unfit tokenizer.
    """
    from transformers import AutoTokenizer
    from transformers.image_processing_base import ImageProcessingMixin

    around = source if processor is None else local_or_hub(processor)
    parts: tuple[Callable[[Any], Any], ...] = (
        lambda _: AutoTokenizer.from_pretrained(around),
        lambda _: ImageProcessingMixin.get_image_processor_dict(str(around))[0],
    )
    model, tokenizer, settings = load_pretrained(source, "clip", "model", parts, _REMEDY)
    return TransformersClip(model, tokenizer, ImagePrep.from_mapping(settings), str(source), device, precision)


class OpenClip:
    """A model of the open_clip_torch package with its own tokenizer and settings."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device, precision: Precision) -> None:
        """Freeze a loaded model."""
        from open_clip import get_model_preprocess_cfg

        settings = get_model_preprocess_cfg(model)
        size = settings["size"]
        height, width = (size, size) if isinstance(size, int) else size
        resizes: dict[str, Resize] = {"shortest": "crop", "squash": "squash", "longest": "pad"}
        self.prep = ImagePrep(
            int(height),
            int(width),
            resize=resizes[settings["resize_mode"]],
            mean=tuple(settings["mean"]),
            std=tuple(settings["std"]),
            filter=settings["interpolation"],
        )
        self.device, self._dtype = device, _DTYPES[precision]
        self.name = f"open_clip:{weights_digest(model)}"
        self.logit_scale = float(model.logit_scale.detach().float().exp())
        self._model = model.eval().requires_grad_(False).to(device, self._dtype)
        self._tokenizer = tokenizer
        self.width = int(self.text([""]).shape[1])

    def images(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Unit embeddings."""
        with torch.autocast(self.device.type, enabled=False):
            return F.normalize(self._model.encode_image(pixels.to(self.device, self._dtype)).float(), dim=-1)

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Unit embeddings of texts."""
        with torch.autocast(self.device.type, enabled=False):
            output = self._model.encode_text(self._tokenizer(list(texts)).to(self.device))
        return F.normalize(output.float(), dim=-1)


def load_open_clip(name: str, device: torch.device, precision: Precision, weights: str | None = None) -> OpenClip:
    """Load a model by open_clip's own loader.

    Args:
        name: as open_clip knows it: "ViT-B-32", "local-dir:FOLDER" or "hf-hub:OWNER/NAME".
        weights: a checkpoint file, or the tag of a published one; None for folders and hub names.

    Raises:
        UsageError: unknown name, or a file that does not fit the architecture.
        EnvironmentMissing: open_clip_torch is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise EnvironmentMissing(
            f"'{name}' needs open_clip_torch, which is not here ({error}); pip install 'gencontrol[image]', or give "
            "the folder of a transformers CLIP model."
        ) from error
    if ":" not in name and name not in (known := open_clip.list_models()):
        raise UsageError(
            f"open_clip has no architecture '{name}'.{nearest(name, known)} open_clip.list_models() names them."
        )
    try:
        model = open_clip.create_model(name, pretrained=weights, device="cpu", require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, ValueError, OSError, KeyError, AssertionError) as error:
        given = f"'{weights}' as '{name}'" if weights else f"'{name}'"
        raise UsageError(
            f"open_clip cannot load {given}: {first_line(error)}; check the file, and that its architecture is the "
            "one it was trained with."
        ) from error
    return OpenClip(model, tokenizer, device, precision)


@lru_cache(maxsize=4)
def _load(
    model: str, device: str, precision: Precision, architecture: str | None, processor: str | None
) -> ClipBackend:
    """Load a backend once per process and settings."""
    path, where = Path(model).expanduser(), torch.device(device)
    open_clip = partial(load_open_clip, device=where, precision=precision)
    if model.startswith(_OPEN_CLIP):
        name, _, tag = model.removeprefix(_OPEN_CLIP).partition("/")
        return open_clip(f"{name}/{tag}") if ":" in name else open_clip(name, weights=tag or None)
    if model.endswith(_FILES):
        if not path.is_file():
            raise UsageError(f"model '{model}' does not exist; give the path of an open_clip checkpoint.")
        if architecture is None:
            raise UsageError(f"the checkpoint '{model}' needs architecture=NAME, e.g. 'ViT-B-32' (open_clip's names).")
        return open_clip(architecture, weights=str(path))
    if (path / "open_clip_config.json").is_file():
        return open_clip(f"local-dir:{path}")
    return load_transformers_clip(local_or_hub(model), where, precision, processor)


def clip_backend(
    model: str | Path,
    device: str | torch.device | None = None,
    precision: Precision = "fp32",
    architecture: str | None = None,
    processor: str | Path | None = None,
) -> ClipBackend:
    """Return the CLIP model of that name; rewards that name the same model share it.

    Args:
        model: a folder or hub id of a transformers CLIPModel, a folder saved for open_clip, "open_clip:NAME" or
            "open_clip:NAME/TAG", or an open_clip checkpoint file.
        device: None takes the GPU when there is one.
        precision: of weights and activations; embeddings are float32 always.
        architecture: open_clip's name of the network, for checkpoint files only.
        processor: source of tokenizer and image settings of a transformers model; None: its own.

    Raises:
        UsageError, EnvironmentMissing: as the loaders say.
    """
    if precision not in _DTYPES:
        raise UsageError(f"precision is {', '.join(_DTYPES)}, not '{precision}'.")
    source = str(model)
    if architecture is not None and not source.endswith(_FILES):
        raise UsageError(f"architecture belongs to a checkpoint file; '{source}' is none: leave it out.")
    if processor is not None and (source.endswith(_FILES) or source.startswith(_OPEN_CLIP)):
        raise UsageError(f"processor belongs to a transformers model; '{source}' is open_clip's: leave it out.")
    return _load(source, pick_device(device), precision, architecture, None if processor is None else str(processor))


class ClipEmbeddings:
    """A CLIP model ready for scoring: images in [0, 1] and texts to unit embeddings, in batches, texts cached."""

    def __init__(self, backend: ClipBackend, resize: FitImage = "auto", batch_size: int = 32) -> None:
        """Wrap a backend.

        Args:
            resize: "crop", "squash" or "pad" instead of the model's own way ("auto").
            batch_size: images or texts in one forward pass.

        Raises:
            UsageError: values out of range.
        """
        if batch_size < 1:
            raise UsageError(f"batch_size is at least 1, not {batch_size}.")
        if resize not in ("auto", *RESIZES):
            raise UsageError(f"resize is auto, {', '.join(RESIZES)}, not '{resize}'.")
        self.backend = backend
        self._prep = backend.prep
        if resize != "auto" and resize != backend.prep.resize:
            self._prep = dataclasses.replace(backend.prep, resize=resize, shortest=None)
        self._batch_size = batch_size
        #: unit text embeddings [b d] on the CPU, cached by text
        self.texts = TextCache(lambda texts: self.backend.text(texts), batch_size)

    def images(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Unit embeddings on the images' device; the graph is kept when the images require a gradient."""
        parts = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            for part in images.split(self._batch_size):
                pixels = self._prep(part.to(self.backend.device))
                parts.append(self.backend.images(pixels).to(images.device))
        return torch.cat(parts)
