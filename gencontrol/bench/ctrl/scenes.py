"""CTRL with two attributes on the bundled text-to-image model: colour and size of "a circle", labels as pairs.

Two classifiers learn from separate pairs (image, colour) and (image, size), and from some pictures of the base, where
"other" is what shows no object or several.  Some combinations are never labelled together: no labelled picture shows
them.  Channel permutations keep the size from being read off the colour; since the classifiers are per attribute, the
pool's weights of those combinations are defined, and the control trains on them.
Joint accuracy by the exact detector: one object, of that colour and size; "whole scene" asks for the circle too, which
is the base's part.  Drift is the Fréchet distance to rendered scenes of the class in the embedding of the judge, which
no reward uses, against the distance between two such sets.  The base's own rows say what CTRL could reach: it tilts the
base's law p(x | "a circle"), and does not mend pictures that are no scene; goals are set against the ceiling.
"""

from __future__ import annotations

import itertools
import time
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
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.bench.base import Check, Loop, kept, over_seeds, run_in_memory, table
from gencontrol.bench.ctrl.exact import Later
from gencontrol.errors import EnvironmentMissing
from gencontrol.models.conditions.base import add_condition
from gencontrol.models.readers.self_training import Budget, Mixed, fit_self_trained
from gencontrol.models.roles import Roles
from gencontrol.rewards.image.classifier import ClassifierReward
from gencontrol.rng import item_generators, stream, stream_seed
from gencontrol.sampling import sample
from gencontrol.sampling.control.controlled import sample_controlled
from gencontrol.sampling.steps import Ddim
from gencontrol.weights import BUNDLED

PROMPT, SHAPE_NAME = "a circle", "circle"
COLOUR, SIZE = ("red", "green", "blue", "yellow", "purple", "cyan"), ("small", "large")
#: what is none of them
OTHER = "other"
#: (colour, size) never labelled together
UNSEEN = ((0, 1), (2, 0))


@dataclass(frozen=True)
class Effort:
    """How much of everything.

    Args:
        iterations, batch: rounds of 20 updates on the pool, and rows of an update.
        steps: of the chain.
        gamma: power of the classifiers; above 1, since the labels are deterministic (P14).
        pool, base_updates: see `CtrlConfig`.
        per_row: labelled rendered images of each combination.
        base_labelled, base_images: pictures of the base with labels, and without, for the classifiers.
        fit_steps: of the members of the classifiers' ensembles; they have twice as many themselves.
        samples: of each combination, and of the real scenes that they are compared with.
    """

    iterations: int = 250
    batch: int = 64
    steps: int = 20
    gamma: float = 3.0
    pool: int = 5000
    base_updates: int = 1000
    per_row: int = 24
    base_labelled: int = 60
    base_images: int = 600
    fit_steps: int = 300
    samples: int = 100


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


@torch.no_grad()
def _base_pictures(pipe: Any, task: PromptTask, effort: Effort, seed: int) -> Float[Tensor, "n 3 32 32"]:
    """Pictures of the base in [0, 1]."""
    parts = []
    for rows in torch.arange(effort.base_images + effort.base_labelled).split(64):
        x = sample(
            task.denoiser,
            (len(rows), *task.latent_shape),
            steps=effort.steps,
            step=Ddim(eta=1.0),
            generator=item_generators(seed, "bench/scenes/base", rows.tolist()),
            cond=task.encode([PROMPT] * len(rows)),
        )
        parts.append(pipe.decode(x).float().clamp(0, 1))
    return torch.cat(parts)


def _classifiers(pipe: Any, task: PromptTask, effort: Effort, seed: int) -> dict[str, Any]:
    """One classifier for each attribute, from rendered pairs, labelled base pictures and unlabelled ones."""
    images, labels = labelled_pairs(effort.per_row, seed)
    base = _base_pictures(pipe, task, effort, seed)
    known, rows = [], []
    for place, seen in enumerate(map(seen_in, base[: effort.base_labelled])):
        row = (len(COLOUR), len(SIZE)) if seen is None else (COLOUR.index(seen[1]), SIZE.index(seen[2]))
        if row not in UNSEEN:  # nobody labels these
            known.append(place)
            rows.append(row)
    images = torch.cat([images, base[known] * 2 - 1])
    labels = torch.cat([labels, torch.tensor(rows, dtype=torch.long).reshape(-1, 2)])
    budget = Budget(effort.fit_steps, 2 * effort.fit_steps)
    found = {}
    for column, (name, values) in enumerate((("colour", COLOUR), ("size", SIZE))):
        found[name] = fit_self_trained(
            images,
            labels[:, column],
            (*values, OTHER),
            base[effort.base_labelled :] * 2 - 1,
            augment=Mixed(channels=name == "size"),
            budget=budget,
            seed=seed,
        )
    return found


