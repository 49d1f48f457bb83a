"""Text → condition of the bundled backbone: a CLAP- or CLIP-like text encoder's pooled embedding and token states.

Pretraining caches what this returns and the pipeline calls it at sampling time, so the two agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn import functional

#: Longest caption in tokens; longer ones are cut, shorter ones padded and masked.
MAX_TEXT_TOKENS = 32


@torch.no_grad()
def encode_text(text_encoder: Any, tokenizer: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return {"pooled" [b p], "tokens" [b 32 c], "mask" [b 32] bool, "drop" [b] bool (False)} of prompts, fp32.

    Args:
        text_encoder: transformers' ClapTextModelWithProjection or CLIPTextModelWithProjection, in evaluation mode.
        tokenizer: its tokenizer.
        prompts: texts; the pooled embedding is scaled to unit root mean square.
    """
    device = next(text_encoder.parameters()).device
    batch = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=MAX_TEXT_TOKENS, return_tensors="pt"
    ).to(device)
    return text_states(text_encoder, batch["input_ids"], batch["attention_mask"])


def text_states(text_encoder: Any, ids: Int64[Tensor, "b m"], mask: Tensor) -> dict[str, Tensor]:
    """Return what `encode_text` returns, of token ids and their mask [b m], with gradients where they are enabled."""
    out = text_encoder(input_ids=ids, attention_mask=mask)
    pooled = out.text_embeds.float()
    return {
        "pooled": functional.normalize(pooled, dim=-1) * pooled.shape[-1] ** 0.5,
        "tokens": out.last_hidden_state.float(),
        "mask": mask.bool(),
        "drop": torch.zeros(len(ids), dtype=torch.bool, device=ids.device),
    }


def null_text(cond: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the learned null condition with the same entries and shapes as `cond` (all samples dropped)."""
    return {**cond, "drop": torch.ones_like(cond["drop"])}
