"""The digits world of `gencontrol bench crd`: docs/methods/crd.md#experiment-a.

A conditional flow on 8×8 digits is trained with 60 % wrong labels: its unguided samples follow the prompt badly and
guidance helps, as with SD3.5.  The page leaves the width of the class's embedding open: at ours (chosen on seed 100,
which no bench uses) the base's reward under guidance and CRD's speed are the page's, at the page's rate.  Reward: the
prompted class's probability under a logistic regression (hackable).  Never trained on: a kernel SVM as judge and the
Fréchet distance to real digits in 16 principal components (drift).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from gencontrol.algorithms.online.task import PromptTask
from gencontrol.bench.toys import fit_flow, toy_flow, toy_task
from gencontrol.models.denoiser import Denoiser
from gencontrol.process import Linear
from gencontrol.process.gaussian import GridProcess
from gencontrol.recipes.digits.data import CLASSES, load_digit_images
from gencontrol.rewards.base import checked
from gencontrol.rewards.sets.gaussian import Gaussian
from gencontrol.rng import item_generators, stream
from gencontrol.sampling import cfg, sample
from gencontrol.types import RewardContext, RewardOut

PIXELS, COMPONENTS, NULL = 64, 16, len(CLASSES)
WIDTH, EMBEDDING, LABEL_NOISE, DROPOUT, STEPS = 192, 24, 0.6, 0.15, 2500


def encode(prompts: Sequence[str]) -> Float[Tensor, "b 11"]:
    """One-hot class of each prompt; the last place is the null class."""
    return torch.eye(NULL + 1)[torch.tensor([CLASSES.index(prompt) for prompt in prompts])]


def blank_flow(seed: int = 0, shift: float = 1.0) -> Denoiser:
    """The untrained base: three layers of 192 with an embedding of the class; `shift` moves its sampler's times."""
    base = toy_flow(PIXELS, conditions=NULL + 1, width=WIDTH, seed=seed, embedding=EMBEDDING)
    if shift == 1.0:
        return base
    return Denoiser(base.network, GridProcess(Linear(), grid=partial(shifted_times, shift)), base.prediction)


def shifted_times(shift: float, steps: int) -> list[float]:
    """The times that a flow scheduler of diffusers takes, σ = shift·u/(1 + (shift − 1)·u), and the final 0."""
    least = 0.001 * shift / (1 + 0.001 * (shift - 1))
    equal = torch.linspace(1.0, least, steps, dtype=torch.float64)
    return [*(shift * equal / (1 + (shift - 1) * equal)).tolist(), 0.0]


class PromptedClass:
    """Item reward in [0, 1]: the prompted class's probability under a linear classifier of pixels."""

    name, differentiable = "prompted-class", False
    kind: Literal["item", "set"] = "item"

    def __init__(self, weight: Float[Tensor, "10 64"], bias: Float[Tensor, " 10"]) -> None:
        """Take the classifier's coefficients."""
        self.weight, self.bias = weight, bias

    def __call__(self, samples: Tensor, context: RewardContext) -> RewardOut:
        """One probability per sample."""
        assert context.prompts is not None
        chances = torch.softmax(samples.float() @ self.weight.T + self.bias, 1)
        wanted = torch.tensor([CLASSES.index(prompt) for prompt in context.prompts])
        return checked(self.name, chances.gather(1, wanted[:, None])[:, 0], len(samples))


@dataclass(frozen=True)
class World:
    """A base model with its reward and its judges."""

    base: Denoiser
    reward: PromptedClass
    judge: Any
    components: Float[Tensor, "64 16"]
    real: Gaussian
    seed: int
    mark: str
    shift: float = 1.0
    per_class: int = 60
    eval_steps: int = 40

    def task(self) -> PromptTask:
        """A fresh copy of the base as a task with the ten classes as prompts."""
        copy = blank_flow(shift=self.shift)
        copy.load_state_dict(self.base.state_dict())
        task = toy_task(copy, PIXELS, prompts=CLASSES, eval_prompts=CLASSES, encode=encode)
        return replace(task, uncond=torch.eye(NULL + 1)[NULL:])

    def measure(self, denoiser: Denoiser, *, scale: float = 1.0) -> dict[str, float]:
        """Reward, judged accuracy and drift of samples with the weights that are active, on fixed noise."""
        prompts = [name for name in CLASSES for _ in range(self.per_class)]
        model = denoiser if scale == 1.0 else cfg(denoiser, scale, torch.eye(NULL + 1)[NULL:])
        generators = item_generators(self.seed, "crd-bench/eval", range(len(prompts)))
        with torch.no_grad():
            x = sample(
                model,
                (len(prompts), PIXELS),
                steps=self.eval_steps,
                step="euler",
                generator=generators,
                cond=encode(prompts),
            )
        if not bool(x.isfinite().all()):
            return {"reward": 0.0, "judge": 0.0, "fd": float("inf")}
        values = self.reward(x, RewardContext(prompts=prompts)).values
        guess = torch.from_numpy(self.judge.predict(x.numpy()))
        right = (guess == torch.tensor([CLASSES.index(p) for p in prompts])).double().mean()
        law = Gaussian.of((x @ self.components).double())
        return {"reward": float(values.mean()), "judge": float(right), "fd": law.distance(self.real)}


def build_world(seed: int, *, steps: int = STEPS, bases: Path | None = None, shift: float = 1.0) -> World:
    """Train base, reward and judges from scratch; a base found in the folder `bases` is taken from there, else left."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    data = load_digit_images("all")
    images, labels = data.images.flatten(1), data.labels
    order = torch.randperm(len(images), generator=stream(seed, "crd-bench/split"))
    first, second = order[:600], order[600:1200]
    linear = LogisticRegression(max_iter=2000).fit(images[first].numpy(), labels[first].numpy())
    judge = SVC().fit(images[second].numpy(), labels[second].numpy())
    weight, bias = torch.from_numpy(linear.coef_).float(), torch.from_numpy(linear.intercept_).float()
    components = torch.linalg.svd(images - images.mean(0), full_matrices=False).Vh[:COMPONENTS].T
    eye = torch.eye(NULL + 1)

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(images), (256,), generator=generator)
        wrong = torch.rand(256, generator=generator) < LABEL_NOISE
        label = torch.where(wrong, torch.randint(NULL, (256,), generator=generator), labels[rows])
        label = torch.where(torch.rand(256, generator=generator) < DROPOUT, NULL, label)
        return images[rows], eye[label]

    denoiser = blank_flow(seed, shift)
    kept = None if bases is None else bases / f"digits_{seed}_{steps}.safetensors"
    if kept is not None and kept.exists():
        denoiser.load_state_dict(load_file(kept))
    else:
        fit_flow(denoiser, batch, steps=steps, lr=2e-3, seed=seed)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_file(denoiser.state_dict(), kept)
    real = Gaussian.of((images @ components).double())
    mark = f"digits {steps}" + ("" if shift == 1.0 else f", shift {shift:g}")
    return World(denoiser, PromptedClass(weight, bias), judge, components, real, seed, mark, shift)
