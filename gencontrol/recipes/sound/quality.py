"""Measured quality of the bundled sound models on held-out clips, and the model cards that quote it.

    python -m gencontrol.recipes.sound.quality clap --data DATA --model FOLDER --run RUN

measures, prints JSON, and writes README.md and a picture beside the weights; `codec --fit 4000` fits the codec first.
The test split holds combinations of attributes that training never saw; "through the codec" means encoded and decoded
first, as generated clips are.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.models.networks.codec import MelCodec
from gencontrol.recipes.sound.data.dataset import SoundDataset
from gencontrol.recipes.sound.retrieval import retrieval_at_one

CHUNK = 50


def _through(codec: MelCodec | None, wave: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    return wave if codec is None else codec.decode(codec.encode(wave))


@torch.no_grad()
def codec_quality(codec: MelCodec, dataset: SoundDataset, *, clips: int = 200) -> dict[str, float]:
    """Explained variance of the projection, log-spectral distances in dB, CPU ms per clip of decoding (batch 16)."""
    wave = dataset.waveforms(np.arange(min(clips, len(dataset))))
    mel, latent = codec.log_mel(wave), codec.encode(wave)
    kept = codec.decode_mel(latent)
    start = time.process_time()
    decoded = torch.cat([codec.decode(part) for part in latent.split(16)])
    seconds = time.process_time() - start
    again = codec.log_mel(decoded)
    spread = (mel - codec.mean.reshape(-1, codec.config.mel_bins).mean(0)).square().sum()

    def distance(a: Tensor, b: Tensor) -> float:
        return float((20 / math.log(10) * (a - b)).square().mean(-1).sqrt().mean())

    return {
        "clips": len(wave),
        "explained_variance": float(1 - (mel - kept).square().sum() / spread),
        "projection_distance_db": distance(mel, kept),
        "decoded_distance_db": distance(mel, again),
        "latent_error": float((codec.encode(decoded) - latent).square().mean()),
        "latent_std": float(latent.std()),
        "decode_cpu_ms_per_clip": 1000 * seconds / len(wave),
        "threads": torch.get_num_threads(),
    }


@torch.no_grad()
def clap_embeddings(
    folder: str | Path, dataset: SoundDataset, *, codec: MelCodec | None
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Embeddings of the first caption and of the sound of every clip of a split."""
    from gencontrol.models.readers.clap import audio_embeddings, load_clap, text_embeddings

    model, tokenizer, extractor = load_clap(folder)
    audio, text = [], []
    for start in range(0, len(dataset), CHUNK):
        items = np.arange(start, min(start + CHUNK, len(dataset)))
        audio.append(audio_embeddings(model, extractor, _through(codec, dataset.waveforms(items))))
        text.append(text_embeddings(model, tokenizer, [dataset.captions[i][0] for i in items]))
    return torch.cat(text), torch.cat(audio)


def clap_retrieval(
    folder: str | Path, dataset: SoundDataset, *, candidates: int = 20, seed: int = 0, codec: MelCodec | None = None
) -> dict[str, float]:
    """Retrieval among `candidates` in both directions, and mean cosine of right and wrong pairs."""
    text, audio = clap_embeddings(folder, dataset, codec=codec)
    cosine = text @ audio.T
    count = len(text)
    right = cosine.diagonal().mean()
    return {
        "clips": count,
        "caption_to_clip": retrieval_at_one(text, audio, candidates=candidates, seed=seed),
        "clip_to_caption": retrieval_at_one(audio, text, candidates=candidates, seed=seed),
        "cosine_right": float(right),
        "cosine_wrong": float((cosine.sum() - cosine.trace()) / (count * (count - 1))),
    }


@torch.no_grad()
def attribute_predictions(
    folder: str | Path, dataset: SoundDataset, *, codec: MelCodec | None = None
) -> dict[str, np.ndarray]:
    """Predicted class of every attribute for every clip of a split."""
    from gencontrol.models.readers.attributes import AttributeNet

    net = AttributeNet.from_pretrained(folder)
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(dataset), CHUNK):
        items = np.arange(start, min(start + CHUNK, len(dataset)))
        for name, logits in net(_through(codec, dataset.waveforms(items))).items():
            parts.setdefault(name, []).append(logits.argmax(-1).numpy())
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def attribute_accuracy(folder: str | Path, dataset: SoundDataset, *, codec: MelCodec | None = None) -> dict[str, float]:
    """Accuracy of each attribute over the clips it applies to."""
    predicted = attribute_predictions(folder, dataset, codec=codec)
    truth = dataset.labels
    return {name: float((rows == truth[name])[truth[name] >= 0].mean()) for name, rows in predicted.items()}


def fit_codec(data: str | Path, folder: str | Path, *, clips: int) -> dict[str, float]:
    """Fit a MelCodec on `clips` evenly spaced training clips and save it; returns what `MelCodec.fit` reports."""
    train = SoundDataset.load(data, "train")
    codec = MelCodec()
    report = codec.fit(train.waveforms(np.arange(0, len(train), max(len(train) // clips, 1))[:clips]))
    codec.save_pretrained(folder)
    return report


def measure(kind: str, model: Path, data: Path, codec: MelCodec | None) -> dict[str, Mapping[str, float]]:
    """All numbers of one model card, by section; test split."""
    test = SoundDataset.load(data, "test")
    if kind == "codec":
        return {"test clips": codec_quality(MelCodec.from_pretrained(model), test)}
    if kind == "text_to_audio":
        from gencontrol.recipes.sound.generation_quality import generation_quality

        return dict(generation_quality(model, test))
    score = {"clap": clap_retrieval, "attributes": attribute_accuracy}[kind]
    sections: dict[str, Mapping[str, float]] = {"test clips": score(model, test)}
    if codec is not None:
        sections["test clips through the codec"] = score(model, test, codec=codec)
    return sections


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kind", choices=("codec", "clap", "attributes", "text_to_audio"))
    parser.add_argument("--data", type=Path, required=True, help="folder of the sound data")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model; the card is written into it")
    parser.add_argument("--codec", type=Path, help="folder of the codec, to measure through it too")
    parser.add_argument("--run", type=Path, help="run folder that made the model; the card quotes what it recorded")
    parser.add_argument("--fit", type=int, default=0, help="codec only: fit it on that many training clips first")
    parser.add_argument("--reuse", action="store_true", help="write the card from measured.json, measure nothing")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if (options.kind == "codec") != (options.run is None):
        parser.error("--run is needed by all but the codec, which has none")
    if options.fit and options.kind != "codec":
        parser.error("--fit is for the codec")
    return options


def main() -> None:
    """Measure one model and write its card."""
    options = _arguments()
    torch.set_num_threads(options.threads)
    if options.fit:
        fit_codec(options.data, options.model, clips=options.fit)
    if options.reuse:
        sections = json.loads((options.model / "measured.json").read_text())
    else:
        codec = None if options.codec is None else MelCodec.from_pretrained(options.codec)
        sections = measure(options.kind, options.model, options.data, codec)
    from gencontrol.recipes.sound.cards import origin_of_run, write_card

    command = " ".join(["python -m gencontrol.recipes.sound.quality", *sys.argv[1:]])
    origin = [f"    {command}"] if options.run is None else origin_of_run(options.run)
    write_card(options.kind, options.model, options.data, sections, origin)
    print(json.dumps(sections, indent=1))


if __name__ == "__main__":
    main()
