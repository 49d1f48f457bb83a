"""CLAP models behind one small surface: audio and text → unit embeddings in one space.

Two loaders: transformers' ClapModel (the bundled model, any folder or hub id; the default and the better kept one) and
the checkpoints of the `laion-clap` package, read by that package's own loader.  Weights are frozen and in eval mode;
nothing is random; the gradient reaches the audio.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from gencontrol.errors import EnvironmentMissing, UsageError
from gencontrol.rewards.audio.clap_features import ClapLogMel, LogMelConfig, LongClips
from gencontrol.rewards.pretrained import (
    SMALLEST_VOCABULARY,
    check_vocabulary,
    embedding_of,
    first_line,
    load_pretrained,
    local_or_hub,
    pick_device,
    text_units,
    weights_digest,
)
from gencontrol.weights import bundled_path

_NO_ROBERTA = (
    "laion-clap could not load its text model 'roberta-base' (offline?); download it once, or put a folder "
    "'roberta-base' into the working directory."
)


class ClapBackend(Protocol):
    """What the rewards need of a CLAP model."""

    name: str
    sampling_rate: int
    max_seconds: float
    device: torch.device

    def audio(self, wave: Float[Tensor, "b n"], long_clips: LongClips) -> Float[Tensor, "b d"]:
        """Unit embeddings of clips at `sampling_rate` on `device`, with gradient."""
        ...

    def text(self, texts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Unit embeddings of texts, without gradient."""
        ...


def bundled_clap() -> Path:
    """Folder of the bundled CLAP model.

    Raises:
        EnvironmentMissing: this installation does not hold it.
    """
    remedy = "reinstall gencontrol, or give reward_model a local folder or hub id of a transformers CLAP model"
    return bundled_path("clap/config.json", "bundled CLAP model", remedy).parent


