"""Measured quality of the bundled scene models, and the model cards that quote it.

    gencontrol bench scenes-quality --bundled gencontrol/bundled --run RUN --readers-run RUN

The exact analysis, the reader and the judge are measured on rendered held-out scenes, clean and damaged; the generator
on held-out captions of every category by the reward `compositional`, with the words' reading beside it, and by the
Fréchet distance to real scenes of the same captions in the judge's embedding, beside that of other real scenes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.config import Count, options
from gencontrol.data.images import png_grid
from gencontrol.files import existing
from gencontrol.recipes.scenes.data import CATEGORIES, parse
from gencontrol.recipes.scenes.data.corpus import sample_captions
from gencontrol.recipes.scenes.data.render import Scene, arrange, render
from gencontrol.recipes.scenes.data.words import damage
from gencontrol.recipes.scenes.networks import SceneJudge, attributes_of
from gencontrol.reports.card import origin_of_run, write_measured
from gencontrol.rewards import load_reward
from gencontrol.rewards.distribution import frechet_distance
from gencontrol.rng import stream, stream_seed
from gencontrol.types import RewardContext

#: (blur in pixels, noise in units of the range): standard deviations of the damage under which is measured
DAMAGES = {"clean": (0.0, 0.0), "noise_0.1": (0.0, 0.1), "blur_0.8": (0.8, 0.0), "blur_0.5_noise_0.05": (0.5, 0.05)}
Section = dict[str, float]


def scenes_of(prompts: Sequence[str], seed: int) -> list[Scene]:
    """Decide what the captions leave free; scene i is a pure function of (seed, i)."""
    rngs = (np.random.default_rng(stream_seed(seed, "quality/scene", i)) for i in range(len(prompts)))
    return [arrange(parse(prompt), rng) for prompt, rng in zip(prompts, rngs, strict=True)]


def pictures_of(prompts: Sequence[str], seed: int) -> Float[Tensor, "b 3 32 32"]:
    """Render real scenes of captions."""
    return torch.from_numpy(render(scenes_of(prompts, seed)))


def held_out(per_category: int) -> list[str]:
    """Held-out captions, category by category."""
    return [text for kind in CATEGORIES for text in sample_captions(per_category, split="test", kind=kind, seed=5)]


def instruments_quality(judge: SceneJudge, per_category: int) -> dict[str, Section]:
    """Accuracy of the exact analysis, the reader and the judge on rendered scenes of held-out captions."""
    prompts = held_out(per_category)
    scenes = scenes_of(prompts, 0)
    images = torch.from_numpy(render(scenes))
    draw = torch.randn(images.shape, generator=stream(0, "quality/damage"))
    words = torch.tensor([prompt.startswith("the word") for prompt in prompts])
    reward, found = load_reward("compositional"), dict[str, Section]()
    for name, (blur, noise) in DAMAGES.items():
        seen = damage(images, torch.full((len(images),), blur), torch.full((len(images),), noise), draw)
        exact = reward(seen, RewardContext(prompts=prompts)).extras["exact"].double()
        with torch.no_grad():
            judged = torch.stack([logits.argmax(1) for logits in judge(seen).values()], 1) == attributes_of(scenes)
        found[name] = {
            "scenes": int((~words).sum()),
            "exact_analysis_right": float(exact[~words].mean()),
            "words": int(words.sum()),
            "reader_right": float(exact[words].mean()),
            "judge_right_per_attribute": float(judged.double().mean()),
            "judge_right_in_all_attributes": float(judged.all(1).double().mean()),
        }
    return found


def generator_quality(pipe: Any, judge: SceneJudge, per_category: int, guidance: float) -> Section:
    """Accuracy of one image per held-out caption, by category, and the distance to real scenes of these captions."""
    prompts = held_out(per_category)
    images = generated(pipe, prompts, guidance)
    out = load_reward("compositional")(images, RewardContext(prompts=prompts))
    share = load_reward("compositional", score="share")(images, RewardContext(prompts=prompts))
    rows = [i for i, prompt in enumerate(prompts) if prompt.startswith("the word")]
    ocr = load_reward("ocr")(images[rows], RewardContext(prompts=[prompts[i] for i in rows]))
    accuracy: Mapping[str, float] = out.extras["accuracy"]
    with torch.no_grad():
        made, real, other = (judge.embed(x).double() for x in (images, *(pictures_of(prompts, s) for s in (1, 2))))
    return {
        "images": len(images),
        **{f"exact_{kind}": accuracy[kind] for kind in CATEGORIES},
        "exact_mean_of_six_categories": float(np.mean([accuracy[kind] for kind in CATEGORIES if kind != "word"])),
        "satisfied_share": share.mean(),
        "word_read_exactly": float(ocr.extras["exact"].double().mean()),
        "word_reward_ocr": ocr.mean(),
        "frechet_distance_to_real": float(frechet_distance(made, real)),
        "frechet_distance_of_real_to_real": float(frechet_distance(other, real)),
    }


def generated(pipe: Any, prompts: Sequence[str], guidance: float, seed: int = 0) -> Float[Tensor, "b 3 32 32"]:
    """One image per prompt with the model's own steps, in batches of 100."""
    parts = []
    for start in range(0, len(prompts), 100):
        part = list(prompts[start : start + 100])
        seeds = [stream_seed(seed, "quality/image", start + k) for k in range(len(part))]
        parts.append(pipe(part, guidance_scale=guidance, seed=seeds, output_type="pt").images)
    return torch.cat(parts)


