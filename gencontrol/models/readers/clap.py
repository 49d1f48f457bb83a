"""A small CLAP in transformers' own classes, with its tokenizer and a vectorised form of its feature extractor.

`build_clap` makes a folder that `ClapModel`, `AutoTokenizer` and `AutoFeatureExtractor` load as they load any CLAP of
the hub; `clap_features` computes in torch, batched and differentiable, what `ClapFeatureExtractor` computes clip by
clip in numpy, and reads all of its settings from the extractor, so that it serves hub checkpoints too.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from gencontrol.errors import UsageError

if TYPE_CHECKING:
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, PreTrainedTokenizerBase

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
MAX_TOKENS = 48


def train_tokenizer(texts: Iterable[str], *, vocabulary: int = 800) -> PreTrainedTokenizerBase:
    """A byte-level BPE of Roberta's kind (`<s> text </s>`), trained on `texts`; any text can be encoded."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaTokenizerFast

    trainer = ByteLevelBPETokenizer(lowercase=False)
    trainer.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False)
    # Token table and merges of a trained byte-level tokenizer.
    import json

    model = json.loads(trainer.to_str())["model"]
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    vocab, merges = model["vocab"], [(left, right) for left, right in pairs]
    return RobertaTokenizerFast(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def small_extractor() -> ClapFeatureExtractor:
    """Feature extractor at 16 kHz: 64 mel bands, 3 s padded with silence = 256 frames of 11.75 ms."""
    from transformers import ClapFeatureExtractor

    return ClapFeatureExtractor(
        feature_size=64,
        sampling_rate=16000,
        hop_length=188,
        max_length_s=3,
        fft_window_size=1024,
        frequency_min=50,
        frequency_max=8000,
        truncation="rand_trunc",
        padding="pad",
    )


def small_config(vocabulary: int) -> ClapConfig:
    """Architecture of the bundled CLAP: an HTS-AT audio tower and a three-layer text tower, about 3 M parameters."""
    from transformers import ClapConfig

    text = {
        "vocab_size": vocabulary,
        "hidden_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "max_position_embeddings": MAX_TOKENS + 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    audio = {
        "num_mel_bins": 64,
        "spec_size": 128,
        "patch_size": 8,
        "patch_stride": [8, 8],
        "patch_embeds_hidden_size": 64,
        "hidden_size": 256,
        "depths": [2, 2, 2],
        "num_attention_heads": [2, 4, 8],
        "num_hidden_layers": 3,
        "window_size": 4,
        "mlp_ratio": 3.0,
        "hidden_dropout_prob": 0.0,
        "num_classes": 20,
    }
    return ClapConfig(text_config=text, audio_config=audio, projection_dim=128)


def build_clap(seed: int, vocabulary: int) -> ClapModel:
    """A freshly initialised small CLAP; a pure function of its arguments (the global generator is put back)."""
    from transformers import ClapModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ClapModel(small_config(vocabulary)).eval()


def save_clap(
    folder: str | Path, model: ClapModel, tokenizer: PreTrainedTokenizerBase, extractor: ClapFeatureExtractor
) -> None:
    """Write model, tokenizer, feature extractor and processor as one folder in the hub's layout.

    A half-precision model is stored so, but its config asks for float32: it loads as any CLAP of the hub does.
    """
    from transformers import ClapProcessor

    Path(folder).mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    ClapProcessor(feature_extractor=extractor, tokenizer=tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    extractor.save_pretrained(folder)
    config = Path(folder) / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))


def load_clap(
    folder: str | Path, *, dtype: torch.dtype = torch.float32
) -> tuple[ClapModel, PreTrainedTokenizerBase, ClapFeatureExtractor]:
    """Load a CLAP folder of the hub's layout; refuses a tokenizer that came up empty."""
    from transformers import AutoFeatureExtractor, AutoTokenizer, ClapModel

    model = ClapModel.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) < 300:
        raise UsageError(f"the tokenizer in '{folder}' has {len(tokenizer)} tokens; its files are missing or damaged.")
    return model, tokenizer, AutoFeatureExtractor.from_pretrained(folder)


@lru_cache(maxsize=8)
def _bank(
    bins: int, n_fft: int, rate: int, low: float, high: float, fusion: bool, device: str
) -> tuple[Tensor, Tensor]:
    """Mel filters [f, m] and Hann window of an extractor's settings, on a device."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        num_frequency_bins=n_fft // 2 + 1,
        num_mel_filters=bins,
        min_frequency=low,
        max_frequency=high,
        sampling_rate=rate,
        norm=None if fusion else "slaney",
        mel_scale="htk" if fusion else "slaney",
    )
    return torch.from_numpy(filters).float().to(device), torch.hann_window(n_fft, device=device, dtype=torch.float64)


def fit_length(wave: Float[Tensor, "b n"], length: int, padding: str) -> Float[Tensor, "b length"]:
    """Pad as `ClapFeatureExtractor` does; a longer clip is cut at its middle (the extractor cuts at random)."""
    n = wave.shape[1]
    if n > length:
        start = (n - length) // 2
        return wave[:, start : start + length]
    if padding == "repeat":
        return wave.repeat(1, length // n + 1)[:, :length]
    if padding == "repeatpad":
        wave = wave.repeat(1, length // n)
    return F.pad(wave, (0, length - wave.shape[1]))


def clap_features(wave: Float[Tensor, "b n"], extractor: ClapFeatureExtractor) -> Float[Tensor, "b 1 frames mel"]:
    """Log-mel decibels [b, 1, frames, mel] equal to the extractor's, batched, on the device of `wave`, differentiable.

    `wave` is mono at `extractor.sampling_rate`.  For fused checkpoints repeat the channel four times.
    """
    e = extractor
    key = (e.feature_size, e.fft_window_size, e.sampling_rate, e.frequency_min, e.frequency_max)
    filters, window = _bank(*key, e.truncation == "fusion", str(wave.device))
    with torch.autocast(wave.device.type, enabled=False):
        fitted = fit_length(wave.double(), int(e.nb_max_samples), e.padding)  # quiet frames need the range
        spectrum = torch.stft(
            fitted, e.fft_window_size, e.hop_length, window=window, pad_mode="reflect", return_complex=True
        )
        power = (spectrum.real**2 + spectrum.imag**2).float()
        mel = power.transpose(1, 2) @ filters
        return 10.0 * torch.log10(mel.clamp_min(1e-10))[:, None]


def audio_embeddings(
    model: ClapModel, extractor: ClapFeatureExtractor, wave: Float[Tensor, "b n"]
) -> Float[Tensor, "b d"]:
    """Unit-length embeddings of clips."""
    return _pooled(model.get_audio_features(input_features=clap_features(wave, extractor)))


def text_embeddings(model: ClapModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Float[Tensor, "b d"]:
    """Unit-length embeddings of captions; longer ones are cut at the model's maximum."""
    text_config: Any = model.config.text_config
    limit = text_config.max_position_embeddings - 2
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
    device = next(model.parameters()).device
    out = model.get_text_features(
        input_ids=tokens["input_ids"].to(device), attention_mask=tokens["attention_mask"].to(device)
    )
    return _pooled(out)


class _Output(Protocol):
    """What `get_audio_features` and `get_text_features` return in transformers 5."""

    pooler_output: Tensor


def _pooled(out: Tensor | _Output) -> Tensor:
    """transformers 4 returns a tensor, transformers 5 an output object."""
    features = out if isinstance(out, Tensor) else out.pooler_output
    return F.normalize(features.float(), dim=-1)