class TransformersClap:
    """A transformers ClapModel with its tokenizer and the settings of its feature extractor."""

    def __init__(self, model: Any, tokenizer: Any, features: LogMelConfig, source: str, device: torch.device) -> None:
        """Freeze the model; `source` names it in messages.

        Raises:
            UsageError: the tokenizer's vocabulary does not fit the model (a sign of missing tokenizer files).
        """
        text = model.config.text_config
        check_vocabulary(tokenizer, text.vocab_size, source)
        self.device = device
        self.sampling_rate, self.max_seconds = features.sampling_rate, float(features.max_length_s)
        self._model = model.eval().requires_grad_(False).to(device, torch.float32)
        self.name = f"clap:{weights_digest(self._model)}"
        self._tokenizer = tokenizer
        self._max_tokens = min(int(tokenizer.model_max_length), text.max_position_embeddings - 2)
        self._features = ClapLogMel(features).to(device)

    def audio(self, wave: Float[Tensor, "b n"], long_clips: LongClips) -> Float[Tensor, "b d"]:
        """Unit embeddings; clips longer than `max_seconds` by their chunks' mean, their centre or their start."""
        crops = self._features.crops(wave, long_clips)
        mel = self._features(crops.flatten(0, 1))
        longer = torch.zeros(mel.shape[0], 1, dtype=torch.bool, device=mel.device)
        with torch.autocast(mel.device.type, enabled=False):
            output = self._model.get_audio_features(input_features=mel, is_longer=longer)
        units = F.normalize(embedding_of(output), dim=-1)
        return F.normalize(units.unflatten(0, crops.shape[:2]).mean(1), dim=-1)

    def text(self, texts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Unit embeddings of texts, cut at the model's length."""
        return text_units(self._model, self._tokenizer, texts, self._max_tokens, self.device)


def load_transformers_clap(source: str | Path, device: torch.device) -> TransformersClap:
    """Load a ClapModel, its tokenizer and its feature extractor from a folder or the hub.

    Raises:
        UsageError: not found (or offline), not a CLAP model, missing weights, or an unfit tokenizer.
    """
    from transformers import AutoFeatureExtractor, AutoTokenizer

    parts = (AutoTokenizer.from_pretrained, AutoFeatureExtractor.from_pretrained)
    model, tokenizer, extractor = load_pretrained(source, "clap", "reward_model", parts, ", or 'bundled'")
    return TransformersClap(model, tokenizer, LogMelConfig.from_mapping(extractor.to_dict()), str(source), device)


class LaionClap:
    """A checkpoint of the laion-clap package, at 48 kHz, 10 s."""

    sampling_rate = 48_000
    max_seconds = 10.0

    def __init__(self, module: Any, device: torch.device) -> None:
        """Freeze a loaded `laion_clap.CLAP_Module`.

        Raises:
            EnvironmentMissing: its tokenizer came up empty, which transformers does silently when offline.
        """
        if len(module.tokenize) < SMALLEST_VOCABULARY:
            raise EnvironmentMissing(_NO_ROBERTA + f" Its tokenizer has only {len(module.tokenize)} tokens.")
        self.name, self.device = f"laion-clap:{weights_digest(module)}", device
        self._module = module.eval().requires_grad_(False).to(device)
        self._crops = ClapLogMel(LogMelConfig(truncation="rand_trunc"))

    def audio(self, wave: Float[Tensor, "b n"], long_clips: LongClips) -> Float[Tensor, "b d"]:
        """Unit embeddings; the package sees clips of at most 10 s, so its own random crop never runs."""
        crops = self._crops.crops(wave, long_clips)
        output = self._module.get_audio_embedding_from_data(x=list(crops.flatten(0, 1)), use_tensor=True)
        units = F.normalize(output.to(wave.device).float(), dim=-1)
        return F.normalize(units.unflatten(0, crops.shape[:2]).mean(1), dim=-1)

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Unit embeddings of texts."""
        output = self._module.get_text_embedding(list(texts), use_tensor=True)
        return F.normalize(output.to(self.device).float(), dim=-1)


def load_laion_clap(checkpoint: Path, device: torch.device, audio_tower: str) -> LaionClap:
    """Load a laion-clap `.pt` file by the package's own loader; it is a pickle: load files you trust.

    Args:
        audio_tower: "HTSAT-tiny", "HTSAT-base", or "auto": base for the `music_…` files, else tiny.

    Raises:
        UsageError: no such file, or it does not fit the audio tower.
        EnvironmentMissing: laion-clap is not installed, or its RoBERTa files are not here.
    """
    if not checkpoint.is_file():
        raise UsageError(f"reward_model '{checkpoint}' does not exist; give the path of a laion-clap checkpoint.")
    tower = audio_tower
    if tower == "auto":
        tower = "HTSAT-base" if checkpoint.name.startswith("music_") else "HTSAT-tiny"
    fusion = "fusion" in checkpoint.name
    try:
        if fusion:
            import torchaudio  # noqa: F401  # the package computes the mel input of fusion models with it
        from laion_clap import CLAP_Module

        module = CLAP_Module(enable_fusion=fusion, device=str(device), amodel=tower)
    except ImportError as error:
        raise EnvironmentMissing(
            f"a laion-clap checkpoint needs laion-clap (and torchaudio for fusion models): {error}; "
            "pip install 'gencontrol[clap]', or give reward_model a transformers CLAP model."
        ) from error
    except OSError as error:
        raise EnvironmentMissing(f"{_NO_ROBERTA} First cause: {first_line(error)}") from error
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the package prints; stdout belongs to the command line
            module.load_ckpt(str(checkpoint), verbose=False)
    except (RuntimeError, KeyError) as error:
        raise UsageError(
            f"'{checkpoint}' does not fit laion-clap's {tower}: {first_line(error)}; set audio_tower to "
            "'HTSAT-tiny' or 'HTSAT-base'."
        ) from error
    return LaionClap(module, device)


@lru_cache(maxsize=4)
def _load(reward_model: str, device: str, audio_tower: str) -> ClapBackend:
    """Load a backend once per process, model, device and tower."""
    if reward_model.endswith((".pt", ".pth")):
        return load_laion_clap(Path(reward_model).expanduser(), torch.device(device), audio_tower)
    if reward_model == "bundled":
        return load_transformers_clap(bundled_clap(), torch.device(device))
    return load_transformers_clap(local_or_hub(reward_model), torch.device(device))


def clap_backend(
    reward_model: str | Path = "bundled", device: str | torch.device | None = None, audio_tower: str = "auto"
) -> ClapBackend:
    """Return the CLAP model of that name; rewards that name the same model share it.

    Args:
        reward_model: "bundled", a folder or hub id of a transformers CLAP model, or a laion-clap `.pt` file.
        device: None takes the GPU when there is one.
        audio_tower: for `.pt` files, see `load_laion_clap`.

    Raises:
        UsageError, EnvironmentMissing: as the loaders say.
    """
    if audio_tower not in ("auto", "HTSAT-tiny", "HTSAT-base"):
        raise UsageError(f"audio_tower is 'auto', 'HTSAT-tiny' or 'HTSAT-base', not '{audio_tower}'.")
    return _load(str(reward_model), pick_device(device), audio_tower)
