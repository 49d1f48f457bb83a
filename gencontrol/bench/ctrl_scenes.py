"""CTRL with two attributes on the bundled text-to-image model: colour and size of "a circle", labels as pairs.

Two classifiers learn from separate pairs (image, colour) and (image, size); their rewards add, and the condition has
additive embeddings.  Some combinations are never labelled together: no image shows them, and no path trains on them.
Joint accuracy by the exact detector (one circle of that colour and size); drift as the Fréchet distance to rendered
scenes of the class in the embedding of the judge, which no reward uses, against the distance between two such sets.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gencontrol.algorithms.ctrl import Ctrl, CtrlConfig
from gencontrol.bench.base import Check, Loop, over_seeds, run_in_memory, table
from gencontrol.bench.ctrl_exact import Later
from gencontrol.errors import EnvironmentMissing
from gencontrol.models.classifier_fit import fit_classifier
from gencontrol.models.condition import add_condition
from gencontrol.models.roles import Roles
from gencontrol.rewards.classifier import ClassifierReward
from gencontrol.rng import item_generators, stream_seed
from gencontrol.sampling.controlled import sample_controlled

PROMPT, SHAPE_NAME = "a circle", "circle"
COLOUR, SIZE = ("red", "green", "blue", "yellow"), ("small", "large")
#: (colour, size) never labelled together
UNSEEN = ((0, 1), (2, 0))


def render_class(colour: str, size: str, count: int, seed: int) -> Float[Tensor, "n 3 32 32"]:
    """Render scenes with one circle, in [0, 1]."""
    from gencontrol.data.scenes.grammar import SceneSpec, Thing
    from gencontrol.data.scenes.render import arrange, render

    rng = np.random.default_rng(stream_seed(seed, "bench/circles", colour, size))
    spec = SceneSpec((Thing(SHAPE_NAME, colour, size),))
    return torch.from_numpy(np.asarray(render([arrange(spec, rng) for _ in range(count)]))).float()


def labelled_pairs(per_row: int, seed: int) -> tuple[Float[Tensor, "n 3 32 32"], Int64[Tensor, "n 2"]]:
    """Images in [-1, 1] of all combinations but the unseen ones, with both labels."""
    images, labels = [], []
    for row in itertools.product(range(len(COLOUR)), range(len(SIZE))):
        if row not in UNSEEN:
            images.append(render_class(COLOUR[row[0]], SIZE[row[1]], per_row, seed))
            labels += [row] * per_row
    return torch.cat(images) * 2 - 1, torch.tensor(labels)


def is_right(image: Float[Tensor, "3 32 32"], colour: str, size: str) -> bool:
    """Whether the detector finds exactly one circle, of that colour and size."""
    from gencontrol.data.scenes.detect import detect

    found = detect(image.numpy())
    return len(found) == 1 and (found[0].shape, found[0].colour, found[0].size) == (SHAPE_NAME, colour, size)


def _bundled() -> tuple[Any, Any]:
    """The model and the judge.

    Raises:
        EnvironmentMissing: they are not in this installation.
    """
    import gencontrol
    from gencontrol.models.scene_networks import SceneJudge
    from gencontrol.pipelines import TextToImagePipeline

    folder = Path(gencontrol.__file__).parent / "bundled"
    for part in ("text_to_image", "scene_judge"):
        if not (folder / part).is_dir():
            raise EnvironmentMissing(
                f"the part scenes needs bundled/{part}, which is not in this installation ({folder}); make it with "
                "gencontrol pretrain scenes, or run --parts mixture,linear,digits."
            )
    return TextToImagePipeline.from_pretrained("bundled"), SceneJudge.from_pretrained(folder / "scene_judge")


def _train(pipe: Any, reward: ClassifierReward, iterations: int, batch: int, seed: int, steps: int) -> Ctrl:
    task = pipe.task([PROMPT], [PROMPT])
    denoiser = add_condition(
        task.denoiser,
        shape=task.latent_shape,
        kind="multi",
        cardinality={"colour": COLOUR, "size": SIZE},
        width=32,
        seed=seed,
    )
    config = CtrlConfig(
        batch=batch,
        steps=steps,
        gamma=3.0,
        backprop="adjoint",
        adjoint_steps=max(1, steps // 2),
        held_out=UNSEEN,
        bound_samples=4 * batch,
    )
    roles = Roles(denoiser.network, Ctrl.role_names(config))
    ctrl = Ctrl(replace(task, denoiser=denoiser), reward, config, roles=roles, seed=seed)
    done = 0
    for lr, share in ((1e-3, 0.5), (3e-4, 0.3), (1e-4, 0.2)):
        count = max(1, round(share * iterations))
        run_in_memory(Later(ctrl, done), count, Loop(lr, 64), seed=seed)
        done += count
    return ctrl


@torch.no_grad()
def _draw(pipe: Any, ctrl: Ctrl, row: tuple[int, int], count: int, seed: int) -> Float[Tensor, "n 3 32 32"]:
    parts = []
    for rows in torch.arange(count).split(64):
        labels = torch.tensor(row).expand(len(rows), -1)
        x = sample_controlled(
            ctrl.task.denoiser,
            ctrl.plan,
            (len(rows), *ctrl.task.latent_shape),
            labels=labels,
            cond=ctrl.task.encode([PROMPT] * len(rows)),
            uncond=ctrl.task.uncond,
            generator=item_generators(seed, "bench/scenes", [f"{row}/{i}" for i in rows.tolist()]),
        )
        parts.append(pipe.decode(x).float().clamp(0, 1))
    return torch.cat(parts)


def _run_seed(seed: int, iterations: int, batch: int, *, quick: bool) -> dict[str, dict[str, float]]:
    from gencontrol.rewards.gaussian import Gaussian

    pipe, judge = _bundled()
    images, labels = labelled_pairs(4 if quick else 40, seed)
    own = {
        name: fit_classifier(images, labels[:, place], values, folds=2, steps=5 if quick else 200, seed=seed)
        for place, (name, values) in enumerate((("colour", COLOUR), ("size", SIZE)))
    }
    reward = ClassifierReward(reward_model=own, device="cpu")
    ctrl = _train(pipe, reward, iterations, batch, seed, 6 if quick else 30)
    count = 8 if quick else 200
    found: dict[str, dict[str, list[float]]] = {"labelled together": {}, "never together": {}}
    with torch.no_grad():
        for row in itertools.product(range(len(COLOUR)), range(len(SIZE))):
            names = COLOUR[row[0]], SIZE[row[1]]
            made = _draw(pipe, ctrl, row, count, seed)
            real, other = (render_class(*names, count, seed + place) for place in (1000, 2000))
            laws = [Gaussian.of(judge.embed(x)) for x in (made, real, other)]
            into = found["never together" if row in UNSEEN else "labelled together"]
            right = [float(is_right(image, *names)) for image in made]
            values = {
                "joint accuracy": float(np.mean(right)),
                "FD / floor": laws[0].distance(laws[1]) / max(laws[1].distance(laws[2]), 1e-9),
            }
            for key, value in values.items():
                into.setdefault(key, []).append(value)
    return {name: {key: float(np.mean(v)) for key, v in row.items()} for name, row in found.items()}


def scenes_part(
    *, seeds: Sequence[int], iterations: int, batch: int, quick: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Joint accuracy and drift over seeds.

    Raises:
        EnvironmentMissing: the bundled model is not here.
    """
    runs = []
    for seed in seeds:
        runs.append(_run_seed(seed, iterations, batch, quick=quick))
        say(f"scenes seed {seed}: {runs[-1]}")
    cells = {name: over_seeds([run[name] for run in runs]) for name in runs[0]}
    seen, unseen = cells["labelled together"], cells["never together"]
    return {
        "rows": {name: [run[name] for run in runs] for name in runs[0]},
        "checks": [
            Check(
                "two attributes: joint accuracy ≥ 0.9",
                f"{seen['joint accuracy'].value:.3f}",
                seen["joint accuracy"].value >= 0.9,
            ),
            Check(
                "FD to real scenes ≤ 1.5 × floor", f"{seen['FD / floor'].value:.2f}", seen["FD / floor"].value <= 1.5
            ),
            Check(
                "combinations never labelled together: joint accuracy ≥ 0.75",
                f"{unseen['joint accuracy'].value:.3f}",
                unseen["joint accuracy"].value >= 0.75,
            ),
        ],
        "table": table(
            f"CTRL, two attributes (colour, size) on scenes, {len(seeds)} seeds, {iterations} iterations of {batch}",
            ("combinations", "joint accuracy", "FD / floor"),
            [[name, row["joint accuracy"], row["FD / floor"]] for name, row in cells.items()],
        ),
        "curves": {},
    }
