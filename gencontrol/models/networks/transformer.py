"""One backbone for latents, actions and tokens: adaLN-zero, QK-norm, rotary positions, optional cross-attention.

DiT (Peebles & Xie 2023) with PixArt-α's shared modulation MLP and per-block offsets.  `forward(x, t, cond)` takes a
sequence [b n c] (or token ids [b n] when `vocab_size` is set) at times t in [0, 1] and a condition mapping

    {"pooled": [b p], "tokens": [b m c], "mask": [b m] bool, "drop": [b] bool}

each entry optional.  What is missing, or dropped for a sample, is replaced by a learned null condition.  Under a
`Grouped` condition keys and values of the tokens are projected once per distinct row; `prepare` does so once for all
steps of a sampler (entry "kv" [b blocks m 2 heads d]).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gencontrol.errors import UsageError
from gencontrol.kernels.attention import check_backend
from gencontrol.models.denoiser import TakesGroups
from gencontrol.models.networks.layers import Block, Sharing, modulate, rotary_table, time_embedding
from gencontrol.types import Cond, Grouped, cond_rows

_COND_KEYS = frozenset({"pooled", "tokens", "mask", "drop", "kv"})


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a `Transformer`.

    Args:
        in_dim, out_dim: channels of each sequence element in and out; 0 for a token model.
        vocab_size: number of token ids (the mask token included); 0 for a continuous model.
        dim, depth, heads, mlp_ratio: width, blocks, attention heads, feed-forward width over `dim`.
        context_dim: channels of cond["tokens"]; 0 = no cross-attention.
        pooled_dim: channels of cond["pooled"]; 0 = none.
        max_tokens: longest sequence.
        attention: backend name of `gencontrol.kernels.attention`.
        gradient_checkpointing: recompute blocks in the backward pass to save memory.
    """

    in_dim: int = 0
    out_dim: int = 0
    vocab_size: int = 0
    dim: int = 256
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 4.0
    context_dim: int = 0
    pooled_dim: int = 0
    max_tokens: int = 1024
    attention: str = "auto"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_backend(self.attention)
        continuous = self.in_dim > 0 and self.out_dim > 0
        if continuous == (self.vocab_size > 0):
            raise ValueError("give either in_dim and out_dim (continuous) or vocab_size (tokens), not both or neither")
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim {self.dim} is not a multiple of 2·heads = {2 * self.heads}")
        if min(self.depth, self.heads, self.max_tokens) < 1 or min(self.context_dim, self.pooled_dim) < 0:
            raise ValueError("depth, heads, max_tokens ≥ 1 and context_dim, pooled_dim ≥ 0 are needed")


def _sharing(cond: Cond, b: int, device: torch.device) -> tuple[Sharing, int]:
    """How the b batch rows share rows of the condition, and the number of these.

    Raises:
        ValueError: a `Grouped` condition of another batch.
    """
    if not isinstance(cond, Grouped):
        return None, b
    if len(cond) != b:
        raise ValueError(f"a grouped condition of {len(cond)} rows for a batch of {b}")
    return cond.repeats() or cond.rows.to(device), cond_rows(cond.unique)


def _spread(rows: Float[Tensor, "u *d"], sharing: Sharing) -> Float[Tensor, "b *d"]:
    """Give each batch row its row."""
    if isinstance(sharing, int):
        return rows.repeat_interleave(sharing, 0)
    return rows if sharing is None else rows[sharing]


