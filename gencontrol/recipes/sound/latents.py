"""Cache of what flow pretraining reads: latents of clips and conditions of their captions, on disk as safetensors.

The frozen codec and text encoder run once; equal captions are encoded once.  The cache records a fingerprint of the
data and of both networks and is rebuilt when any of them changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gencontrol.files import FileLayer, feed, replacing
from gencontrol.types import Cond


@dataclass(frozen=True)
class LatentDataset:
    """Latents with captions: item i has latent i and one or more wordings, each a row of the condition tables.

    Args:
        latents: [n *d] float16 or float32.
        rows: [n, variants] int64, row of each wording in `cond` and `texts`.
        cond: mapping of tables, batch axis first; a "drop" entry is added when rows are read.
        texts: one string per row.
    """

    latents: Float[Tensor, "n *d"]
    rows: Int[Tensor, "n variants"]
    cond: dict[str, Tensor]
    texts: Sequence[str]

    def __len__(self) -> int:
        """Number of items."""
        return len(self.latents)

    @property
    def variants(self) -> int:
        """Wordings of each item."""
        return self.rows.shape[1]

    def read(self, items: Sequence[int], variants: Sequence[int]) -> tuple[Float[Tensor, "b *d"], Cond]:
        """Latents and conditions, fp32, of items with the chosen wording of each."""
        index = torch.as_tensor(items, dtype=torch.long)
        row = self.rows[index, torch.as_tensor(variants, dtype=torch.long)]
        cond = {
            key: table[row] if table.dtype is torch.bool else table[row].float() for key, table in self.cond.items()
        }
        return self.latents[index].float(), {**cond, "drop": torch.zeros(len(index), dtype=torch.bool)}

    def text(self, item: int, variant: int = 0) -> str:
        """One wording of an item."""
        return self.texts[int(self.rows[item, variant])]


def prepare_sound_latents(
    dataset_folder: str | Path,
    codec: nn.Module,
    text_encoder: nn.Module,
    tokenizer: Any,
    cache_folder: str | Path,
    split: str = "train",
    chunk: int = 64,
) -> LatentDataset:
    """Return the cached latents [n 64 64] and text conditions of a split, computing them when needed.

    Args:
        dataset_folder: made by `gencontrol.recipes.sound.data.dataset.build_sound_dataset`.
        codec: a `MelCodec` (its `encode`), frozen.
        text_encoder, tokenizer: see `gencontrol.models.conditions.text.encode_text`.
        cache_folder: where `<split>.safetensors` and `<split>.json` (captions) are kept.
        split: "train", "val" or "test".
        chunk: clips or captions in one pass.
    """
    from gencontrol.recipes.sound.data.dataset import SoundDataset

    data = SoundDataset.load(dataset_folder, split)
    target = Path(cache_folder) / f"{split}.safetensors"
    # Hash of the data recipe and of the weights of both networks.
    size = len(data)
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{split} {size} ".encode() + (Path(dataset_folder) / "recipe.json").read_bytes())
    for network in (codec, text_encoder):
        feed(digest, network.state_dict())
    print_ = digest.hexdigest()
    if _recorded(target) != print_:
        texts = sorted({text for captions in data.captions for text in captions})
        place = {text: row for row, text in enumerate(texts)}
        tensors = {
            "latents": _latents(data, codec, chunk),
            "rows": torch.tensor([[place[text] for text in captions] for captions in data.captions]),
            **{f"cond.{k}": v for k, v in _conditions(texts, text_encoder, tokenizer, chunk).items()},
        }
        _write(target, tensors, texts, print_)
    return load_latents(cache_folder, split)


def load_latents(cache_folder: str | Path, split: str) -> LatentDataset:
    """Open a cache written by `prepare_sound_latents` (memory-mapped)."""
    from safetensors.torch import load_file

    target = Path(cache_folder) / f"{split}.safetensors"
    tensors = load_file(str(target))
    texts = json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))
    cond = {key.removeprefix("cond."): value for key, value in tensors.items() if key.startswith("cond.")}
    return LatentDataset(tensors["latents"], tensors["rows"], cond, texts)


@torch.no_grad()
def _latents(data: Any, codec: nn.Module, chunk: int) -> Float[Tensor, "n *d"]:
    encode: Any = codec.encode
    parts = [range(start, min(start + chunk, len(data))) for start in range(0, len(data), chunk)]
    return torch.cat([encode(data.waveforms(part)).half() for part in parts])


def _conditions(texts: Sequence[str], text_encoder: nn.Module, tokenizer: Any, chunk: int) -> dict[str, Tensor]:
    from gencontrol.models.conditions.text import encode_text

    text_encoder.eval()
    parts = [encode_text(text_encoder, tokenizer, texts[i : i + chunk]) for i in range(0, len(texts), chunk)]
    tables = {key: torch.cat([part[key].cpu() for part in parts]) for key in ("pooled", "tokens", "mask")}
    return {key: table if table.dtype is torch.bool else table.half() for key, table in tables.items()}


def _recorded(target: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    if not (target.exists() and target.with_suffix(".json").exists()):
        return None
    try:
        with safe_open(str(target), "pt") as file:
            return (file.metadata() or {}).get("fingerprint")
    except (OSError, SafetensorError):
        return None


def _write(target: Path, tensors: dict[str, Tensor], texts: Sequence[str], fingerprint: str) -> None:
    """Write captions, then tensors, each complete before it takes its name."""
    from safetensors.torch import save_file

    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # a cut between the two renames leaves no mixed pair
    FileLayer().replace_file(target.with_suffix(".json"), json.dumps(list(texts), ensure_ascii=False).encode())
    with replacing(target) as staged:
        save_file({k: v.contiguous() for k, v in tensors.items()}, str(staged), metadata={"fingerprint": fingerprint})
