"""Search over a pipeline's samples by reward: Diffusion Tree Search and its peers behind a diffusers-like call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch

from gencontrol.data.images import to_pil
from gencontrol.errors import UsageError, nearest
from gencontrol.pipelines import arguments
from gencontrol.pipelines.base import WithProgress
from gencontrol.pipelines.search import run as search_run
from gencontrol.pipelines.search.outputs import AudioSearchOutput, ImageSearchOutput
from gencontrol.pipelines.search.run import READOUTS, TREES, Found, Plan
from gencontrol.pipelines.search.searchable import Problem, Request, searchable, without_effect
from gencontrol.rng import seed_of
from gencontrol.sampling.scoring import as_item_reward
from gencontrol.sampling.state import Step
from gencontrol.sampling.tree.readout import Progress
from gencontrol.sampling.tree.rules import Rule, Widening
from gencontrol.sampling.tree.tree import DiffusionTree

#: called after every round with what was reached; True ends the search with what it has
Callback = Callable[[Progress], bool | None]

_OUTPUTS = {"image": ("pil", "pt", "np", "latent"), "audio": ("pt", "np", "latent")}


class TreeSearchPipeline(WithProgress):
    """Find samples of large reward under a generative pipeline, without training it.

    The samples follow, or with "dts-star" seek the best under, p(x | prompt)·exp(reward/temperature), where p is the
    pipeline's own law: its text encoders, guidance, noise levels and decoder, with a stochastic sampler.

    Example:
        from diffusers import StableDiffusion3Pipeline
        from gencontrol.pipelines import TreeSearchPipeline
        from gencontrol.rewards import load_reward

        pipe = StableDiffusion3Pipeline.from_pretrained("stabilityai/stable-diffusion-3.5-medium").to("cuda")
        search = TreeSearchPipeline(pipe, load_reward("clip"), temperature=0.1)
        found = search("a red cube left of a blue ball", nfe=2000)
        found.images[0].save("cube.png")
        better = search("a red cube left of a blue ball", nfe=2000, tree=found.tree)  # goes on where it stopped

    Searchable are diffusers' StableDiffusion (1, 2, XL, 3), Flux, StableAudio and AudioLDM2 pipelines, and ours for
    sound and digits (`pipelines.search.searchable.SEARCHABLE`).  The safety checker of a pipeline is not run.
    After an interruption `search.tree` holds what was grown; pass it as `tree=` to go on.
    """

    def __init__(
        self,
        pipe: Any,
        reward: Any,
        *,
        temperature: float = 1.0,
        sampler: str = "dts-star",
        reward_batch: int = 8,
        autocast: torch.dtype | None = None,
        store: torch.device | str | None = None,
    ) -> None:
        """Bind a pipeline to a reward; nothing is copied, so later changes (LoRA, scheduler, device) count.

        Args:
            pipe: a loaded pipeline, or anything with the methods of `Searchable`.
            reward: an item reward of `load_reward`, or a function of samples, or of (samples, RewardContext), that
                returns one number each, larger being better.  It gets images [b 3 h w] in [0, 1] (digits [b 1 8 8]) or
                sounds [b n] or [b c n] in [-1, 1], float32, and with the context prompts and sampling rate.
            temperature: τ > 0, in units of the reward; smaller follows the reward more.
            sampler: "dts-star" (looks for the best sample), "dts" (draws from the tilted law), or a particle sampler:
                "best-of-n", "snis", "smc", "tds", "das", "beam", "dps".
            reward_batch: samples per decode and reward call.
            autocast: dtype in which the network runs under torch.autocast, e.g. torch.bfloat16.
            store: device of a tree's states, e.g. "cpu" where memory is short; None is the network's.

        Raises:
            UsageError: a pipeline that cannot be searched, a set reward, or an unknown sampler.
        """
        super().__init__()
        self.pipe, self._searchable = pipe, searchable(pipe)
        self.reward = as_item_reward(reward)
        self.temperature, self.sampler = temperature, search_run.known_sampler(sampler)
        self.reward_batch, self.autocast, self.store = reward_batch, autocast, store
        #: the tree of the last call, also of one that was interrupted
        self.tree: DiffusionTree | None = None

    def to(self, device: torch.device | str) -> Self:
        """Move the pipeline; returns the search."""
        self.pipe.to(device)
        return self

    def __call__(
        self,
        prompt: int | str | Sequence[int | str],
        *,
        nfe: int,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int | None = None,
        num_waveforms_per_prompt: int | None = None,
        height: int | None = None,
        width: int | None = None,
        audio_end_in_s: float | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        sampler: str | None = None,
        select: str | Rule | None = None,
        backup: str | None = None,
        widening: str | tuple[float, float] | Widening | None = None,
        branch: int | str | Sequence[float] | None = None,
        leaf_batch: int | None = None,
        step: str | Step | None = None,
        options: Mapping[str, Any] | None = None,
        readout: Literal["best", "sample"] | None = None,
        tree: DiffusionTree | str | Path | None = None,
        output_type: Literal["pil", "pt", "np", "latent"] | None = None,
        return_dict: bool = True,
        callback: Callback | None = None,
    ) -> ImageSearchOutput | AudioSearchOutput | tuple[Any, ...]:
        """Search with `nfe` model calls per prompt; the prompts of a call share their batches.

        Args:
            prompt: one or several; for digits, names or numbers of classes.
            nfe: budget per prompt of network calls, a guided one counting once; at least one path.
            num_inference_steps, guidance_scale, negative_prompt, height, width, audio_end_in_s: as in the pipeline's
                own call, and with its defaults.
            num_images_per_prompt, num_waveforms_per_prompt: samples returned for each prompt, 1 by default.
            generator, seed: of everything drawn; give one, or neither for torch's global generator.
            sampler: instead of the one chosen at the start.
            select, backup, widening: instead of the tree sampler's own; see `DiffusionTree`.
            branch: number of segments of a path (5), or times in (0, 1], or "all".
            leaf_batch: paths denoised together, per prompt; None is at most 8 and leaves a tree at least 8 rounds.
            step: stochastic step of the chain; None is sde of level 1 (the DDPM posterior, ddim of eta 1).
            options: of a particle sampler, by its keyword arguments, e.g. {"potential": "max"}.
            readout: "best" takes the samples of largest reward, "sample" draws from the found law (with repeats; from
                trees by the rule "robust" of `DiffusionTree.sample`); None is the sampler's own: "best" except for
                "dts", "snis", "smc", "tds" and "das".
            tree: a result's tree, or a file that one was saved to, to grow further; its prompt, size, steps,
                guidance, model and reward must be those of this call, its shape and sampler are its own.  The
                pipeline's temperature may differ: the tree is retilted, which costs nothing.
            output_type: "pil" (images' default), "pt" (sounds' default), "np" or "latent".
            return_dict: False returns a tuple of the output's fields.
            callback: gets a Progress after every round (particle samplers: after every prompt); True ends the search.

        Raises:
            UsageError: an argument out of range, without effect here, or against another; the message says which.
            RewardError: the reward broke its contract, or nothing it scored was valid.
        """
        count = self._count(num_images_per_prompt, num_waveforms_per_prompt)
        kind = self._output_type(output_type)
        if generator is not None and seed is not None:
            raise UsageError("generator and seed are both given; give one of them.")
        if tree is not None:
            _without_a_tree(
                generator=generator,
                seed=seed,
                sampler=sampler,
                select=select,
                backup=backup,
                widening=widening,
                branch=branch,
                leaf_batch=leaf_batch,
                step=step,
                options=options,
            )
        plan = Plan(
            sampler=search_run.known_sampler(sampler or self.sampler),
            nfe=arguments.positive(nfe, "nfe"),
            temperature=self.temperature,
            seed=seed_of(generator if seed is None else seed),
            reward_batch=self.reward_batch,
            autocast=self.autocast,
            store=self.store,
            select=select,
            backup=backup,
            widening=widening,
            branch=branch,
            leaf_batch=None if leaf_batch is None else arguments.positive(leaf_batch, "leaf_batch"),
            step=step,
            options=options or {},
        )
        steps = None if num_inference_steps is None else arguments.positive(num_inference_steps, "num_inference_steps")
        ask = Request(prompt, steps, guidance_scale, negative_prompt, height, width, audio_end_in_s)
        with self._searchable.at_work():
            problem = self._searchable.problem(ask)
            found = self._run(problem, plan, count, _readout(readout), tree, callback)
            output = self._output(problem, found, kind)
        return output if return_dict else output.to_tuple()

    # ---- the search ---------------------------------------------------------------------------------------------

    def _run(
        self,
        problem: Problem,
        plan: Plan,
        count: int,
        readout: str | None,
        source: DiffusionTree | str | Path | None,
        callback: Callback | None,
    ) -> Found:
        """Search with a progress bar, and read the samples out."""
        total = plan.nfe * len(problem.prompts)
        if source is None and plan.sampler not in TREES:
            readout = readout or search_run.particle_readout(plan.sampler)
            with self._bar(total, 0, callback) as after:
                return search_run.run_sampler(problem, self.reward, plan, count, readout, after)
        if source is None:
            tree = search_run.plant(problem, self.reward, plan)
            readout = readout or TREES[plan.sampler].readout
        else:
            tree = search_run.resume(source, problem, self.reward, plan)
            readout = readout or ("best" if tree.config.select.greedy else "sample")
        self.tree = tree
        before = tree.nfe, tree.reward_calls
        with self._bar(total, tree.nfe, callback) as after:
            search_run.grow(tree, plan.nfe, after)
        return search_run.read(tree, count, readout, before)

    @contextmanager
    def _bar(self, total: int, start: int, callback: Callback | None) -> Iterator[Callable[[Progress], bool]]:
        """A bar over model calls that shows the best reward (the mean of the prompts'), and the user's callback."""
        with self.progress_bar(total=total) as bar:

            def after(progress: Progress) -> bool:
                bar.update(progress.nfe - start - bar.n)
                best = [value for value in progress.best if not math.isnan(value)]
                if best:
                    bar.set_postfix(best=f"{math.fsum(best) / len(best):.4g}", refresh=False)
                return callback is not None and callback(progress) is True

            yield after

    # ---- what comes out -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _output(self, problem: Problem, found: Found, kind: str) -> ImageSearchOutput | AudioSearchOutput:
        """Decode in batches, in the form that was asked for."""
        samples: Any = found.x
        if kind != "latent":
            samples = torch.cat([problem.decode(part) for part in found.x.split(self.reward_batch)])
        rest = (found.rewards, found.nfe, found.reward_calls, found.log_z, found.tree, found.particles)
        if self._searchable.kind == "audio":
            assert problem.sampling_rate is not None
            return AudioSearchOutput(samples.cpu().numpy() if kind == "np" else samples, problem.sampling_rate, *rest)
        if kind == "pil":
            samples = [to_pil(image) for image in samples]
        elif kind == "np":
            samples = samples.permute(0, 2, 3, 1).cpu().numpy()
        return ImageSearchOutput(samples, *rest)

    def _count(self, images: int | None, waveforms: int | None) -> int:
        """Samples per prompt, by the name that fits the pipeline."""
        if self._searchable.kind == "audio":
            without_effect("an audio pipeline", num_images_per_prompt=images)
            return arguments.positive(1 if waveforms is None else waveforms, "num_waveforms_per_prompt")
        without_effect("an image pipeline", num_waveforms_per_prompt=waveforms)
        return arguments.positive(1 if images is None else images, "num_images_per_prompt")

    def _output_type(self, name: str | None) -> str:
        """The form of the samples, checked."""
        known = _OUTPUTS[self._searchable.kind]
        if name is not None and name not in known:
            raise UsageError(f"output_type is '{name}'.{nearest(name, known)} Known here: {', '.join(known)}.")
        return name or known[0]


def _readout(name: str | None) -> str | None:
    """Raise UsageError for an unknown read-out."""
    if name is not None and name not in READOUTS:
        raise UsageError(f"unknown readout '{name}'.{nearest(name, READOUTS)} Known: {', '.join(READOUTS)}.")
    return name


def _without_a_tree(**given: Any) -> None:
    """Raise UsageError for the first argument that a tree already decides."""
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"{name} belongs to the tree that is grown further; drop it, or build a new tree.")