def speed(pipe: Any) -> Section:
    """Images per second through the network, and through the exact analysis."""
    cond = pipe.encode_prompt(["a red circle and a blue square"] * 64)
    x = torch.randn(64, 3, 32, 32, generator=stream(0, "quality/speed"))
    reward, prompts = load_reward("compositional"), ["a red circle and a blue square"] * 64
    images = pictures_of(prompts, 0)

    def seconds(call: Any) -> float:
        call()
        start = time.perf_counter()
        for _ in range(3):
            call()
        return (time.perf_counter() - start) / 3

    with torch.no_grad():
        forward = seconds(lambda: pipe.denoiser.network(x, torch.tensor(0.5), cond))
    parts = {
        name: sum(p.numel() for p in pipe.components[name].parameters()) for name in ("transformer", "text_encoder")
    }
    return {
        **{f"parameters_{name}": count for name, count in parts.items()},
        "denoiser_images_per_second_batch_64_one_thread": 64 / forward,
        "compositional_images_per_second": 64 / seconds(lambda: reward(images, RewardContext(prompts=prompts))),
    }


def measure(bundled: Path, per_category: int) -> dict[str, dict[str, Section]]:
    """Sections of measured numbers, by folder."""
    from gencontrol.pipelines import TextToImagePipeline

    judge = SceneJudge.from_pretrained(bundled / "scene_judge")
    pipe = TextToImagePipeline.from_pretrained(bundled / "text_to_image")
    pipe.set_progress_bar_config(disable=True)
    instruments = instruments_quality(judge, per_category)
    images = {
        f"held-out captions, 20 Euler steps, guidance {scale:g}": generator_quality(pipe, judge, per_category, scale)
        for scale in (1.0, 3.0)
    }
    return {
        "text_to_image": {**images, "speed": speed(pipe)},
        "scene_reader": {name: {k: v[k] for k in ("words", "reader_right")} for name, v in instruments.items()},
        "scene_judge": instruments,
    }


WHAT = {
    "text_to_image": (
        "Scenes",
        "Flow-matching transformer on 32x32 colour scenes (4x4 patches, cross-attention to a small CLIP text encoder): "
        "one to four objects or a short word, described by the grammar of `gencontrol.recipes.scenes.data`. Load with "
        '`gencontrol.pipelines.TextToImagePipeline.from_pretrained("bundled")`. Imperfect on purpose: it is the base '
        "that reward fine-tuning improves; good for nothing else. Captions and words below were held out.",
    ),
    "scene_reader": (
        "Scene reader",
        "Convolutional reader of one to four capital letters in a 32x32 scene, decoded by CTC; the bundled-scale "
        "engine of the rewards `ocr` and `compositional`. Load with `gencontrol.recipes.scenes.networks.SceneReader`.",
    ),
    "scene_judge": (
        "Scene judge",
        "Convolutional classifier of how many objects, of each shape, colour and size, a 32x32 scene has, with 64-d "
        "embeddings: the space in which drift is measured. Independent of the rewards, and never one. Load with "
        "`gencontrol.recipes.scenes.networks.SceneJudge`. `exact_analysis_right` is the detector of `compositional`.",
    ),
}


def write_card(name: str, model: Path, sections: Mapping[str, Section], origin: str, picture: bytes) -> None:
    """Write README.md, card.png and measured.json into a model's folder."""
    title, text = WHAT[name]
    caption = "Rendered scenes, damaged as in the last section"
    if name == "text_to_image":
        caption = "Held-out captions, one row per category; left generated without guidance, middle with guidance 3, "
        caption += "right real"
    write_measured(
        model,
        sections,
        title=title,
        text=text,
        origin=origin,
        source="Data: drawn by `gencontrol.recipes.scenes.data`, without end; captions of one meaning in six, and a "
        "list of words, are held out.",
        note="Numbers by `gencontrol bench scenes-quality`, also in `measured.json`.",
        caption=caption,
        picture=("card.png", picture),
    )


def picture_of(name: str, bundled: Path) -> bytes:
    """The card's picture."""
    from gencontrol.pipelines import TextToImagePipeline

    prompts = held_out(4)
    real = pictures_of(prompts, 1)
    if name != "text_to_image":
        blur, noise = (torch.full((len(real),), value) for value in DAMAGES["blur_0.5_noise_0.05"])
        return png_grid(
            damage(real, blur, noise, torch.randn(real.shape, generator=stream(0, "card"))), columns=14, zoom=2
        )
    pipe = TextToImagePipeline.from_pretrained(bundled / "text_to_image")
    pipe.set_progress_bar_config(disable=True)
    columns = [generated(pipe, prompts, 1.0), generated(pipe, prompts, 3.0), real]
    rows = [part[4 * k : 4 * k + 4] for k in range(len(CATEGORIES)) for part in columns]
    return png_grid(torch.cat(rows), columns=12, zoom=2)


@options
class Options:
    """What is measured.

    Args:
        bundled: folder with text_to_image, scene_reader and scene_judge; the cards are written into it.
        run: run folder of the pretraining; the card quotes its record.
        readers_run: run folder of reader and judge.
        per_category: held-out captions of each category.
        threads: of the CPU.
    """

    bundled: str
    run: str
    readers_run: str
    per_category: Count = 100
    threads: Count = 1


def main(options: Options) -> None:
    """Measure, print JSON and write the cards."""
    torch.set_num_threads(options.threads)
    bundled = existing(options.bundled)
    painter, readers = origin_of_run(Path(options.run)), origin_of_run(Path(options.readers_run))
    for name, sections in measure(bundled, options.per_category).items():
        origin = painter if name == "text_to_image" else readers
        write_card(name, bundled / name, sections, origin, picture_of(name, bundled))
        print(json.dumps({name: sections}, indent=1))
