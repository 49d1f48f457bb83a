"""docs/methods/ctrl.md#e-ctrl-2: a class condition for the unconditional digit model from 50 labelled images
(docs/methods/ctrl.md#experiments).

Base: the bundled digit flow without its class condition, 30 steps of its posterior sampler.  The classifier of the
method sees n = 50 images (5 per class) and unlabelled base samples; the judge is the bundled classifier, which saw all
labels.  Goals are factors of the ceiling, base samples resampled with the method's own classifier.
Class-wise MMD² to the training images, kernels of bandwidth (½, 1, 2)·4, on as many samples per class as there are test
images (36), so that the biased own term is the same for the floor.  DPS is this library's sampler with the same
classifier; its backward passes count double.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gencontrol.algorithms.ctrl.ctrl import Ctrl, CtrlConfig
from gencontrol.algorithms.ctrl.pool import PathPool
from gencontrol.algorithms.online.task import PromptTask
from gencontrol.bench.base import Check, Loop, kept, over_seeds, run_in_memory, table
from gencontrol.bench.ctrl.exact import Later
from gencontrol.bench.ctrl.peers import PER_CLASS, SHAPE, STEPS, base_samples, cfg_samples, dps_samples
from gencontrol.bench.dts.measure import Law, sample_mmd2
from gencontrol.models.conditions.base import add_condition
from gencontrol.models.readers.self_training import Affine, Budget, fit_self_trained
from gencontrol.models.roles import Roles
from gencontrol.recipes.digits.data import CLASSES, DigitImages, load_digit_images
from gencontrol.rewards.image.classifier import ClassifierReward
from gencontrol.rng import item_generators, stream
from gencontrol.sampling.control.controlled import sample_controlled

BANDWIDTHS = (2.0, 4.0, 8.0)


@dataclass(frozen=True)
class DigitsWorld:
    """Model, images and the judge.

    Args:
        pipe: the bundled pipeline.
        train, test: images that the measure compares with, and those that set its floor.
    """

    pipe: Any
    train: DigitImages
    test: DigitImages

    @classmethod
    def bundled(cls) -> DigitsWorld:
        """Load it."""
        from gencontrol.pipelines import ClassToImagePipeline

        pipe = ClassToImagePipeline.from_pretrained("bundled-digits")
        return cls(pipe, load_digit_images("train"), load_digit_images("test"))

    def few(self, per_class: int, seed: int) -> DigitImages:
        """Labelled images, drawn anew for each seed."""
        rows = []
        for label in range(len(CLASSES)):
            members = (self.train.labels == label).nonzero()[:, 0]
            order = torch.randperm(len(members), generator=stream(seed, "bench/few", label))
            rows.append(members[order[:per_class]])
        return self.train.take(torch.cat(rows))

    def task(self) -> PromptTask:
        """The unconditional model as a task: one empty prompt."""
        return PromptTask(
            denoiser=self.pipe.denoiser,
            latent_shape=SHAPE,
            encode=lambda texts: None,
            uncond=None,
            decode=self.pipe.decode,
            prompts=("a digit",),
            eval_prompts=("a digit",),
            artefacts=self.pipe.artefacts,
            save_final=self.pipe.save_pretrained,
        )

    def measure(self, x: Float[Tensor, "n 1 8 8"], labels: Int64[Tensor, " n"], mine: Any) -> dict[str, float]:
        """Accuracy by the judge, class MMD², log p of the method's own classifier, mean distance within a class."""
        judge = self.pipe.components["classifier"]
        images = self.pipe.decode(x) * 2 - 1
        mmd2, spread = [], []
        for label in range(len(CLASSES)):
            flat = images[labels == label].flatten(1).double()
            target = self.train.images[self.train.labels == label].flatten(1)
            reference = Law.of(target, torch.zeros(len(target)))
            for part in flat.split(PER_CLASS):
                mmd2.append(sample_mmd2(Law.of(part, torch.zeros(len(part))), reference, BANDWIDTHS))
            spread.append(float(torch.pdist(flat).mean()))
        with torch.no_grad():
            right = judge(images).argmax(1) == labels
            log_p = mine.log_probs(images).gather(1, labels[:, None])
        return {
            "accuracy": float(right.float().mean()),
            "MMD²": float(np.mean(mmd2)),
            "log p": float(log_p.mean()),
            "diversity": float(np.mean(spread)),
        }


def _labels(repeats: int) -> Int64[Tensor, " n"]:
    return torch.arange(len(CLASSES)).repeat_interleave(PER_CLASS * repeats)


@dataclass(frozen=True)
class Effort:
    """How much of everything.

    Args:
        iterations: rounds of 20 updates of each control.
        batch: paths of a look at J.
        pool, base_updates: see `CtrlConfig`.
        fit_steps: of the members of the classifier's ensemble; it has twice as many itself.
        base_images: base samples of the self-training.
        cfg_updates: numbers of updates, of 64 items, at which classifier-free fine-tuning is measured; increasing.
        repeats: test-set-sized sets of samples per class.
    """

    iterations: int = 100
    batch: int = 96
    pool: int = 16_000
    base_updates: int = 1000
    fit_steps: int = 300
    base_images: int = 2000
    cfg_updates: tuple[int, ...] = (250, 1000)
    repeats: int = 2


