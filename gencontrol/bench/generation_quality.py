"""Quality of a text-to-audio model on held-out captions: what it plays, and how far its sound lies from real clips.

The instrument of a generated clip is judged twice: by the CLAP, zero-shot among the instruments' names, and by the
attribute judge, which no text-to-audio model here was trained with.  The Fréchet distance (FAD) to held-out real clips
is taken in both encoders and compared with that of white noise shaped to the real clips' mean spectrum.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.data.sound.dataset import SAMPLE_RATE, SoundDataset
from gencontrol.data.sound.grammar import ATTRIBUTES
from gencontrol.rng import stream

BUNDLED = Path(__file__).resolve().parent.parent / "bundled"
CHUNK = 50
JUDGED = ("instrument", "tempo", "register", "dynamics", "effect")


def shaped_noise(real: Float[Tensor, "n samples"], seed: int) -> Float[Tensor, "n samples"]:
    """White noise given the mean magnitude spectrum of `real`: right colour, no music."""
    spectrum = torch.fft.rfft(real).abs().square().mean(0).sqrt()
    noise = torch.fft.rfft(torch.randn(real.shape, generator=stream(seed, "quality/noise")))
    shaped = torch.fft.irfft(noise / noise.abs().square().mean(0).sqrt() * spectrum, real.shape[1])
    return shaped.clamp(-1, 1)


def zero_shot_instrument(wave: Float[Tensor, "n samples"], clap: str | Path, truth: np.ndarray) -> float:
    """Share of clips whose nearest instrument name under the CLAP is the true one."""
    from gencontrol.models.clap_small import audio_embeddings, load_clap, text_embeddings

    model, tokenizer, extractor = load_clap(clap)
    names = text_embeddings(model, tokenizer, list(ATTRIBUTES["instrument"]))
    sound = torch.cat([audio_embeddings(model, extractor, part) for part in wave.split(CHUNK)])
    return float(((sound @ names.T).argmax(1).numpy() == truth).mean())


def judged(wave: Float[Tensor, "n samples"], judge: str | Path, labels: dict[str, np.ndarray]) -> dict[str, float]:
    """Accuracy of the attribute judge on each attribute, over the clips it applies to."""
    from gencontrol.models.attributes import AttributeNet

    net = AttributeNet.from_pretrained(judge)
    rows = [{name: logits.argmax(-1).numpy() for name, logits in net(part).items()} for part in wave.split(CHUNK)]
    guess = {name: np.concatenate([row[name] for row in rows]) for name in JUDGED}
    return {name: float((guess[name] == labels[name])[labels[name] >= 0].mean()) for name in JUDGED}


@torch.no_grad()
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
    from gencontrol.pipelines import TextToAudioPipeline
    from gencontrol.rewards.distribution import frechet_distance
    from gencontrol.rewards.encoders import make_encoder

    pipe = TextToAudioPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    items = np.arange(min(clips, len(test)))
    prompts, real = [test.captions[i][0] for i in items], test.waveforms(items)
    parts = []
    for start in range(0, len(prompts), CHUNK):
        part = prompts[start : start + CHUNK]
        seeds = [seed + start + i for i in range(len(part))]
        parts.append(pipe(part, num_inference_steps=steps, seed=seeds, output_type="pt").audios.reshape(len(part), -1))
    made, noise = torch.cat(parts).float(), shaped_noise(real, seed)
    labels = {name: rows[items] for name, rows in test.labels.items()}
    sections: dict[str, dict[str, float]] = {}
    for name, wave in (("generated", made), ("real", real), ("shaped noise", noise)):
        found = {"clips": float(len(wave))}
        found["instrument_by_clap"] = zero_shot_instrument(wave, BUNDLED / "clap", labels["instrument"])
        found |= {f"{key}_by_judge": value for key, value in judged(wave, BUNDLED / "attributes", labels).items()}
        sections[f"{name} clips"] = found
    others = test.waveforms(np.arange(len(items), min(2 * len(items), len(test))))
    for encoder_name in ("clap", "attributes"):
        encoder = make_encoder(encoder_name)
        embedded = {
            name: torch.cat([encoder.frames(part, SAMPLE_RATE).flatten(0, 1) for part in wave.split(CHUNK)])
            for name, wave in (("generated", made), ("real", real), ("shaped noise", noise), ("reference", others))
        }
        for name in ("generated", "real", "shaped noise"):
            distance = float(frechet_distance(embedded[name].double(), embedded["reference"].double()))
            sections[f"{name} clips"][f"fad_{encoder_name}"] = distance
    return sections
