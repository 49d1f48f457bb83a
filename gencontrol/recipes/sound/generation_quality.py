"""Quality of a text-to-audio model on held-out captions: what it plays, and how far its sound lies from real clips.

The instrument of a generated clip is judged twice: by the CLAP, zero-shot among the instruments' names, and by the
attribute judge, which no text-to-audio model here was trained with.  The Fréchet distance (FAD) to held-out real clips
is taken in both encoders and compared with that of white noise shaped to the real clips' mean spectrum.
`gencontrol bench sound-generation --tuned FOLDER --data DATA` compares two models so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.config import Count, options
from gencontrol.files import existing
from gencontrol.recipes.sound.data.dataset import SAMPLE_RATE, SoundDataset
from gencontrol.recipes.sound.data.grammar import ATTRIBUTES
from gencontrol.rng import stream
from gencontrol.weights import BUNDLED

CHUNK = 50
ENCODERS = ("clap", "attributes")
JUDGED = ("instrument", "tempo", "register", "dynamics", "effect")


def shaped_noise(real: Float[Tensor, "n samples"], seed: int) -> Float[Tensor, "n samples"]:
    """White noise given the mean magnitude spectrum of `real`: right colour, no music."""
    spectrum = torch.fft.rfft(real).abs().square().mean(0).sqrt()
    noise = torch.fft.rfft(torch.randn(real.shape, generator=stream(seed, "quality/noise")))
    shaped = torch.fft.irfft(noise / noise.abs().square().mean(0).sqrt() * spectrum, real.shape[1])
    return shaped.clamp(-1, 1)


@torch.no_grad()
def zero_shot_instrument(wave: Float[Tensor, "n samples"], clap: str | Path, truth: np.ndarray) -> float:
    """Share of clips whose nearest instrument name under the CLAP is the true one."""
    from gencontrol.models.readers.clap import audio_embeddings, load_clap, text_embeddings

    model, tokenizer, extractor = load_clap(clap)
    names = text_embeddings(model, tokenizer, list(ATTRIBUTES["instrument"]))
    sound = torch.cat([audio_embeddings(model, extractor, part) for part in wave.split(CHUNK)])
    return float(((sound @ names.T).argmax(1).numpy() == truth).mean())


@torch.no_grad()
def judged(wave: Float[Tensor, "n samples"], judge: str | Path, labels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """For each attribute, 1 where the judge finds the true class, 0 elsewhere, NaN where it does not apply [n]."""
    from gencontrol.models.readers.attributes import AttributeNet

    net = AttributeNet.from_pretrained(judge)
    rows = [{name: logits.argmax(-1).numpy() for name, logits in net(part).items()} for part in wave.split(CHUNK)]
    guess = {name: np.concatenate([row[name] for row in rows]) for name in JUDGED}
    return {name: np.where(labels[name] >= 0, (guess[name] == labels[name]).astype(float), np.nan) for name in JUDGED}


@torch.no_grad()
def generate_clips(
    model: str | Path, prompts: list[str], *, steps: int | None, guidance_scale: float | None, seed: int
) -> Float[Tensor, "n samples"]:
    """One clip per prompt; clip i starts from the noise of seed + i whatever the model: models can be paired."""
    from gencontrol.pipelines import TextToAudioPipeline

    pipe: Any = TextToAudioPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, len(prompts), CHUNK):
        part = prompts[start : start + CHUNK]
        seeds = [seed + start + i for i in range(len(part))]
        sound = pipe(
            part, num_inference_steps=steps, guidance_scale=guidance_scale, seed=seeds, output_type="pt"
        ).audios
        parts.append(sound.reshape(len(part), -1).float())
    return torch.cat(parts)


@torch.no_grad()
def clip_frames(wave: Float[Tensor, "n samples"], encoder: str) -> Float[Tensor, "n f d"]:
    """Frame embeddings of every clip in float64."""
    from gencontrol.rewards.audio.encoders import make_encoder

    made = make_encoder(encoder)
    return torch.cat([made.frames(part, SAMPLE_RATE) for part in wave.split(CHUNK)]).double()


def generation_quality(
    model: str | Path, test: SoundDataset, *, clips: int = 300, steps: int | None = None, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Generate one clip per held-out caption with the model's own defaults and measure it beside the real clips.

    Args:
        model: folder of a TextToAudioPipeline, or "bundled".
        test: held-out clips whose first captions are the prompts.
        clips: how many of them.
        steps: sampler steps; None takes the model's default.
        seed: of the noise.
    """
    from gencontrol.rewards.distribution import frechet_distance

    items = np.arange(min(clips, len(test)))
    real = test.waveforms(items)
    prompts = [test.captions[i][0] for i in items]
    made = generate_clips(model, prompts, steps=steps, guidance_scale=None, seed=seed)
    labels = {name: rows[items] for name, rows in test.labels.items()}
    others = test.waveforms(np.arange(len(items), min(2 * len(items), len(test))))
    reference = {name: clip_frames(others, name).flatten(0, 1) for name in ENCODERS}
    sections: dict[str, dict[str, float]] = {}
    for name, wave in (("generated", made), ("real", real), ("shaped noise", shaped_noise(real, seed))):
        found = {"clips": float(len(wave))}
        found["instrument_by_clap"] = zero_shot_instrument(wave, BUNDLED / "clap", labels["instrument"])
        right = judged(wave, BUNDLED / "attributes", labels)
        found |= {f"{key}_by_judge": float(np.nanmean(value)) for key, value in right.items()}
        for encoder, known in reference.items():
            found[f"fad_{encoder}"] = float(frechet_distance(clip_frames(wave, encoder).flatten(0, 1), known))
        sections[f"{name} clips"] = found
    return sections


