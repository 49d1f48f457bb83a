"""Measured quality of the bundled sound models on held-out clips, and the model cards that quote it.

    gencontrol bench sound-quality --kind clap --data DATA --model FOLDER --run RUN

measures, prints JSON, and writes README.md and a picture beside the weights; `--kind codec --fit 4000` fits the codec
first. The test split holds combinations of attributes that training never saw; "through the codec" means encoded and
decoded first, as generated clips are.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.config import Count, options
from gencontrol.data.images import png_grid
from gencontrol.files import existing
from gencontrol.models.networks.codec import MelCodec
from gencontrol.recipes.sound.data.dataset import SoundDataset
from gencontrol.recipes.sound.data.grammar import ATTRIBUTES, HELD_OUT_TEST
from gencontrol.recipes.sound.generation_quality import generate_clips, generation_quality
from gencontrol.recipes.sound.retrieval import retrieval_at_one
from gencontrol.reports.card import origin_of_run, write_measured
from gencontrol.reports.charts import heatmap, svg_file

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
        return dict(generation_quality(model, test))
    score = {"clap": clap_retrieval, "attributes": attribute_accuracy}[kind]
    sections: dict[str, Mapping[str, float]] = {"test clips": score(model, test)}
    if codec is not None:
        sections["test clips through the codec"] = score(model, test, codec=codec)
    return sections


WHAT = {
    "codec": (
        "MelCodec",
        "Linear codec of the bundled text-to-audio model: log-mel frames, principal components, Griffin-Lim. "
        "Waveform [b, n] at 16 kHz <-> latent tokens [b, n/512, 64]. Load with "
        "`gencontrol.models.networks.codec.MelCodec.from_pretrained`.",
    ),
    "clap": (
        "Small CLAP",
        "Contrastive audio-text model in transformers' own classes, for clips of about 2 s at 16 kHz (3 s at most). "
        "Load with `ClapModel.from_pretrained`, `AutoTokenizer` and `AutoFeatureExtractor`, as any CLAP.",
    ),
    "attributes": (
        "Attribute judge",
        "Convolutional classifier of instrument, mode, tempo, register, dynamics, effect and pattern, with 128-d "
        "embeddings per clip and per 64 ms; independent of CLAP, no reward is trained on it. Load with "
        "`gencontrol.models.readers.attributes.AttributeNet.from_pretrained`.",
    ),
    "text_to_audio": (
        "Text to audio",
        "Flow-matching transformer over the codec's latents, conditioned on the text half of the bundled CLAP. "
        "Load with `gencontrol.pipelines.TextToAudioPipeline.from_pretrained`. Numbers below: one clip per held-out "
        "caption with the model's default steps and guidance; `…_by_clap` is zero-shot among the 20 instrument names, "
        "`…_by_judge` the attribute judge; FAD against other held-out clips.",
    ),
}

CAPTION = {
    "text_to_audio": "Log-mel of six held-out captions: generated (top) and real (bottom)",
    "codec": "Log-mel of three test clips, before (top) and after (bottom) the codec",
    "clap": "Cosine of 20 test captions with their 20 clips; the diagonal is right",
    "attributes": "Confusion of instruments on the test clips",
}


def write_card(kind: str, model: Path, data: Path, sections: Mapping[str, Mapping[str, float]], origin: str) -> None:
    """Write README.md and its picture into the model's folder, and measured.json beside them."""
    title, text = WHAT[kind]
    recipe = json.loads((data / "recipe.json").read_text())
    sizes, test = recipe["sizes"], SoundDataset.load(data, "test")
    write_measured(
        model,
        sections,
        title=title,
        text=text,
        origin=origin,
        source=f"Data: `build_sound_dataset(folder, train={sizes['train']}, val={sizes['val']}, test={sizes['test']}, "
        f"seed={recipe['seed']})`: clips rendered here from a grammar (General MIDI timbres of FluidR3_GM.sf2 by "
        "fluidsynth, and numpy voices); no recorded music, no foreign weights. Test and validation hold combinations "
        f"of attributes that training never saw ({HELD_OUT_TEST} % of all are test).",
        note=f"Numbers by `gencontrol bench sound-quality --kind {kind}`, also in `measured.json`.",
        caption=CAPTION[kind],
        picture=DRAW[kind](model, test),
    )


