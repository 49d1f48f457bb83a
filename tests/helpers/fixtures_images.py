"""Tiny random-weight text-to-image pipelines of diffusers' real classes; nothing is downloaded.

Images are 16 pixels wide (FLUX: what is asked for), VAEs shrink by 2, and no layer is zero.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.helpers.fixtures_models import LETTERS, randomise, seeded, t5_tokenizer


def clip_tokenizer(model_max_length: int = 12) -> Any:
    """A CLIP tokenizer of single letters."""
    from transformers import CLIPTokenizer

    symbols = ["<|startoftext|>", "<|endoftext|>", "<unk>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    vocab = {symbol: number for number, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocab, merges=[], unk_token="<unk>", model_max_length=model_max_length)


def clip_encoder(hidden: int = 16, projection: int | None = None) -> Any:
    """A two-layer CLIPTextModel; with a projection, the class that gives pooled states."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=80,
        hidden_size=hidden,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=projection or 8,
        bos_token_id=0,
        eos_token_id=1,
    )
    kind = CLIPTextModel if projection is None else CLIPTextModelWithProjection
    return randomise(kind(config)).eval()


def t5_encoder(width: int = 16) -> Any:
    """A one-layer T5 encoder."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=48, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()


def vae(**config: Any) -> Any:
    """An AutoencoderKL that shrinks by 2, latents of 4 channels."""
    from diffusers import AutoencoderKL

    kind = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    whole = {"block_out_channels": [4, 8], "norm_num_groups": 2, "latent_channels": 4, **kind, **config}
    return randomise(AutoencoderKL(**whole)).eval()


def _unet(**config: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return randomise(
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            **config,
        )
    ).eval()


def _ddim() -> Any:
    """The noise law of Stable Diffusion 1.5, with a last step that lands on clean data."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd(seed: int = 0) -> Any:
    """diffusers' StableDiffusionPipeline: latents [4, 8, 8], images of 16 pixels, DDIM."""
    from diffusers import StableDiffusionPipeline

    with seeded(seed):
        return _quiet(
            StableDiffusionPipeline(
                vae=vae(),
                text_encoder=clip_encoder(),
                tokenizer=clip_tokenizer(),
                unet=_unet(cross_attention_dim=16),
                scheduler=_ddim(),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        )


def tiny_sdxl(seed: int = 0) -> Any:
    """diffusers' StableDiffusionXLPipeline: latents [4, 8, 8], images of 16 pixels, Euler."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    with seeded(seed):
        return _quiet(
            StableDiffusionXLPipeline(
                vae=vae(scaling_factor=0.13025, force_upcast=True),
                text_encoder=clip_encoder(16),
                text_encoder_2=clip_encoder(16, projection=8),
                tokenizer=clip_tokenizer(),
                tokenizer_2=clip_tokenizer(),
                unet=_unet(
                    cross_attention_dim=32,
                    addition_embed_type="text_time",
                    addition_time_embed_dim=4,
                    projection_class_embeddings_input_dim=8 + 6 * 4,
                ),
                scheduler=EulerDiscreteScheduler(
                    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"
                ),
                add_watermarker=False,
            )
        )


def tiny_sd3(seed: int = 0) -> Any:
    """diffusers' StableDiffusion3Pipeline: latents [4, 8, 8], images of 16 pixels, shift 3."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with seeded(seed):
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            pos_embed_max_size=8,
        )
        return _quiet(
            StableDiffusion3Pipeline(
                vae=vae(scaling_factor=1.5305, shift_factor=0.0609),
                text_encoder=clip_encoder(16, projection=8),
                text_encoder_2=clip_encoder(16, projection=8),
                text_encoder_3=t5_encoder(32),
                tokenizer=clip_tokenizer(),
                tokenizer_2=clip_tokenizer(),
                tokenizer_3=t5_tokenizer(),
                transformer=randomise(transformer).eval(),
                scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            )
        )


def tiny_flux(seed: int = 0, *, guidance_embeds: bool = True) -> Any:
    """diffusers' FluxPipeline: latents [4, h/2, w/2], dynamic shift as in FLUX.1-dev (none as in schnell)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with seeded(seed):
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 4, 8),
        )
        return _quiet(
            FluxPipeline(
                vae=vae(scaling_factor=0.3611, shift_factor=0.1159),
                text_encoder=clip_encoder(16),
                text_encoder_2=t5_encoder(16),
                tokenizer=clip_tokenizer(),
                tokenizer_2=t5_tokenizer(),
                transformer=randomise(transformer).eval(),
                scheduler=FlowMatchEulerDiscreteScheduler(
                    shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds
                ),
            )
        )


def noise(shape: tuple[int, ...], seed: int = 5) -> torch.Tensor:
    """Unit noise from a fixed seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny_pixart(seed: int = 0, *, sizes: bool = False) -> Any:
    """diffusers' PixArtAlphaPipeline: latents [4, 8, 8], images of 16 pixels; `sizes` as its 1024 pixel model has."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    with seeded(seed):
        transformer = PixArtTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=3,
            cross_attention_dim=24,
            caption_channels=16,
            norm_type="ada_norm_single",
            use_additional_conditions=sizes,
        )
        return _quiet(
            PixArtAlphaPipeline(
                tokenizer=t5_tokenizer(),
                text_encoder=t5_encoder(16),
                vae=vae(),
                transformer=randomise(transformer).eval(),
                scheduler=DPMSolverMultistepScheduler(beta_end=0.02),
            )
        )


#: name → builder of the five families that TextToImagePipeline takes
FAMILIES = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux, "pixart": tiny_pixart}
#: FLUX tells no size of its own; the tests make small images
SIZES = {"flux": (16, 16)}
