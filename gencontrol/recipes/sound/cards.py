"""Model cards of the bundled sound models: README.md with measured numbers, and one small picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gencontrol.recipes.sound.data.dataset import SoundDataset
from gencontrol.recipes.sound.data.grammar import ATTRIBUTES, HELD_OUT_TEST

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


def write_card(
    kind: str, model: Path, data: Path, sections: Mapping[str, Mapping[str, float]], origin: Sequence[str]
) -> None:
    """Write README.md and its picture into the model's folder, and measured.json beside them."""
    title, text = WHAT[kind]
    recipe = json.loads((data / "recipe.json").read_text())
    size = sum(path.stat().st_size for path in model.rglob("*.safetensors")) / 1e6
    lines = [f"# {title}", "", text, "", f"Weights: {size:.2f} MB, safetensors. Licence: the repository's.", ""]
    lines += ["## How it was made", "", *origin, "", _data_text(recipe), "", "## Measured", ""]
    for name, numbers in sections.items():
        lines += [f"{name[0].upper()}{name[1:]}:", "", "| quantity | value |", "|---|---|"]
        lines += [f"| {key} | {_number(value)} |" for key, value in numbers.items()]
        lines += [""]
    lines += [f"Numbers by `python -m gencontrol.recipes.sound.quality {kind}`, also in `measured.json`.", ""]
    lines += [f"![{CAPTION[kind]}](card.png)", "", f"{CAPTION[kind]}.", ""]
    (model / "README.md").write_text("\n".join(lines))
    (model / "measured.json").write_text(json.dumps(sections, indent=1) + "\n")
    _picture(kind, model, SoundDataset.load(data, "test"))


def origin_of_run(run: Path, machine: str = "shared with other work") -> list[str]:
    """Lines that say by which commands, where and how long a run folder's model was trained, as the run recorded it."""
    starts = json.loads((run / "run.json").read_text())["starts"]
    start, last = starts[0], json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    versions = ", ".join(f"{name} {start['versions'][name]}" for name in ("gencontrol", "torch", "transformers"))
    commands = [f"    {start['command']}"]
    for before, after in pairwise(starts):
        if after["command"] != before["command"]:
            commands += ["", f"then, from step {after['step']}:", "", f"    {after['command']}"]
    return [
        *commands,
        "",
        f"{last['step']} steps in {last['time/wall']:.0f} s of wall time ({start['device']}, {machine}; "
        f"{versions}; commit {start['commit']}).",
    ]


def _data_text(recipe: Mapping[str, Any]) -> str:
    sizes = recipe["sizes"]
    return (
        f"Data: `build_sound_dataset(folder, train={sizes['train']}, val={sizes['val']}, test={sizes['test']}, "
        f"seed={recipe['seed']})`: clips rendered here from a grammar (General MIDI timbres of FluidR3_GM.sf2 by "
        "fluidsynth, and numpy voices); no recorded music, no foreign weights. Test and validation hold combinations "
        f"of attributes that training never saw ({HELD_OUT_TEST} % of all are test)."
    )


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _picture(kind: str, model: Path, test: SoundDataset) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    draw = {
        "codec": _draw_codec,
        "clap": _draw_clap,
        "attributes": _draw_attributes,
        "text_to_audio": _draw_text_to_audio,
    }[kind]
    figure = draw(pyplot, model, test)
    figure.tight_layout()
    figure.savefig(model / "card.png", dpi=60)
    pyplot.close(figure)


def _draw_codec(pyplot: Any, model: Path, test: SoundDataset) -> Any:
    """Spectrograms of three clips, before (top) and after (bottom) the codec."""
    from gencontrol.models.networks.codec import MelCodec

    codec = MelCodec.from_pretrained(model)
    wave = test.waveforms([0, 1, 2])
    pictures = (codec.log_mel(wave), codec.log_mel(codec.decode(codec.encode(wave))))
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6))
    for row, mels in enumerate(pictures):
        for column in range(3):
            axis = axes[row, column]
            axis.imshow(
                mels[column].T.numpy(), origin="lower", aspect="auto", vmin=-9.2, vmax=-1, extent=(0, 2.048, 0, 80)
            )
            axis.set_title(f"{'decoded: ' if row else ''}{test.captions[column][0]}"[:60], fontsize=8)
            axis.set_xlabel("s")
            axis.set_ylabel("mel band")
    return figure


def _draw_text_to_audio(pyplot: Any, model: Path, test: SoundDataset) -> Any:
    """Spectrograms of six held-out captions, generated (top) and real (bottom)."""
    from gencontrol.models.networks.codec import MelCodec
    from gencontrol.recipes.sound.generation_quality import generate_clips

    codec = MelCodec.from_pretrained(model / "codec")
    prompts = [test.captions[i][0] for i in range(6)]
    made = generate_clips(model, prompts, steps=None, guidance_scale=None, seed=0)
    figure, axes = pyplot.subplots(2, 6, figsize=(24, 6))
    for row, wave in enumerate((made, test.waveforms(range(6)))):
        for column, mel in enumerate(codec.log_mel(wave)):
            axis = axes[row, column]
            axis.imshow(mel.T.numpy(), origin="lower", aspect="auto", vmin=-9.2, vmax=-1, extent=(0, 2.048, 0, 80))
            axis.set_title(f"{'real' if row else 'generated'}: {prompts[column]}"[:52], fontsize=8)
            axis.set_xlabel("s")
    return figure


def _draw_clap(pyplot: Any, model: Path, test: SoundDataset) -> Any:
    """Cosine of 20 test captions with their 20 clips."""
    from dataclasses import replace

    from gencontrol.recipes.sound.quality import clap_embeddings

    few = replace(test, pcm=test.pcm[:20], captions=test.captions[:20])
    text, audio = clap_embeddings(model, few, codec=None)
    figure, axis = pyplot.subplots(figsize=(12, 6))
    shown = axis.imshow((text @ audio.T).numpy(), cmap="magma")
    axis.set_yticks(range(20), [variants[0][:70] for variants in few.captions], fontsize=8)
    axis.set_xlabel("clip")
    figure.colorbar(shown, label="cosine")
    return figure


def _draw_attributes(pyplot: Any, model: Path, test: SoundDataset) -> Any:
    """Confusion of instruments on the test split."""
    from gencontrol.recipes.sound.quality import attribute_predictions

    names = ATTRIBUTES["instrument"]
    predicted = attribute_predictions(model, test)["instrument"]
    table = np.zeros((len(names), len(names)))
    np.add.at(table, (test.labels["instrument"], predicted), 1)
    figure, axis = pyplot.subplots(figsize=(9, 8))
    axis.imshow(table / np.maximum(table.sum(1, keepdims=True), 1), cmap="magma")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_xticks(range(len(names)), names, fontsize=8, rotation=90)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    return figure