#: (γ, strengths at sampling) of the controls
TRAININGS: tuple[tuple[float, tuple[float, ...]], ...] = ((1.0, (1.0, 1.5)), (3.0, (1.0, 1.5)))


def train_ctrl(
    world: DigitsWorld, classifier: Any, *, gamma: float, effort: Effort, seed: int, pool: PathPool | None = None
) -> Ctrl:
    """Train a residual control on a pool of base paths, drawn anew where none is given."""
    reward = ClassifierReward(reward_model=classifier, device="cpu")
    config = CtrlConfig(
        prompts_per_round=effort.batch,
        gamma=gamma,
        steps=STEPS,
        backprop="pool",
        pool=effort.pool,
        pool_updates=20,
        base_updates=effort.base_updates,
        oversample=0.0,
        trust_classifier=effort.fit_steps < 100,
    )
    task = world.task()
    denoiser = add_condition(task.denoiser, shape=SHAPE, cardinality=CLASSES, width=256, seed=seed)
    task = PromptTask(**{**vars(task), "denoiser": denoiser})
    ctrl = Ctrl(task, reward, config, roles=Roles(denoiser.network, ("policy", "ref")), seed=seed)
    ctrl.given_pool = pool
    done = 0
    for lr, share in ((2e-3, 0.5), (7e-4, 0.3), (2e-4, 0.2)):
        count = max(1, round(share * effort.iterations))
        run_in_memory(Later(ctrl, done), count, Loop(lr, 512, max_grad_norm=50.0), seed=seed)
        done += count
    return ctrl


def resampled(ctrl: Ctrl, labels: Tensor, seed: int) -> Tensor:
    """The ceiling: base samples drawn for each label by their weights; what a perfect control would give."""
    assert ctrl.pool is not None
    generator, x = stream(seed, "bench/ceiling"), torch.empty(len(labels), *SHAPE)
    for label in range(len(CLASSES)):
        mine = labels == label
        rows = torch.multinomial(ctrl.pool_weights[:, label], int(mine.sum()), replacement=True, generator=generator)
        x[mine] = ctrl.pool.x0[rows]
    return x


def ctrl_samples(ctrl: Ctrl, labels: Tensor, strength: float, seed: int) -> Tensor:
    """Sample with the control at a strength."""
    parts = []
    for rows in torch.arange(len(labels)).split(256):
        generators = item_generators(seed, "bench/ctrl", rows.tolist())
        encoded = labels[rows][:, None]
        shape = (len(rows), *SHAPE)
        with torch.no_grad():
            parts.append(
                sample_controlled(
                    ctrl.base_task.denoiser, ctrl.plan, shape, labels=encoded, strength=strength, generator=generators
                )
            )
    return torch.cat(parts)


def _classifier(world: DigitsWorld, seed: int, effort: Effort) -> tuple[DigitImages, Any]:
    few = world.few(5, seed)
    with torch.no_grad():
        base = world.pipe.decode(base_samples(world, effort.base_images, seed + 500)) * 2 - 1
    budget = Budget(member_steps=effort.fit_steps, final_steps=2 * effort.fit_steps)
    return few, fit_self_trained(few.images, few.labels, CLASSES, base, augment=Affine(), budget=budget, seed=seed)


def peer_rows(
    world: DigitsWorld, seed: int, effort: Effort, classify: Callable[[int], Any]
) -> dict[str, dict[str, float]]:
    """Rows of one seed that need no CTRL, with its own labels and classifier."""
    labels = _labels(effort.repeats)
    few, classifier = classify(seed)
    with torch.no_grad():
        own = float((classifier(world.test.images).argmax(1) == world.test.labels).float().mean())
    rows = {"real test images": world.measure(world.test.images, world.test.labels, classifier)}
    rows["base, no control"] = world.measure(base_samples(world, len(labels), seed), labels, classifier)
    tuned = cfg_samples(world, few, labels, (1.0, 2.0), effort.cfg_updates, seed)
    for (updates, scale), x in tuned.items():
        calls = f"{1 if scale == 1 else 2} call{'s' if scale != 1 else ''} a step"
        rows[f"CFG fine-tuning, {updates} updates, w = {scale:g} ({calls})"] = world.measure(x, labels, classifier)
    for scale in (1.0, 3.0):
        x = dps_samples(world, classifier, effort.repeats, scale, seed)
        rows[f"DPS, scale {scale:g} (3 calls a step)"] = world.measure(x, labels, classifier)
    return rows | {"_classifier": {"accuracy": own, "temperature": classifier.config.temperature}}


