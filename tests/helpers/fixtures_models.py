"""Tiny random-weight pipelines of the real classes, saved and loaded by the real code; nothing is downloaded.

Each builder is a pure function of its seed: the global generator is put back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw weights from a fixed seed inside the block."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def randomise(module: torch.nn.Module, scale: float = 0.2) -> torch.nn.Module:
    """Replace all parameters by noise, so that no zero-initialised layer hides an error."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * scale)
    return module


def roberta_tokenizer(model_max_length: int = 32) -> Any:
    """A Roberta tokenizer of single letters."""
    from transformers import RobertaTokenizer

    symbols = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *LETTERS]
    vocab = {symbol: number for number, symbol in enumerate(symbols)}
    return RobertaTokenizer(vocab=vocab, merges=[], model_max_length=model_max_length)


def t5_tokenizer(model_max_length: int = 16) -> Any:
    """A T5 tokenizer of single letters."""
    from transformers import T5Tokenizer

    symbols = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    vocab = [(symbol, 0.0 if symbol.startswith("<") else -2.0) for symbol in symbols]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=model_max_length)


def clap_text_encoder(seed: int = 0, hidden: int = 16, projection: int = 8) -> Any:
    """A one-layer ClapTextModelWithProjection."""
    from transformers import ClapTextConfig, ClapTextModelWithProjection

    config = ClapTextConfig(
        vocab_size=48,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        projection_dim=projection,
        max_position_embeddings=64,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with seeded(seed):
        return ClapTextModelWithProjection(config).eval()


def tiny_codec() -> Any:
    """A MelCodec of 2048 samples at 16 kHz: latents [8, 16]."""
    from gencontrol.models.networks.codec import MelCodec, MelCodecConfig

    return MelCodec(
        MelCodecConfig(n_fft=256, hop=128, mel_bins=16, channels=16, clip_samples=2048, griffin_lim_steps=2)
    )


def tiny_text_to_audio(seed: int = 0) -> Any:
    """Our own pipeline with a one-block transformer: latents [8, 16], sounds of 0.128 s at 16 kHz."""
    from gencontrol.models.networks.transformer import Transformer, TransformerConfig
    from gencontrol.pipelines import ProcessSpec, TextToAudioPipeline

    with seeded(seed):
        transformer = Transformer(
            TransformerConfig(
                in_dim=16,
                out_dim=16,
                dim=16,
                depth=1,
                heads=2,
                mlp_ratio=2.0,
                context_dim=16,
                pooled_dim=8,
                max_tokens=8,
            )
        )
        randomise(transformer)
    return TextToAudioPipeline(
        transformer=transformer.eval(),
        text_encoder=clap_text_encoder(seed),
        tokenizer=roberta_tokenizer(),
        codec=tiny_codec(),
        process=ProcessSpec(steps=4),
    )


def tiny_stable_audio(seed: int = 0) -> Any:
    """diffusers' StableAudioPipeline: latents [4, 32], stereo of 128 samples at 32 Hz (4 s)."""
    from diffusers import (
        AutoencoderOobleck,
        CosineDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )
    from transformers import T5Config, T5EncoderModel

    with seeded(seed):
        transformer = StableAudioDiTModel(
            sample_size=32,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_attention_heads=2,
            cross_attention_dim=16,
            time_proj_dim=8,
            global_states_input_dim=16,
            cross_attention_input_dim=8,
        )
        vae = AutoencoderOobleck(
            encoder_hidden_size=6,
            downsampling_ratios=[2, 2],
            decoder_channels=3,
            decoder_input_channels=4,
            audio_channels=2,
            channel_multiples=[2, 4],
            sampling_rate=32,
        )
        text_encoder = T5EncoderModel(T5Config(vocab_size=48, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
        projection = StableAudioProjectionModel(text_encoder_dim=16, conditioning_dim=8, min_value=0, max_value=8)
    pipe = StableAudioPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        projection_model=projection.eval(),
        tokenizer=t5_tokenizer(),
        transformer=transformer.eval(),
        scheduler=CosineDPMSolverMultistepScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _tiny_clap() -> Any:
    """A ClapModel whose projection has 16 channels."""
    from transformers import ClapConfig, ClapModel

    text = {
        "vocab_size": 48,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 16,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    audio = {
        "spec_size": 8,
        "window_size": 4,
        "num_mel_bins": 8,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "num_hidden_layers": 1,
        "hidden_size": 192,
        "patch_size": 2,
        "patch_stride": 2,
        "patch_embed_input_channels": 4,
    }
    return ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=16)).eval()


def tiny_audioldm2(seed: int = 0) -> Any:
    """diffusers' AudioLDM2Pipeline: latents [4, 8, 4], mono of 64 samples at 16 kHz."""
    from diffusers import (
        AudioLDM2Pipeline,
        AudioLDM2ProjectionModel,
        AudioLDM2UNet2DConditionModel,
        AutoencoderKL,
        DDIMScheduler,
    )
    from transformers import (
        ClapFeatureExtractor,
        GPT2Config,
        GPT2LMHeadModel,
        SpeechT5HifiGan,
        SpeechT5HifiGanConfig,
        T5Config,
        T5EncoderModel,
    )

    with seeded(seed):
        unet = AudioLDM2UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=((None, 16, 32), (None, 16, 32)),
        )
        vae = AutoencoderKL(
            block_out_channels=[8, 16],
            in_channels=1,
            out_channels=1,
            norm_num_groups=8,
            down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
            up_block_types=["UpDecoderBlock2D", "UpDecoderBlock2D"],
            latent_channels=4,
        )
        clap = _tiny_clap()
        text_encoder_2 = T5EncoderModel(T5Config(vocab_size=48, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
        language_model = GPT2LMHeadModel(
            GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=100, n_positions=64, bos_token_id=0, eos_token_id=1)
        )
        vocoder = SpeechT5HifiGan(
            SpeechT5HifiGanConfig(
                model_in_dim=8,
                sampling_rate=16000,
                upsample_initial_channel=16,
                upsample_rates=[2, 2],
                upsample_kernel_sizes=[4, 4],
                resblock_kernel_sizes=[3, 7],
                resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
                normalize_before=False,
            )
        )
        projection = AudioLDM2ProjectionModel(text_encoder_dim=16, text_encoder_1_dim=32, langauge_model_dim=16)
    language_model.config.max_new_tokens = 4
    scheduler = DDIMScheduler(  # the settings of cvssp/audioldm2
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = AudioLDM2Pipeline(
        vae=vae.eval(),
        text_encoder=clap,
        text_encoder_2=text_encoder_2.eval(),
        projection_model=projection.eval(),
        language_model=language_model.eval(),
        tokenizer=roberta_tokenizer(16),
        tokenizer_2=t5_tokenizer(16),
        feature_extractor=ClapFeatureExtractor(
            feature_size=8, hop_length=250, fft_window_size=1024, truncation="rand_trunc"
        ),
        unet=unet.eval(),
        scheduler=scheduler,
        vocoder=vocoder.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
