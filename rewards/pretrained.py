"""What the rewards with a pretrained network share: device, loading with one-line errors, fingerprint, cached texts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from gencontrol.errors import UsageError
from gencontrol.files import feed

#: tokens; fewer mean that the tokenizer came up empty
SMALLEST_VOCABULARY = 32
_TEXT_CACHE = 50_000  # texts; 200 MB at 1024 numbers each


def pick_device(device: str | torch.device | None) -> str:
    """Name of the device; None takes the GPU when there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device is None else str(device)


def weights_digest(module: torch.nn.Module) -> str:
    """Eight hexadecimal digits that change with any weight: the fingerprint of a model, wherever its folder lies."""
    return str(feed(hashlib.blake2b(digest_size=4), module.state_dict()).hexdigest())


def embedding_of(output: Any) -> Tensor:
    """The embedding tensor of get_*_features: a tensor in transformers 4, an output object in 5."""
    return output if isinstance(output, Tensor) else output.pooler_output


@torch.no_grad()
def text_units(
    model: Any, tokenizer: Any, texts: Sequence[str], max_tokens: int, device: torch.device
) -> Float[Tensor, "b d"]:
    """Unit float32 embeddings of texts, cut at `max_tokens`, by the text tower of a transformers CLIP or CLAP model."""
    tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    with torch.autocast(device.type, enabled=False):
        output = model.get_text_features(
            input_ids=tokens["input_ids"].to(device), attention_mask=tokens["attention_mask"].to(device)
        )
    return F.normalize(embedding_of(output).float(), dim=-1)


def local_or_hub(source: str | Path) -> str | Path:
    """The expanded folder where it exists, else the text as it is: a hub id."""
    folder = Path(source).expanduser()
    return folder if folder.is_dir() else str(source)


def first_line(error: BaseException) -> str:
    """First line of an exception's text, at most 300 characters, or its class."""
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def load_pretrained(
    source: str | Path, kind: str, option: str, parts: Sequence[Callable[[str | Path], Any]], remedy: str = ""
) -> tuple[Any, ...]:
    """Load a transformers model of one type, and further parts that belong to it.

    Args:
        source: folder or hub id.
        kind: `model_type` that its configuration must have, e.g. "clap".
        option: how the user named the source, for messages.
        parts: functions of the source, e.g. `AutoTokenizer.from_pretrained`.
        remedy: what else may be given, for messages.

    Raises:
        UsageError: not found (or offline), another type of model, missing or unreadable weights.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type != kind:
            raise UsageError(
                f"{option} '{source}' is a '{config.model_type}' model; expected a {kind.upper()} model{remedy}."
            )
        model, report = AutoModel.from_pretrained(source, output_loading_info=True)
        loaded = [part(source) for part in parts]
    except UsageError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        where = "cannot be loaded from its folder" if Path(source).is_dir() else "is no local folder and not on the hub"
        raise UsageError(
            f"{option} '{source}' {where} ({first_line(error)}); offline, give a folder saved with save_pretrained"
            f"{remedy}."
        ) from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UsageError(f"{option} '{source}' lacks weights ({missing}, …); its file is incomplete.")
    return (model, *loaded)


def check_vocabulary(tokenizer: Any, model_size: int, source: str) -> None:
    """Raise UsageError unless the tokenizer fits the model (transformers makes an empty one of missing files)."""
    if not SMALLEST_VOCABULARY <= len(tokenizer) <= model_size:
        raise UsageError(
            f"the tokenizer of '{source}' has {len(tokenizer)} tokens, the model {model_size}; the tokenizer "
            "files are missing or belong to another model."
        )


class TextCache:
    """Unit text embeddings on the CPU, computed once per text."""

    def __init__(self, encode: Callable[[Sequence[str]], Float[Tensor, "b d"]], batch_size: int) -> None:
        """Wrap an encoder; `batch_size` texts go through it at a time."""
        self._encode, self._batch_size = encode, batch_size
        self._texts: dict[str, Tensor] = {}

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Embeddings in the order of the texts.

        Raises:
            UsageError: no text at all.
        """
        if isinstance(texts, str) or not texts:
            raise UsageError("text embeddings need a non-empty list of texts.")
        missing = list(dict.fromkeys(text for text in texts if text not in self._texts))
        if len(self._texts) + len(missing) > _TEXT_CACHE:
            self._texts.clear()
            missing = list(dict.fromkeys(texts))
        for start in range(0, len(missing), self._batch_size):
            part = missing[start : start + self._batch_size]
            self._texts.update(zip(part, self._encode(part).cpu(), strict=True))
        return torch.stack([self._texts[text] for text in texts])


def one_prompt_each(prompts: Sequence[str] | None, batch: int, name: str, what: str = "sample") -> Sequence[str]:
    """Return the prompts; raises UsageError unless there is one per sample; `what` names a sample in the message."""
    if prompts is None or isinstance(prompts, str) or len(prompts) != batch:
        given = "none" if prompts is None else str(len(prompts))
        raise UsageError(f"reward '{name}' needs one prompt per {what}: {batch} {what}s, {given} given.")
    return prompts