class Transformer(TakesGroups):
    """Sequence backbone; at initialisation its output is zero for every input."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        """Build the network with weights drawn from torch's global generator (seed it for a fixed start)."""
        super().__init__()
        self.config = config
        dim, hidden = config.dim, round(config.dim * config.mlp_ratio)
        self.embed: nn.Module = (
            nn.Embedding(config.vocab_size, dim) if config.vocab_size else nn.Linear(config.in_dim, dim)
        )
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.modulation = nn.Linear(dim, 6 * dim)
        self.pooled = nn.Linear(config.pooled_dim, dim) if config.pooled_dim else None
        self.null_pooled = nn.Parameter(torch.zeros(dim)) if config.pooled_dim else None
        self.null_token = nn.Parameter(torch.randn(config.context_dim) * 0.02) if config.context_dim else None
        self.blocks = nn.ModuleList(
            Block(dim, config.heads, hidden, config.context_dim, config.attention) for _ in range(config.depth)
        )
        self.final_offset = nn.Parameter(torch.zeros(2, dim))
        self.out = nn.Linear(dim, config.vocab_size or config.out_dim)
        cos, sin = rotary_table(config.max_tokens, dim // config.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if isinstance(self.embed, nn.Embedding):
            nn.init.normal_(self.embed.weight, std=0.02)
        for layer in (self.modulation, self.out):
            nn.init.zeros_(layer.weight)
        for block in self.blocks:
            assert isinstance(block, Block)
            if block.cross is not None:
                nn.init.zeros_(block.cross.to_out.weight)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.out.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.out.weight.dtype

    def enable_gradient_checkpointing(self) -> None:
        """Compute the blocks' activations again in the backward pass instead of keeping them."""
        self.config = dataclasses.replace(self.config, gradient_checkpointing=True)

    def null_cond(self, batch: int) -> dict[str, Tensor]:
        """The learned null condition of `batch` samples; `forward` treats it like None."""
        return {"drop": torch.ones(batch, dtype=torch.bool, device=self.device)}

    def forward(
        self, x: Tensor, t: Float[Tensor, " b"] | Float[Tensor, ""] | float, cond: Cond = None
    ) -> Float[Tensor, "b n out"]:
        """Return the network's output, or logits [b n vocab_size] of a token model.

        Args:
            x: [b n in_dim] float, or [b n] int64 token ids.
            t: times in [0, 1], one per sample or one for all.
            cond: see the module docstring; None is the learned null condition.

        Raises:
            ValueError: a sequence longer than `max_tokens`, a condition the configuration has no place for, or a
                `Grouped` one of another batch.
        """
        b, n = x.shape[0], x.shape[1]
        if n > self.config.max_tokens:
            raise ValueError(
                f"sequence of {n} elements; this model takes at most {self.config.max_tokens} (max_tokens)"
            )
        sharing, count = _sharing(cond, b, self.device)
        cond = self._check(cond.unique if isinstance(cond, Grouped) else cond)
        h = self.embed(x) if self.config.vocab_size else self.embed(x.to(self.dtype))
        times = torch.as_tensor(t, device=self.device, dtype=torch.float32).expand(b)
        vector, modulation = self._modulation(times, cond, count, sharing)
        context, mask = self._context(cond, count)
        projected = [tuple(layer.unbind(2)) for layer in cond["kv"].unbind(1)] if "kv" in cond else None
        cos, sin = self.cos[:n], self.sin[:n]
        for index, block in enumerate(self.blocks):
            inputs = (h, modulation, cos, sin, context if projected is None else projected[index], mask, sharing)
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(*inputs)
        shift, scale = (vector.unsqueeze(1) + self.final_offset).unsqueeze(2).unbind(1)
        return self.out(modulate(h, shift, scale))

    def prepare(self, cond: Grouped) -> Grouped:
        """Return the condition with the keys and values of all blocks under the present weights (autocast's dtype)."""
        if self.null_token is None:
            return cond
        unique = self._check(cond.unique)
        context, _ = self._context(unique, cond_rows(unique))
        assert context is not None  # the model has a null token
        crosses = [block.cross for block in self.blocks if isinstance(block, Block)]
        layers = [torch.stack(cross.project(context), 2) for cross in crosses if cross is not None]
        return Grouped({**unique, "kv": torch.stack(layers, 1)}, cond.rows)

    def _check(self, cond: Cond) -> Mapping[str, Tensor]:
        if cond is None:
            return {}
        if not isinstance(cond, Mapping):
            raise ValueError(
                f"condition of type {type(cond).__name__}; expected None or a mapping of {sorted(_COND_KEYS)}"
            )
        places = {"pooled": self.pooled, "tokens": self.null_token, "mask": self.null_token, "kv": self.null_token}
        for key, value in cond.items():
            if key not in _COND_KEYS or (key in places and places[key] is None):
                raise ValueError(f"condition '{key}' has no place in this model (see pooled_dim, context_dim)")
            if not isinstance(value, Tensor):
                raise ValueError(f"condition '{key}' is a {type(value).__name__}; expected a tensor")
        if "mask" in cond and "tokens" not in cond:
            raise ValueError("condition 'mask' without 'tokens'")
        return cond

    def _modulation(
        self, times: Float[Tensor, " b"], cond: Mapping[str, Tensor], count: int, sharing: Sharing
    ) -> tuple[Float[Tensor, "r d"], Float[Tensor, "r 6 d"]]:
        """Return what modulates the last layer and the blocks, a row for each sample, or one for all.

        When all samples are at one time (`times` is an expanded number, stride 0, as samplers give it), it is computed
        once for each condition that rows share.
        """
        together = times.stride(0) == 0
        vector = self.time(time_embedding(times[:1] if together else times, self.config.dim).to(self.dtype))
        if self.pooled is not None:
            pooled = self._pooled(cond, count)
            vector = vector + (pooled if together else _spread(pooled, sharing))
        modulation = self.modulation(nn.functional.silu(vector)).unflatten(-1, (6, -1))
        if together and self.pooled is not None:
            return _spread(vector, sharing), _spread(modulation, sharing)
        return vector, modulation

    def _pooled(self, cond: Mapping[str, Tensor], b: int) -> Float[Tensor, "b d"]:
        assert self.pooled is not None and self.null_pooled is not None
        if "pooled" not in cond:
            return self.null_pooled.expand(b, -1)
        pooled = self.pooled(cond["pooled"].to(self.dtype))
        return (
            pooled
            if "drop" not in cond
            else torch.where(cond["drop"][:, None], self.null_pooled.to(pooled.dtype), pooled)
        )

    def _context(
        self, cond: Mapping[str, Tensor], b: int
    ) -> tuple[Float[Tensor, "b m c"] | None, Bool[Tensor, "b m"] | None]:
        if self.null_token is None:
            return None, None
        if "tokens" not in cond:
            return self.null_token.expand(b, 1, -1), None
        tokens, mask = cond["tokens"].to(self.dtype), cond.get("mask")
        mask = None if mask is None else mask.bool()
        if "drop" not in cond:
            return tokens, mask
        drop = cond["drop"][:, None]
        tokens = torch.where(drop[..., None], self.null_token, tokens)
        if mask is not None:
            # all rows of a dropped sample hold the null token, so that any visible set gives the same answer
            mask = mask | drop
        return tokens, mask

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors, the weights in `dtype` (default: as they are)."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        table = {"_class_name": "Transformer", **dataclasses.asdict(self.config)}
        (folder / "config.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        weights = {key: value.detach().to("cpu", dtype).contiguous() for key, value in self.state_dict().items()}
        save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> Transformer:
        """Load a folder written by `save_pretrained`; half-precision files are upcast to `dtype`.

        Raises:
            UsageError: no such folder or files, an unknown configuration key, or weights that do not fit it.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            table: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            weights = load_file(str(folder / "model.safetensors"))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"'{folder}' is no folder of a Transformer (config.json, model.safetensors): {error}"
            ) from error
        table.pop("_class_name", None)
        try:
            config = TransformerConfig(**table)
        except (TypeError, ValueError) as error:
            raise UsageError(f"'{folder}/config.json' does not fit TransformerConfig: {error}") from error
        with torch.device("meta"):
            model = cls(config)
        expected = model.state_dict()
        missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
        wrong = sorted(k for k in expected.keys() & weights.keys() if expected[k].shape != weights[k].shape)
        if missing or unknown or wrong:
            raise UsageError(
                f"'{folder}/model.safetensors': missing {missing}, unknown {unknown}, other shape {wrong}."
            )
        model.load_state_dict({key: value.to(dtype) for key, value in weights.items()}, assign=True)
        model.cos, model.sin = rotary_table(config.max_tokens, config.dim // config.heads)
        return model.requires_grad_(True).train()
