"""Reference statistics of the Fréchet rewards: bundled, from a folder of sound, from captions, or from a file.

DRAGON (arXiv 2504.15217) calls this the exemplar set: an encoder and a set of examples define the reward.  Text as
reference uses a cross-modal encoder; the gap between the modalities makes the absolute distance meaningless there, only
differences count.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.errors import UsageError
from gencontrol.rewards.audio.encoders import Encoder
from gencontrol.rewards.sets.gaussian import Gaussian
from gencontrol.weights import bundled_path

_LONGEST_S = 600.0


def from_captions(path: str | Path, encoder: Encoder) -> Gaussian:
    """Statistics of the text embeddings of a file with one caption per line (empty lines and repeats are left out).

    Raises:
        UsageError: fewer than two different captions, not UTF-8, or an encoder without a text space.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"reference '{path}' cannot be read as UTF-8 text: {error}") from error
    captions = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(captions) < 2:
        raise UsageError(f"reference '{path}' holds {len(captions)} different captions; at least 2 are needed.")
    return _gaussian([encoder.captions(captions)], encoder, str(path))


def from_folder(folder: str | Path, encoder: Encoder) -> tuple[Gaussian, list[Path]]:
    """Statistics of all frames of all sound files in a folder, and the files that were skipped as broken.

    Each file is mixed to mono and read up to 10 minutes.  Broken, empty and non-finite files are skipped, counted and
    named in one warning.

    Raises:
        UsageError: not a folder, no sound file in it, or none that can be read.
    """
    from gencontrol.data.audio import AUDIO_SUFFIXES, list_audio, read_audio

    files = list_audio(folder)
    if not files:
        raise UsageError(f"reference folder '{folder}' holds no sound ({', '.join(AUDIO_SUFFIXES)}).")
    parts: list[Tensor] = []
    broken: list[Path] = []
    for path in files:
        try:
            samples, rate = read_audio(path, max_seconds=_LONGEST_S)
        except UsageError:
            broken.append(path)
            continue
        if not bool(torch.isfinite(samples).all()):
            broken.append(path)
            continue
        with torch.no_grad():
            parts.append(encoder.frames(samples.mean(0, keepdim=True), rate)[0].cpu())
    if not parts:
        raise UsageError(f"none of the {len(files)} sound files in '{folder}' can be read; first: {broken[0].name}.")
    if broken:
        names = ", ".join(path.name for path in broken[:5]) + (", …" if len(broken) > 5 else "")
        warnings.warn(f"reference '{folder}': skipped {len(broken)} of {len(files)} files: {names}", stacklevel=2)
    return _gaussian(parts, encoder, str(folder)), broken


@torch.no_grad()
def from_clips(clips: Float[Tensor, "n samples"], rate: int, encoder: Encoder, batch_size: int = 32) -> Gaussian:
    """Statistics of all frames of a batch of mono clips; made the bundled ones (gencontrol/bundled/reference).

    Raises:
        UsageError: fewer than two frames in all, or clips that are not finite.
    """
    frames = [encoder.frames(part, rate).flatten(0, 1).cpu() for part in clips.split(batch_size)]
    return _gaussian(frames, encoder, f"{len(clips)} clips")


def _gaussian(parts: Sequence[Tensor], encoder: Encoder, source: str) -> Gaussian:
    """Statistics with a warning where the sample is too small for a full covariance."""
    rows = torch.cat(list(parts))
    if rows.shape[0] < 2:
        raise UsageError(f"reference '{source}' gives {rows.shape[0]} embedding; at least 2 are needed.")
    if rows.shape[0] <= rows.shape[1]:
        warnings.warn(
            f"reference '{source}' gives {rows.shape[0]} embeddings of {rows.shape[1]} dimensions: its covariance is "
            "singular, distances are exact for it but biased; more examples are better.",
            stacklevel=3,
        )
    return Gaussian.of(rows, encoder.name)


def load_reference(reference: str | Path | Gaussian, encoder: Encoder) -> Gaussian:
    """Return reference statistics for an encoder.

    Args:
        reference: "bundled", a folder of sound, a `.txt` file of captions, a `.safetensors` file that `Gaussian.save`
            wrote, or statistics.

    Raises:
        UsageError: none of these, unreadable, or made by another encoder.
        EnvironmentMissing: the bundled statistics of this encoder are not in this installation.
    """
    if isinstance(reference, Gaussian):
        return _same_encoder(reference, encoder, "the given statistics")
    if str(reference) == "bundled":
        name = f"reference/{encoder.name.split(':')[0]}.safetensors"
        remedy = "give reference a folder of sound, a .txt file of captions, or a .safetensors file"
        path = bundled_path(name, "bundled reference for this encoder", remedy)
        return _same_encoder(Gaussian.load(path), encoder, str(path))
    source = Path(reference).expanduser()
    if source.is_dir():
        return from_folder(source, encoder)[0]
    if source.suffix == ".txt":
        return from_captions(source, encoder)
    if source.suffix == ".safetensors" and source.is_file():
        return _same_encoder(Gaussian.load(source), encoder, str(source))
    raise UsageError(
        f"reference '{reference}' is neither 'bundled', a folder of sound, a .txt file of captions, nor a .safetensors "
        "file of statistics."
    )


def _same_encoder(statistics: Gaussian, encoder: Encoder, source: str) -> Gaussian:
    """Refuse statistics of another encoder; statistics without a name are taken as they are."""
    if statistics.encoder and statistics.encoder != encoder.name:
        raise UsageError(
            f"{source} was made by encoder '{statistics.encoder}', the reward uses '{encoder.name}'; make the "
            "statistics again with the same settings."
        )
    return statistics