def _train(task: PromptTask, reward: ClassifierReward, effort: Effort, seed: int) -> Ctrl:
    denoiser = add_condition(
        task.denoiser,
        shape=task.latent_shape,
        kind="multi",
        cardinality={"colour": (*COLOUR, OTHER), "size": (*SIZE, OTHER)},
        width=64,
        half=True,
        seed=seed,
    )
    pairs = itertools.product(range(len(COLOUR) + 1), range(len(SIZE) + 1))
    config = CtrlConfig(
        prompts_per_round=effort.batch,
        steps=effort.steps,
        gamma=effort.gamma,
        backprop="pool",
        pool=effort.pool,
        pool_batch=effort.batch,
        pool_updates=20,
        base_updates=effort.base_updates,
        held_out=tuple(row for row in pairs if len(COLOUR) == row[0] or len(SIZE) == row[1]),
        oversample=0.0,
        trust_classifier=effort.fit_steps < 100,
    )
    roles = Roles(denoiser.network, Ctrl.role_names(config))
    ctrl = Ctrl(replace(task, denoiser=denoiser), reward, config, roles=roles, seed=seed)
    done = 0
    for lr, share in ((2e-3, 0.5), (7e-4, 0.3), (2e-4, 0.2)):
        count = max(1, round(share * effort.iterations))
        run_in_memory(Later(ctrl, done), count, Loop(lr, 64, max_grad_norm=20.0), seed=seed)
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


@torch.no_grad()
def _resampled(pipe: Any, ctrl: Ctrl, place: int, count: int, seed: int) -> Float[Tensor, "n 3 32 32"]:
    """The ceiling of a label row: base pictures drawn by their weights."""
    assert ctrl.pool is not None
    generator = stream(seed, "bench/scenes/ceiling", place)
    rows = torch.multinomial(ctrl.pool_weights[:, place], count, replacement=True, generator=generator)
    found: Tensor = pipe.decode(ctrl.pool.x0[rows]).float().clamp(0, 1)
    return found


def _run_seed(seed: int, effort: Effort) -> dict[str, dict[str, float]]:
    """Rows of one seed: the base, and every combination of labels with its ceiling."""
    pipe, judge = _bundled()
    task = pipe.task([PROMPT], [PROMPT])
    began = time.process_time()
    own = _classifiers(pipe, task, effort, seed)
    ctrl = _train(task, ClassifierReward(reward_model=own, device="cpu"), effort, seed)
    minutes = (time.process_time() - began) / 60
    rows = {"base": _measure(judge, _draw(pipe, ctrl, None, effort.samples, seed), None, None, seed)}
    for place, row in enumerate(tuple(pair) for pair in ctrl.rows.tolist()):
        names = COLOUR[row[0]], SIZE[row[1]]
        made = _measure(judge, _draw(pipe, ctrl, row, effort.samples, seed), *names, seed)
        top = _measure(judge, _resampled(pipe, ctrl, place, effort.samples, seed), *names, seed)
        rows[" ".join(names)] = made | {f"ceiling: {key}": value for key, value in top.items()}
    training = {"gap": ctrl.ledger.mean_gap(), "bound": float(ctrl.ledger.log_z.mean()), "CPU minutes": minutes}
    return rows | {"_training": training}


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
    keys = ("joint accuracy", "whole scene", "FD / floor", "ceiling: joint accuracy", "ceiling: FD / floor")
    return {
        "rows": {name: [run[name] for run in runs] for name in runs[0]},
        "settings": asdict(effort),
        "checks": _checks(cells),
        "table": table(
            f"CTRL, two attributes (colour, size) on scenes, {len(seeds)} seeds, {20 * effort.iterations} updates of "
            f"{effort.batch} on {effort.pool} paths",
            ("combinations", *keys),
            [[name, *(row.get(key, "–") for key in keys)] for name, row in cells.items()],
        ),
        "curves": {},
    }


def _checks(cells: dict[str, dict[str, Any]]) -> list[Check]:
    _, seen, unseen = cells.values()
    top, right, other = (
        row[key].value
        for row, key in ((seen, "ceiling: joint accuracy"), (seen, "joint accuracy"), (unseen, "joint accuracy"))
    )
    ratio = seen["FD / floor"].value / seen["ceiling: FD / floor"].value
    return [
        Check("two attributes: joint accuracy of the ceiling ≥ 0.9", f"{top:.3f}", top >= 0.9),
        Check("two attributes: joint accuracy ≥ 0.85", f"{right:.3f} (ceiling {top:.3f})", right >= 0.85),
        Check("combinations never labelled together: joint accuracy ≥ 0.6", f"{other:.3f}", other >= 0.6),
        Check("Fréchet distance ≤ 1.5 × the ceiling's, at equal count", f"{ratio:.2f}", ratio <= 1.5),
    ]