def ctrl_rows(
    world: DigitsWorld, seed: int, effort: Effort, classify: Callable[[int], Any], say: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Rows of the controls of one seed, which share a pool, and of their ceilings."""
    labels, began = _labels(effort.repeats), time.process_time()
    _, classifier = classify(seed)
    minutes, pool = [(time.process_time() - began) / 60], None
    rows: dict[str, dict[str, float]] = {}
    for gamma, strengths in TRAININGS:
        began = time.process_time()
        ctrl = train_ctrl(world, classifier, gamma=gamma, effort=effort, seed=seed, pool=pool)
        pool = ctrl.pool
        minutes.append((time.process_time() - began) / 60)
        found = {f"ceiling γ = {gamma:g}": world.measure(resampled(ctrl, labels, seed), labels, classifier)}
        gap, cost = ctrl.ledger.mean_gap(), minutes[0] + minutes[-1]  # the first includes the pool
        for w in strengths:
            row = world.measure(ctrl_samples(ctrl, labels, w, seed), labels, classifier)
            found[f"CTRL γ = {gamma:g}, strength {w:g}"] = {**row, "gap": gap, "CPU minutes": cost}
        say(f"digits seed {seed}: {found}")
        rows |= found
    return rows


def digits_part(
    *, seeds: Sequence[int], effort: Effort, say: Callable[[str], None], keep: Path | None = None
) -> dict[str, Any]:
    """docs/methods/ctrl.md#e-ctrl-2 over seeds; returns rows, checks and the printed table.  Finished runs are kept in
    the folder `keep`.
    """
    world = DigitsWorld.bundled()
    found: list[dict[str, dict[str, float]]] = [{} for _ in seeds]
    classify = cache(lambda seed: _classifier(world, seed, effort))

    def add(place: int, seed: int, name: str, make: Callable[[], dict[str, dict[str, float]]]) -> None:
        rows = kept(keep, f"digits_{seed}", {"name": name, "seed": seed, **asdict(effort)}, make)
        found[place] |= rows
        say(f"digits seed {seed}: " + "; ".join(f"{k}: {v.get('MMD²', math.nan):.4f}" for k, v in rows.items()))

    for place, seed in enumerate(seeds):
        add(place, seed, "ctrl", partial(ctrl_rows, world, seed, effort, classify, say))
        add(place, seed, "peers", partial(peer_rows, world, seed, effort, classify))
    cells = {name: over_seeds([rows[name] for rows in found]) for name in found[0]}
    classifier = cells.pop("_classifier")
    keys = ("accuracy", "MMD²", "log p", "diversity")
    return {
        "rows": {name: [rows[name] for rows in found] for name in found[0]},
        "settings": {"labels": 50, **asdict(effort)},
        "checks": _checks(cells),
        "table": table(
            f"E-CTRL-2. Digits, 50 labels, {len(seeds)} seeds, {20 * effort.iterations} updates on {effort.pool} "
            f"paths; the method's classifier is right on {classifier['accuracy'].value:.3f} of the test images",
            (
                "row",
                "judge's accuracy",
                "class MMD²",
                "own log p",
                "distance within a class",
                "gap log Z − J",
                "CPU min",
            ),
            [
                [name, *(row[key] for key in keys), row.get("gap", "–"), row.get("CPU minutes", "–")]
                for name, row in cells.items()
            ],
        ),
        "curves": {},
    }


def _checks(cells: dict[str, dict[str, Any]]) -> list[Check]:
    floor = cells["real test images"]["MMD²"].value
    best = min(row["MMD²"].value for name, row in cells.items() if name.startswith("CFG"))
    dps = min(row["MMD²"].value for name, row in cells.items() if name.startswith("DPS"))
    checks = []
    for gamma, _ in TRAININGS:
        ceiling, row = cells[f"ceiling γ = {gamma:g}"], cells[f"CTRL γ = {gamma:g}, strength 1"]
        top, mine = ceiling["MMD²"].value, row["MMD²"].value
        right, most = row["accuracy"].value, ceiling["accuracy"].value
        name = f"E-CTRL-2, γ = {gamma:g}"
        checks += [
            Check(f"{name}: MMD² of the ceiling ≤ 1.4 × floor", f"{top / floor:.2f}", top <= 1.4 * floor),
            Check(f"{name}: MMD² ≤ 1.2 × the ceiling's", f"{mine / top:.2f}", mine <= 1.2 * top),
            Check(
                f"{name}: accuracy ≥ 0.93 × the ceiling's",
                f"{right:.3f} / {most:.3f} = {right / most:.3f}",
                right >= 0.93 * most,
            ),
            Check(
                f"{name}: MMD² ≤ 0.5 × classifier-free fine-tuning (its best)", f"{mine / best:.2f}", mine <= 0.5 * best
            ),
            Check(f"{name}: MMD² below DPS (not claimed by the page)", f"{mine:.4f} against {dps:.4f}", mine < dps),
        ]
    return checks