def compare_models(
    tuned: str | Path,
    base: str | Path,
    test: SoundDataset,
    *,
    clips: int,
    steps: int,
    guidance_scale: float,
    seed: int = 0,
    halves: int = 200,
) -> dict[str, dict[str, float]]:
    """Paired difference tuned − base, with 95 % intervals, in everything that no reward was trained on.

    Judged attributes: shares of right clips.  FAD in the judge's encoder against real clips of other captions, compared
    on halves of the prompts, the same for both models (`compare_sets`).
    """
    from gencontrol.rewards.distribution import frechet_distance
    from gencontrol.stats import compare_sets, pair

    items = np.arange(min(clips, len(test) // 2))
    prompts = [test.captions[i][0] for i in items]
    labels = {name: rows[items] for name, rows in test.labels.items()}
    waves = [
        generate_clips(model, prompts, steps=steps, guidance_scale=guidance_scale, seed=seed) for model in (tuned, base)
    ]
    right = [judged(wave, BUNDLED / "attributes", labels) for wave in waves]
    rows: dict[str, dict[str, float]] = {}
    for name in JUDGED:
        ours, theirs = (values[name] for values in right)
        held = ~np.isnan(ours)
        gain = pair(theirs[held] > 0.5, ours[held] > 0.5).difference
        rows[name] = {
            "tuned": float(ours[held].mean()),
            "base": float(theirs[held].mean()),
            "difference": gain.value,
            "low": gain.low,
            "high": gain.high,
        }
    reference = clip_frames(test.waveforms(np.arange(len(test) - len(items), len(test))), "attributes").flatten(0, 1)
    frames = [clip_frames(wave, "attributes") for wave in waves]

    def distance(chosen: Tensor, side: bool) -> float:
        return float(frechet_distance(frames[0 if side else 1][chosen].flatten(0, 1), reference))

    everything, draws = torch.arange(len(items)), stream(seed, "quality/halves")
    _, gap = compare_sets(distance, len(items), subset=len(items) // 2, draws=halves, generator=draws)
    rows["fad_attributes"] = {
        "tuned": distance(everything, True),
        "base": distance(everything, False),
        "difference": gap.value,
        "low": gap.low,
        "high": gap.high,
    }
    return rows


@options
class Options:
    """What is compared, by sound that no reward was trained on.

    Args:
        tuned: folder of the tuned model.
        base: folder or name of the model before.
        data: folder of the sound data.
        clips: held-out captions, a clip of each model for each.
        steps: of the sampler.
        guidance: classifier-free guidance scale.
        threads: of the CPU.
    """

    tuned: str
    data: str
    base: str = "bundled"
    clips: Count = 200
    steps: Count = 12
    guidance: float = 1.0
    threads: Count = 1


def main(options: Options) -> None:
    """Print the comparison of two models as JSON."""
    torch.set_num_threads(options.threads)
    data = existing(options.data)
    rows = compare_models(
        options.tuned,
        options.base,
        SoundDataset.load(data, "test"),
        clips=options.clips,
        steps=options.steps,
        guidance_scale=options.guidance,
    )
    print(json.dumps(rows, indent=1))
