"""The sequence backbone on small square images: patches as tokens, conditioned on a class label or a text.

An image [b c s s] becomes (s/p)² tokens of its p x p patches, each with the one-hot number of its place (which makes
the first linear layer a learned position embedding); the output is put together the same way.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.models.denoiser import TakesGroups
from gencontrol.models.networks.transformer import Transformer, TransformerConfig
from gencontrol.types import Cond, Grouped


@dataclass(frozen=True)
class PatchConfig:
    """How images are cut.

    Args:
        channels: of the image.
        size: height and width, pixels.
        patch: height and width of a patch, a divisor of `size`.
    """

    channels: int = 1
    size: int = 8
    patch: int = 2

    def __post_init__(self) -> None:
        if min(self.channels, self.size, self.patch) < 1 or self.size % self.patch:
            raise ValueError(f"patch {self.patch} does not divide size {self.size}, or a number is below 1")

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return (self.size // self.patch) ** 2

    @property
    def values(self) -> int:
        """Numbers in a patch."""
        return self.channels * self.patch**2


class PatchTransformer(TakesGroups):
    """`Transformer` between cutting an image and putting it together; called as a Denoiser's network."""

    places: Tensor

    def __init__(self, config: PatchConfig, backbone: Transformer) -> None:
        """Wrap a backbone.

        Raises:
            UsageError: its sizes are not those of `backbone_config`.
        """
        super().__init__()
        sizes = (backbone.config.in_dim, backbone.config.out_dim, backbone.config.max_tokens)
        if sizes != (config.values + config.tokens, config.values, config.tokens):
            raise UsageError(
                f"a backbone with in_dim, out_dim, max_tokens = {sizes} does not fit {config}; use backbone_config()."
            )
        self.config, self.backbone = config, backbone
        self.register_buffer("places", torch.eye(config.tokens), persistent=False)

    @property
    def classes(self) -> int:
        """Number of class labels that the condition can name."""
        return self.backbone.config.pooled_dim

    def enable_gradient_checkpointing(self) -> None:
        """Compute the blocks' activations again in the backward pass instead of keeping them."""
        self.backbone.enable_gradient_checkpointing()

    def null_cond(self, batch: int) -> dict[str, Tensor]:
        """The learned null condition, shaped as a condition of labels: {"pooled": [b classes], "drop": [b] bool}."""
        return {
            "pooled": torch.zeros(batch, self.classes, device=self.backbone.device),
            "drop": torch.ones(batch, dtype=torch.bool, device=self.backbone.device),
        }

    def prepare(self, cond: Grouped) -> Grouped:
        """Return the condition with keys and values of the backbone's blocks; see `Transformer.prepare`."""
        return self.backbone.prepare(cond)

    def forward(
        self, x: Float[Tensor, "b c s s"], t: Float[Tensor, " b"] | Float[Tensor, ""] | float, cond: Cond = None
    ) -> Float[Tensor, "b c s s"]:
        """Return the network's output for images at times t in [0, 1].

        Args:
            cond: None, {"pooled": one-hot labels [b classes], "drop": [b] bool}, or that of a text with "pooled",
                "tokens", "mask" and "drop", as of `Transformer`.

        Raises:
            UsageError: images of another shape.
        """
        c, side, p = self.config.channels, self.config.size, self.config.patch
        if tuple(x.shape[1:]) != (c, side, side):
            raise UsageError(f"images of shape {list(x.shape[1:])}; this network takes {[c, side, side]}.")
        b, g = len(x), side // p
        patches = x.reshape(b, c, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(b, g * g, c * p * p)
        places = self.places.to(x.dtype).expand(b, -1, -1)
        out = self.backbone(torch.cat([patches, places], dim=-1), t, cond)
        return out.reshape(b, g, g, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(b, c, side, side)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and backbone/, the weights in `dtype` (default: as they are)."""
        folder = Path(folder)
        self.backbone.save_pretrained(folder / "backbone", dtype)
        table = {"_class_name": "PatchTransformer", **asdict(self.config)}
        (folder / "config.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> PatchTransformer:
        """Load a folder written by `save_pretrained`.

        Raises:
            UsageError: no such folder or files, an unknown configuration key, or weights that do not fit it.
        """
        folder = Path(folder)
        try:
            table = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            table.pop("_class_name", None)
            config = PatchConfig(**table)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UsageError(
                f"'{folder}' is no folder of a PatchTransformer (config.json, backbone/): {error}"
            ) from error
        return cls(config, Transformer.from_pretrained(folder / "backbone", dtype))


def backbone_config(
    config: PatchConfig, *, classes: int, dim: int, depth: int, heads: int, mlp_ratio: float = 4.0, context: int = 0
) -> TransformerConfig:
    """Sizes of the backbone that fits a way of cutting; see `TransformerConfig` for the arguments.

    Args:
        classes: channels of cond["pooled"]: class labels, or a text encoder's pooled embedding.
        context: channels of cond["tokens"] for cross-attention; 0 = none.
    """
    return TransformerConfig(
        in_dim=config.values + config.tokens,
        out_dim=config.values,
        dim=dim,
        depth=depth,
        heads=heads,
        mlp_ratio=mlp_ratio,
        pooled_dim=classes,
        context_dim=context,
        max_tokens=config.tokens,
    )
