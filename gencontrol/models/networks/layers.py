"""Layers of the backbone: time embedding, rotary positions, QK-normalised attention, modulation.

Norms, rotations and embeddings are computed in fp32 whatever the autocast dtype is; matrix products follow autocast.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from gencontrol.kernels.attention import attention


def time_embedding(t: Float[Tensor, " b"], dim: int) -> Float[Tensor, "b dim"]:
    """Sinusoids of 1000·t, t in [0, 1], fp32; `dim` is even."""
    frequencies = torch.exp(
        -math.log(10000.0) * torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2)
    )
    angles = 1000.0 * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary_table(tokens: int, dim: int) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Cosines and signed sines of rotary positions 0 … tokens−1 for heads of `dim` channels (half-split convention)."""
    inverse = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = torch.arange(tokens, dtype=torch.float32)[:, None] * inverse
    return angles.cos().repeat(1, 2), torch.cat([-angles.sin(), angles.sin()], dim=-1)


def rotate(
    x: Float[Tensor, "b n h d"], cos: Float[Tensor, "n d"], sin: Float[Tensor, "n d"]
) -> Float[Tensor, "b n h d"]:
    """Rotate the pairs (x_i, x_{i+d/2}) of each head by the angles of its position (Su et al. 2021)."""
    return torch.addcmul(x * cos[:, None], x.roll(x.shape[-1] // 2, dims=-1), sin[:, None])


def modulate(
    x: Float[Tensor, "b n d"], shift: Float[Tensor, "b 1 d"], scale: Float[Tensor, "b 1 d"]
) -> Float[Tensor, "b n d"]:
    """LayerNorm without weights, then x·(1 + scale) + shift (adaLN, DiT eq. of §3.2)."""
    return functional.layer_norm(x, x.shape[-1:]) * (1.0 + scale) + shift


def head_norm(x: Float[Tensor, "b n h d"], weight: Float[Tensor, " d"]) -> Float[Tensor, "b n h d"]:
    """RMS-normalise each head in fp32 and scale it (QK-norm: keeps attention logits bounded)."""
    return functional.rms_norm(x.float(), x.shape[-1:], weight.float(), 1e-6)


class SelfAttention(nn.Module):
    """Multi-head self-attention with QK-norm and rotary positions."""

    def __init__(self, dim: int, heads: int, backend: str) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.q_norm = nn.Parameter(torch.ones(dim // heads))
        self.k_norm = nn.Parameter(torch.ones(dim // heads))

    def forward(self, x: Float[Tensor, "b n d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "b n d"]:
        """Mix the tokens of each sample."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q = rotate(head_norm(q, self.q_norm), cos, sin).to(v.dtype)
        k = rotate(head_norm(k, self.k_norm), cos, sin).to(v.dtype)
        return self.to_out(attention(q, k, v, backend=self.backend).flatten(2))


#: How batch rows share condition rows: None = one each; g = each serves g adjacent rows; [b] = the row of each.
Sharing = int | Tensor | None


class CrossAttention(nn.Module):
    """Multi-head attention to condition tokens with QK-norm; its output starts at zero."""

    def __init__(self, dim: int, context_dim: int, heads: int, backend: str) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.q_norm = nn.Parameter(torch.ones(dim // heads))
        self.k_norm = nn.Parameter(torch.ones(dim // heads))

    def project(self, context: Float[Tensor, "u m c"]) -> tuple[Float[Tensor, "u m h d"], Float[Tensor, "u m h d"]]:
        """Return keys and values of condition tokens: all that attention needs of them, whatever x and t are."""
        k, v = self.to_kv(context).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return head_norm(k, self.k_norm).to(v.dtype), v

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        keys_values: tuple[Float[Tensor, "u m h e"], Float[Tensor, "u m h e"]],
        mask: Bool[Tensor, "u m"] | None,
        sharing: Sharing = None,
    ) -> Float[Tensor, "b n d"]:
        """Read the visible condition tokens.

        Args:
            x: tokens that ask.
            keys_values: of `project`, one row per batch row, or fewer under `sharing`.
            mask: which condition tokens are visible, rows as in `keys_values`.
            sharing: how batch rows share rows of `keys_values`.
        """
        k, v = keys_values
        q = head_norm(self.to_q(x).unflatten(-1, (self.heads, -1)), self.q_norm).to(v.dtype)
        if isinstance(sharing, int):  # the queries of a group are one longer sequence: nothing is copied
            q = q.reshape(len(k), -1, *q.shape[2:])
        elif sharing is not None:
            k, v, mask = k[sharing], v[sharing], None if mask is None else mask[sharing]
        out = attention(q, k, v, mask=mask, backend=self.backend)
        return self.to_out(out.reshape(x.shape))


class FeedForward(nn.Module):
    """Two linear layers with a GELU (tanh form) between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc_in = nn.Linear(dim, hidden)
        self.fc_out = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Transform each token alone."""
        return self.fc_out(functional.gelu(self.fc_in(x), approximate="tanh"))


class Block(nn.Module):
    """One backbone block: self-attention, optional cross-attention, feed-forward, under adaLN-zero.

    The modulation [b 6 d] comes from one MLP shared by all blocks; each block adds a learned offset (PixArt-α §2.3).
    """

    def __init__(self, dim: int, heads: int, hidden: int, context_dim: int, backend: str) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(6, dim))
        self.attention = SelfAttention(dim, heads, backend)
        self.cross = CrossAttention(dim, context_dim, heads, backend) if context_dim else None
        self.feed_forward = FeedForward(dim, hidden)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        modulation: Float[Tensor, "b 6 d"],
        cos: Tensor,
        sin: Tensor,
        context: Float[Tensor, "u m c"] | tuple[Tensor, Tensor] | None,
        mask: Bool[Tensor, "u m"] | None,
        sharing: Sharing = None,
    ) -> Float[Tensor, "b n d"]:
        """Return the tokens after this block; `context` may be projected already."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (modulation + self.offset).unsqueeze(2).unbind(1)
        x = x + gate_a * self.attention(modulate(x, shift_a, scale_a), cos, sin)
        if self.cross is not None and context is not None:
            known = self.cross.project(context) if isinstance(context, Tensor) else context
            x = x + self.cross(x, known, mask, sharing)
        return x + gate_f * self.feed_forward(modulate(x, shift_f, scale_f))
