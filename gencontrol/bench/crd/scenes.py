"""The scenes world of `gencontrol bench crd`: the bundled text-to-image model, real captions, real instruments.

Part "scenes": reward `compositional` (graded) on training captions of six categories; measured on held-out captions.
Part "words": reward `ocr` on training words; measured on held-out words.  Never trained on: the judge, in whose
embedding the drift (Fréchet distance to rendered scenes of the same held-out captions) and the diversity (mean distance
between two samples of one caption) are taken; the distance between two rendered sets of that size is the floor.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gencontrol.algorithms.online.task import PromptTask
from gencontrol.errors import EnvironmentMissing
from gencontrol.models.denoiser import Denoiser
from gencontrol.recipes.scenes.data import CATEGORIES, parse
from gencontrol.recipes.scenes.data.corpus import sample_captions
from gencontrol.recipes.scenes.data.render import arrange, render
from gencontrol.recipes.scenes.networks import SceneJudge
from gencontrol.rewards import load_reward
from gencontrol.rewards.sets.gaussian import Gaussian
from gencontrol.rng import item_generators, stream_seed
from gencontrol.sampling import cfg, sample
from gencontrol.types import Cond, RewardContext, index_cond
from gencontrol.weights import BUNDLED

#: categories of each part
KINDS = {"scenes": tuple(kind for kind in CATEGORIES if kind != "word"), "words": ("word",)}
REWARDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "scenes": ("compositional", {"score": "share"}),  # graded: hard captions teach too
    "words": ("ocr", {}),
}
#: held-out captions of each category, sampled twice each; training captions of each
HELD_OUT, TRAINED = {"scenes": 20, "words": 100}, {"scenes": 60, "words": 240}
#: sampler steps of a measurement, and rows at once
EVAL_STEPS, ROWS = 20, 120


@dataclass(frozen=True)
class ScenesWorld:
    """The bundled model with a reward, held-out captions and the judge.

    Args:
        pipe: the model; tasks work on copies of its network.
        reward: what is trained on; `reward` in measurements is its mean on held-out captions.
        prompts: training captions.
        eval_prompts: held-out captions, each twice in a row.
        real: law of rendered scenes of `eval_prompts` in the judge's embedding.
        floor: distance of another such rendered set to `real`.
        mark: what tells this world from others in the names of kept runs.
    """

    pipe: Any
    reward: Any
    prompts: Sequence[str]
    eval_prompts: Sequence[str]
    judge: SceneJudge
    real: Gaussian
    floor: float
    seed: int
    mark: str

    @property
    def base(self) -> Denoiser:
        """The model before any training."""
        denoiser: Denoiser = self.pipe.denoiser
        return denoiser

    def task(self) -> PromptTask:
        """A fresh copy of the base as a task."""
        made: PromptTask = self.pipe.task(self.prompts, list(dict.fromkeys(self.eval_prompts)))
        return replace(made, denoiser=copy.deepcopy(made.denoiser))

    @torch.no_grad()
    def measure(self, denoiser: Denoiser, *, scale: float = 1.0) -> dict[str, float]:
        """Reward, share of exactly right images, drift and diversity on held-out captions, on fixed noise."""
        uncond = self.pipe.uncond()
        model = denoiser if scale == 1.0 else cfg(denoiser, scale, uncond)
        cond: Cond = self.pipe.encode_prompt(list(self.eval_prompts))
        parts = []
        for rows in torch.arange(len(self.eval_prompts)).split(ROWS):
            x = sample(
                model,
                (len(rows), *self.pipe.latent_shape),
                steps=EVAL_STEPS,
                step="euler",
                generator=item_generators(self.seed, "crd-bench/eval", rows.tolist()),
                cond=index_cond(cond, rows),
            )
            parts.append(self.pipe.decode(x).float().clamp(0.0, 1.0))
        images = torch.cat(parts)
        if not bool(images.isfinite().all()):
            return {"reward": 0.0, "exact": 0.0, "fd": math.inf, "diversity": 0.0}
        context = RewardContext(prompts=list(self.eval_prompts))
        out = self.reward(images, context)
        embedded = self.judge.embed(images).double()
        pairs = (embedded[0::2] - embedded[1::2]).norm(dim=1)
        return {
            "reward": float(out.mean()),
            "exact": float(out.extras["exact"].double().mean()),
            "fd": Gaussian.of(embedded).distance(self.real),
            "diversity": float(pairs.mean()),
        }


def rendered(prompts: Sequence[str], seed: int) -> Float[Tensor, "b 3 32 32"]:
    """Render one real scene of each caption; scene i is a pure function of (seed, i)."""
    rngs = (np.random.default_rng(stream_seed(seed, "crd-bench/scene", i)) for i in range(len(prompts)))
    return torch.from_numpy(render([arrange(parse(text), rng) for text, rng in zip(prompts, rngs, strict=True)]))


@lru_cache(maxsize=1)
def _bundled() -> tuple[Any, SceneJudge, str]:
    from gencontrol.pipelines import TextToImagePipeline

    folder = BUNDLED
    weights = sorted((folder / "text_to_image").rglob("*.safetensors"))
    if not weights or not (folder / "scene_judge").is_dir():
        raise EnvironmentMissing(
            f"these parts need the bundled text-to-image model and scene judge, which are not in {folder}; make them "
            "with gencontrol pretrain scenes and scene-readers, or run --parts digits,exact."
        )
    mark = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()[:12]
    return (
        TextToImagePipeline.from_pretrained("bundled"),
        SceneJudge.from_pretrained(folder / "scene_judge"),
        mark,
    )


def build_world(part: str, seed: int, *, per_kind: int) -> ScenesWorld:
    """Take the bundled model, and draw captions by the seed.

    Args:
        part: "scenes" or "words".
        per_kind: held-out captions of each category, each sampled twice.

    Raises:
        EnvironmentMissing: the bundled models are not in this installation.
    """
    pipe, judge, mark = _bundled()
    kinds = KINDS[part]
    prompts = [t for k in kinds for t in sample_captions(TRAINED[part], split="train", kind=k, seed=seed)]
    held_out = [t for k in kinds for t in sample_captions(per_kind, split="test", kind=k, seed=seed) for _ in range(2)]
    with torch.no_grad():
        real, other = (Gaussian.of(judge.embed(rendered(held_out, place)).double()) for place in (1, 2))
    name, config = REWARDS[part]
    reward = load_reward(name, **config)
    return ScenesWorld(
        pipe,
        reward,
        list(dict.fromkeys(prompts)),
        held_out,
        judge,
        real,
        other.distance(real),
        seed,
        f"{part} {mark} {per_kind}",
    )