def _draw_codec(model: Path, test: SoundDataset) -> tuple[str, bytes]:
    """Spectrograms of three clips, before (top) and after (bottom) the codec."""
    codec = MelCodec.from_pretrained(model)
    wave = test.waveforms([0, 1, 2])
    return "card.png", _spectrograms(codec, wave, codec.decode(codec.encode(wave)))


def _draw_text_to_audio(model: Path, test: SoundDataset) -> tuple[str, bytes]:
    """Spectrograms of six held-out captions, generated (top) and real (bottom)."""
    made = generate_clips(model, [test.captions[i][0] for i in range(6)], steps=None, guidance_scale=None, seed=0)
    return "card.png", _spectrograms(MelCodec.from_pretrained(model / "codec"), made, test.waveforms(range(6)))


def _spectrograms(codec: MelCodec, top: Float[Tensor, "n t"], bottom: Float[Tensor, "n t"]) -> bytes:
    """Log-mel pictures of the clips in two rows, time to the right and pitch upwards."""
    mels = torch.cat([codec.log_mel(top), codec.log_mel(bottom)]).transpose(1, 2).flip(1)
    return png_grid(((mels + 9.2) / 8.2).clamp(0, 1)[:, None], columns=len(top), zoom=2)


def _draw_clap(model: Path, test: SoundDataset) -> tuple[str, bytes]:
    """Cosine of 20 test captions with their 20 clips."""
    few = replace(test, pcm=test.pcm[:20], captions=test.captions[:20])
    text, audio = clap_embeddings(model, few, codec=None)
    names = [variants[0] for variants in few.captions]
    drawing = heatmap((text @ audio.T).tolist(), names, list(map(str, range(20))), title=CAPTION["clap"])
    return "card.svg", svg_file([drawing]).encode()


def _draw_attributes(model: Path, test: SoundDataset) -> tuple[str, bytes]:
    """Confusion of instruments on the test split."""
    names = ATTRIBUTES["instrument"]
    table = np.zeros((len(names), len(names)))
    np.add.at(table, (test.labels["instrument"], attribute_predictions(model, test)["instrument"]), 1)
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    return "card.svg", svg_file([heatmap(shares.tolist(), names, names, title=CAPTION["attributes"])]).encode()


DRAW = {
    "codec": _draw_codec,
    "clap": _draw_clap,
    "attributes": _draw_attributes,
    "text_to_audio": _draw_text_to_audio,
}


@options
class Options:
    """What is measured.

    Args:
        kind: which of the models.
        data: folder of the sound data.
        model: folder of the model; the card is written into it.
        codec: folder of the codec, to measure through it too.
        run: run folder that made the model; the card quotes what it recorded. The codec has none.
        fit: codec only: fit it on that many training clips first.
        reuse: write the card from measured.json, measure nothing.
        threads: of the CPU.
    """

    kind: Literal["codec", "clap", "attributes", "text_to_audio"]
    data: str
    model: str
    codec: str | None = None
    run: str | None = None
    fit: int = 0
    reuse: bool = False
    threads: Count = 1

    def __post_init__(self) -> None:
        if (self.kind == "codec") != (self.run is None):
            raise ValueError("run is needed by all but the codec, which has none.")
        if self.fit and self.kind != "codec":
            raise ValueError("fit is for the codec; leave it out.")


def main(options: Options) -> None:
    """Measure one model and write its card."""
    torch.set_num_threads(options.threads)
    model, data = Path(options.model) if options.fit else existing(options.model), existing(options.data)
    if options.fit:
        fit_codec(data, model, clips=options.fit)
    if options.reuse:
        sections = json.loads((model / "measured.json").read_text())
    else:
        codec = None if options.codec is None else MelCodec.from_pretrained(options.codec)
        sections = measure(options.kind, model, data, codec)
    command = f"gencontrol bench sound-quality --kind codec --data {data} --model {model}"
    command += f" --fit {options.fit}" if options.fit else ""
    origin = f"    {command}" if options.run is None else origin_of_run(Path(options.run))
    write_card(options.kind, model, data, sections, origin)
    print(json.dumps(sections, indent=1))
