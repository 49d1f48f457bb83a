"""Tiny real diffusers networks with random weights, and inputs that fit them."""

from __future__ import annotations

from typing import Any

import torch


def build(name: str) -> Any:
    """A network of the diffusers class `name`, in double precision; its output layers are not zero."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = getattr(diffusers, name)(**_SIZES[name])
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    return network.eval().double()


def cond(name: str, b: int = 2) -> tuple[tuple[int, ...], dict[str, torch.Tensor]]:
    """Shape of x, and a condition by generic names, for `build(name)`."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.ones(b, 5, dtype=torch.bool)
    mask[0, 3:] = False
    match name:
        case "UNet2DModel":
            return (b, 3, 8, 8), {}
        case "UNet2DConditionModel":
            return (b, 4, 8, 8), {"tokens": draw(b, 5, 16), "mask": mask}
        case "AudioLDM2UNet2DConditionModel":
            other = {"encoder_hidden_states_1": draw(b, 4, 12), "encoder_attention_mask_1": mask[:, :4]}
            return (b, 4, 8, 8), {"tokens": draw(b, 5, 16), **other}
        case "SD3Transformer2DModel":
            return (b, 4, 8, 8), {"tokens": draw(b, 5, 16), "pooled": draw(b, 20)}
        case "FluxTransformer2DModel":
            extra = {"guidance": torch.full((b,), 3.5, dtype=torch.float64)}
            return (b, 4, 8, 6), {"tokens": draw(b, 5, 16), "pooled": draw(b, 20), **extra}
        case "PixArtTransformer2DModel":
            return (b, 4, 8, 8), {"tokens": draw(b, 5, 12), "mask": mask}
        case "StableAudioDiTModel":
            return (b, 4, 10), {"tokens": draw(b, 5, 12), "pooled": draw(b, 1, 24)}
    raise KeyError(name)


_SIZES: dict[str, dict[str, Any]] = {
    "UNet2DModel": {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    },
    "UNet2DConditionModel": {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
    },
    "AudioLDM2UNet2DConditionModel": {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": ((None, 16, 12), (None, 16, 12)),
        "transformer_layers_per_block": 1,
    },
    "SD3Transformer2DModel": {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 20,
        "out_channels": 4,
        "pos_embed_max_size": 8,
    },
    "FluxTransformer2DModel": {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 20,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    },
    "PixArtTransformer2DModel": {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "cross_attention_dim": 16,
        "caption_channels": 12,
        "norm_type": "ada_norm_single",
        "use_additional_conditions": False,
    },
    "StableAudioDiTModel": {
        "sample_size": 10,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_attention_heads": 1,
        "out_channels": 4,
        "cross_attention_dim": 12,
        "time_proj_dim": 8,
        "global_states_input_dim": 24,
        "cross_attention_input_dim": 12,
    },
}
