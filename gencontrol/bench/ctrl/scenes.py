"""CTRL with two attributes on the bundled text-to-image model: colour and size of "a circle", labels as pairs.

Two classifiers learn from separate pairs (image, colour) and (image, size); their rewards add, and the condition has
additive embeddings.  Some combinations are never labelled together: no image shows them, and no path trains on them.
Joint accuracy by the exact detector: one object, of that colour and size; "whole scene" asks for the circle too, which
is the base's part.  Drift is the Fréchet distance to rendered scenes of the class in the embedding of the judge, which
no reward uses, against the distance between two such sets.  The base's own rows say what CTRL could reach: it tilts the
base's law p(x | "a circle"), and does not mend pictures that are no scene.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gencontrol.algorithms.ctrl.ctrl import Ctrl, CtrlConfig
from gencontrol.bench.base import Check, Loop, kept, over_seeds, run_in_memory, table
from gencontrol.bench.ctrl.exact import Later
from gencontrol.errors import EnvironmentMissing
from gencontrol.models.conditions.base import add_condition
from gencontrol.models.readers.classifier_fit import fit_classifier
from gencontrol.models.roles import Roles
from gencontrol.rewards.image.classifier import ClassifierReward
from gencontrol.rng import item_generators, stream_seed
from gencontrol.sampling.control.controlled import sample_controlled
from gencontrol.weights import BUNDLED

PROMPT, SHAPE_NAME = "a circle", "circle"
COLOUR, SIZE = ("red", "green", "blue", "yellow"), ("small", "large")
#: (colour, size) never labelled together
UNSEEN = ((0, 1), (2, 0))


@dataclass(frozen=True)
class Effort:
    """How much of everything.

    Args:
        iterations, batch: of the CTRL training; an iteration costs about 5·steps·batch calls of the base.
        steps: of the chain.
        guidance_scale: of the base law, 1 is none.
        gamma: power of the classifiers; above 1, since the labels are deterministic (P14).
        per_row: labelled images of each combination.
        fit_steps: of the classifiers.
        samples: of each combination, and of the real scenes that they are compared with.
    """

    iterations: int = 240
    batch: int = 32
    steps: int = 20
    guidance_scale: float = 1.0
    gamma: float = 3.0
    per_row: int = 40
    fit_steps: int = 200
    samples: int = 200


def render_class(colour: str | None, size: str | None, count: int, seed: int) -> Float[Tensor, "n 3 32 32"]:
    """Render scenes with one circle, in [0, 1]; None is free."""
    from gencontrol.recipes.scenes.data.grammar import SceneSpec, Thing
    from gencontrol.recipes.scenes.data.render import arrange, render

    rng = np.random.default_rng(stream_seed(seed, "bench/circles", str(colour), str(size)))
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


def seen_in(image: Float[Tensor, "3 32 32"]) -> tuple[str | None, str, str] | None:
    """(shape or None, colour, size) of the one object that the detector finds; None where it finds none or several."""
    from gencontrol.recipes.scenes.data.detect import detect

    found = detect(image.numpy())
    return (found[0].shape, found[0].colour, found[0].size) if len(found) == 1 else None


def _bundled() -> tuple[Any, Any]:
    """The model and the judge.

    Raises:
        EnvironmentMissing: they are not in this installation.
    """
    from gencontrol.pipelines import TextToImagePipeline
    from gencontrol.recipes.scenes.networks import SceneJudge

    folder = BUNDLED
    for part in ("text_to_image", "scene_judge"):
        if not (folder / part).is_dir():
            raise EnvironmentMissing(
                f"the part scenes needs bundled/{part}, which is not in this installation ({folder}); make it with "
                "gencontrol pretrain scenes, or run --parts mixture,linear,digits."
            )
    return TextToImagePipeline.from_pretrained("bundled"), SceneJudge.from_pretrained(folder / "scene_judge")


def _train(pipe: Any, reward: ClassifierReward, effort: Effort, seed: int) -> Ctrl:
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
        prompts_per_round=effort.batch,
        steps=effort.steps,
        gamma=effort.gamma,
        backprop="adjoint",
        adjoint_steps=max(1, effort.steps // 2),
        guidance="none" if effort.guidance_scale == 1.0 else "separate",
        guidance_scale=effort.guidance_scale,
        held_out=UNSEEN,
        bound_samples=4 * effort.batch,
    )
    roles = Roles(denoiser.network, Ctrl.role_names(config))
    ctrl = Ctrl(replace(task, denoiser=denoiser), reward, config, roles=roles, seed=seed)
    done = 0
    for lr, share in ((1e-3, 0.5), (3e-4, 0.3), (1e-4, 0.2)):
        count = max(1, round(share * effort.iterations))
        run_in_memory(Later(ctrl, done), count, Loop(lr, 64), seed=seed)
        done += count
    return ctrl


@torch.no_grad()
def _draw(pipe: Any, ctrl: Ctrl, row: tuple[int, int] | None, count: int, seed: int) -> Float[Tensor, "n 3 32 32"]:
    """Images of a label row; None is the base, on the same chain."""
    parts = []
    for rows in torch.arange(count).split(64):
        x = sample_controlled(
            ctrl.base_task.denoiser,
            ctrl.plan,
            (len(rows), *ctrl.base_task.latent_shape),
            labels=None if row is None else torch.tensor(row).expand(len(rows), -1),
            cond=ctrl.base_task.encode([PROMPT] * len(rows)),
            uncond=ctrl.base_task.uncond,
            generator=item_generators(seed, "bench/scenes", [f"{row}/{i}" for i in rows.tolist()]),
        )
        parts.append(pipe.decode(x).float().clamp(0, 1))
    return torch.cat(parts)


@torch.no_grad()
def _measure(judge: Any, made: Tensor, colour: str | None, size: str | None, seed: int) -> dict[str, float]:
    """Accuracies and Fréchet ratio of images against real scenes; a free attribute is right whatever it is."""
    from gencontrol.rewards.sets.gaussian import Gaussian

    real, other = (render_class(colour, size, len(made), seed + place) for place in (1000, 2000))
    laws = [Gaussian.of(judge.embed(x)) for x in (made, real, other)]
    found = [seen_in(image) for image in made]
    joint = [seen is not None and colour in (None, seen[1]) and size in (None, seen[2]) for seen in found]
    whole = [ok and seen is not None and seen[0] == SHAPE_NAME for ok, seen in zip(joint, found, strict=True)]
    return {
        "joint accuracy": float(np.mean(joint)),
        "whole scene": float(np.mean(whole)),
        "FD / floor": laws[0].distance(laws[1]) / max(laws[1].distance(laws[2]), 1e-9),
    }


def _run_seed(seed: int, effort: Effort) -> dict[str, dict[str, float]]:
    """Rows of one seed: the base, and every combination of labels."""
    pipe, judge = _bundled()
    images, labels = labelled_pairs(effort.per_row, seed)
    own = {
        name: fit_classifier(images, labels[:, place], values, folds=2, steps=effort.fit_steps, seed=seed)[0]
        for place, (name, values) in enumerate((("colour", COLOUR), ("size", SIZE)))
    }
    ctrl = _train(pipe, ClassifierReward(reward_model=own, device="cpu"), effort, seed)
    rows = {"base": _measure(judge, _draw(pipe, ctrl, None, effort.samples, seed), None, None, seed)}
    for row in itertools.product(range(len(COLOUR)), range(len(SIZE))):
        names = COLOUR[row[0]], SIZE[row[1]]
        rows[" ".join(names)] = _measure(judge, _draw(pipe, ctrl, row, effort.samples, seed), *names, seed)
    return rows | {"_training": {"gap": ctrl.ledger.mean_gap(), "bound": float(ctrl.ledger.log_z.mean())}}


def _mean(rows: dict[str, dict[str, float]], names: Sequence[str]) -> dict[str, float]:
    return {key: float(np.mean([rows[name][key] for name in names])) for key in rows[names[0]]}


def scenes_part(
    *, seeds: Sequence[int], effort: Effort, say: Callable[[str], None], keep: Path | None = None
) -> dict[str, Any]:
    """Joint accuracy and drift over seeds; finished seeds are kept in the folder `keep`.

    Raises:
        EnvironmentMissing: the bundled model is not here.
    """
    from gencontrol.rewards.pretrained import weights_digest

    base = weights_digest(_bundled()[0].network)
    unseen = [f"{COLOUR[a]} {SIZE[b]}" for a, b in UNSEEN]
    runs, groups = [], []
    for seed in seeds:
        given = {"seed": seed, "base": base, **asdict(effort)}
        run = kept(keep, f"scenes_{seed}", given, partial(_run_seed, seed, effort))
        together = [name for name in run if name not in (*unseen, "base", "_training")]
        runs.append(run)
        groups.append(
            {
                "base, no label": run["base"],
                "labelled together": _mean(run, together),
                "never together": _mean(run, unseen),
            }
        )
        say(f"scenes seed {seed}: {groups[-1]}, {run['_training']}")
    cells = {name: over_seeds([group[name] for group in groups]) for name in groups[0]}
    return {
        "rows": {name: [run[name] for run in runs] for name in runs[0]},
        "settings": asdict(effort),
        "checks": _checks(cells),
        "table": table(
            f"CTRL, two attributes (colour, size) on scenes, {len(seeds)} seeds, {effort.iterations} iterations of "
            f"{effort.batch}",
            ("combinations", "joint accuracy", "whole scene", "FD / floor"),
            [[name, row["joint accuracy"], row["whole scene"], row["FD / floor"]] for name, row in cells.items()],
        ),
        "curves": {},
    }


def _checks(cells: dict[str, dict[str, Any]]) -> list[Check]:
    base, seen, unseen = cells.values()
    one = f"{base['joint accuracy'].value:.3f} of the base's pictures show one object"
    drift = f"the base itself: {base['FD / floor'].value:.2f}"
    right, other, ratio = (
        row[key].value for row, key in ((seen, "joint accuracy"), (unseen, "joint accuracy"), (seen, "FD / floor"))
    )
    return [
        Check("two attributes: joint accuracy ≥ 0.9", f"{right:.3f} ({one})", right >= 0.9),
        Check("FD to real scenes ≤ 1.5 × floor", f"{ratio:.2f} ({drift})", ratio <= 1.5),
        Check(
            "combinations never labelled together: joint accuracy ≥ 0.75",
            f"{other:.3f} ({one})",
            other >= 0.75,
        ),
    ]
