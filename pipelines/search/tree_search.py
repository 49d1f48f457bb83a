"""Search over a pipeline's samples by reward: Diffusion Tree Search and its peers behind a diffusers-like call.

The call is made of parts that `gencontrol search` uses, too: `problem` encodes prompts, `plant` and `resume` give a
tree to build, `target` what a particle sampler works on, `read` and `take` choose the samples.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from gencontrol.data.images import to_pil
from gencontrol.errors import UsageError, nearest
from gencontrol.pipelines import arguments
from gencontrol.pipelines.base import WithProgress
from gencontrol.pipelines.search.outputs import AudioSearchOutput, ImageSearchOutput
from gencontrol.pipelines.search.problem import Problem
from gencontrol.pipelines.search.searchable import searchable
from gencontrol.rng import seed_of, stream_seed
from gencontrol.sampling.chain import cond_leaves
from gencontrol.sampling.particles import Particles, Target, spend
from gencontrol.sampling.samplers import TREES
from gencontrol.sampling.samplers import sampler as known_sampler
from gencontrol.sampling.scoring import Scorer, as_item_reward
from gencontrol.sampling.state import Step
from gencontrol.sampling.tree.readout import Leaves, Progress
from gencontrol.sampling.tree.rules import Rule, Widening
from gencontrol.sampling.tree.store import fingerprint
from gencontrol.sampling.tree.tree import DiffusionTree

#: called after every round with what was reached; True ends the search with what it has
Callback = Callable[[Progress], bool | None]
#: "best" takes the samples of largest reward, "sample" draws from the found law with repeats, "distinct" without
Readout = Literal["best", "sample", "distinct"]

READOUTS = ("best", "sample", "distinct")
#: Segments of a path between levels (arXiv 2506.20701, table 2)
SEGMENTS = 5
#: Most leaves per round and prompt, and the fewest rounds, that a call without `leaf_batch` takes (ours).
LEAF_BATCH, ROUNDS = 8, 8
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
            sampler: a name of `gencontrol.sampling.samplers.SAMPLERS`: "dts-star" (looks for the best sample),
                "islands" (draws from the tilted law), "dts" (draws by a tree), or another one.
            reward_batch: samples per decode and reward call.
            autocast: dtype in which the network runs under torch.autocast, e.g. torch.bfloat16.
            store: device of a tree's states, e.g. "cpu" where memory is short; None is the network's.

        Raises:
            UsageError: a pipeline that cannot be searched, a set reward, or an unknown sampler.
        """
        super().__init__()
        self.pipe, self._searchable = pipe, searchable(pipe)
        self.reward = as_item_reward(reward)
        known_sampler(sampler)
        self.temperature, self.sampler = temperature, sampler
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
        readout: Readout | None = None,
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
            readout: "best" takes the samples of largest reward; "sample" draws from the found law, with repeats, and
                "distinct" without (from trees by the rule "weighted" of `DiffusionTree.draw`, or "robust" where UCT
                grew it); None is the sampler's own, see `SAMPLERS`.
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
        count, kind = self._count(num_images_per_prompt, num_waveforms_per_prompt), self._output_type(output_type)
        if generator is not None and seed is not None:
            raise UsageError("generator and seed are both given; give one of them.")
        if readout is not None and readout not in READOUTS:
            raise UsageError(f"unknown readout '{readout}'.{nearest(readout, READOUTS)} Known: {', '.join(READOUTS)}.")
        shape = {"select": select, "backup": backup, "widening": widening, "branch": branch}
        if tree is not None:
            own: dict[str, Any] = {"generator": generator, "seed": seed, "sampler": sampler, **shape}
            own |= {"leaf_batch": leaf_batch, "step": step, "options": options}
            _refuse(own, "{} belongs to the tree that is grown further; drop it, or build a new tree.")
        sampler, seed = sampler or self.sampler, seed_of(generator if seed is None else seed)
        row, nfe = known_sampler(sampler), arguments.positive(nfe, "nfe")
        batch = None if leaf_batch is None else arguments.positive(leaf_batch, "leaf_batch")
        with self.at_work():
            problem = self.problem(
                prompt,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                negative_prompt=negative_prompt,
                height=height,
                width=width,
                audio_end_in_s=audio_end_in_s,
            )
            if tree is None and not row.tree:
                _refuse(shape, f"{{}} is for trees ({', '.join(TREES)}), not for '{sampler}'; drop it.")
                how = {"step": step, "batch": batch or LEAF_BATCH}
                found = self._particles(problem, sampler, nfe, seed, how, options or {}, callback)
                picks = [take(each, count, readout or row.readout, seed) for each in found]
                nfe, calls = sum(each.nfe for each in found), sum(each.reward_calls for each in found)
                facts: tuple[Any, ...] = (nfe, calls, tuple(each.log_z for each in found), None, tuple(found))
            else:
                if tree is not None:
                    self.tree = self.resume(tree, problem)
                    readout = readout or ("best" if self.tree.config.select.greedy else "sample")
                elif options:
                    raise UsageError(f"options are for particle samplers; {sampler} takes {', '.join(shape)}.")
                else:
                    batch = batch or max(1, min(LEAF_BATCH, nfe // problem.steps // ROUNDS))
                    self.tree = self.plant(problem, sampler, leaf_batch=batch, generator=seed, step=step, **shape)
                facts = self._built(self.tree, nfe, callback)
                picks = [read(self.tree, root, count, readout or row.readout)[:2] for root in range(self.tree.roots)]
            fewest = min(len(x) for x, _ in picks)
            if fewest < count:
                what = "the search has only {} valid particles" if facts[3] is None else "the tree has {} valid leaves"
                raise UsageError(f"{count} samples were asked for, but {what.format(fewest)}; raise nfe.")
            x, rewards = (torch.cat(part) for part in zip(*picks, strict=True))
            output = self._output(problem, x, rewards, facts, kind)
        return output if return_dict else output.to_tuple()

    # ---- the parts of a search ----------------------------------------------------------------------------------

    def at_work(self) -> AbstractContextManager[None]:
        """Context of a whole search: parameters out of autograd, and what the networks need while it runs."""
        return self._searchable.at_work()

    def problem(self, prompt: int | str | Sequence[int | str], **asked: Any) -> Problem:
        """Encode the prompts; asked: the arguments of a call that decide the law, None where not given.

        Raises:
            UsageError: an argument out of range, or one without effect in this pipeline.
        """
        takes = inspect.signature(self._searchable.problem).parameters
        given = {name: value for name, value in asked.items() if value is not None}
        owner = getattr(self._searchable, "owner", f"a {type(self.pipe).__name__}")
        _refuse(
            {name: value for name, value in given.items() if name not in takes},
            f"{{}} has no effect with {owner}; drop it.",
        )
        if "num_inference_steps" in given:
            arguments.positive(given["num_inference_steps"], "num_inference_steps")
        return self._searchable.problem(prompt, **given)

    def plant(self, problem: Problem, sampler: str, **options: Any) -> DiffusionTree:
        """Return an empty tree with one root per prompt; options of `DiffusionTree`, None is the sampler's own."""
        row = known_sampler(sampler)
        own: dict[str, Any] = {"select": row.select, "widening": row.widening}
        own["branch"] = min(SEGMENTS, problem.steps)
        return DiffusionTree(
            problem.model,
            self.reward,
            (len(problem.prompts), *problem.item_shape),
            steps=problem.steps,
            times=problem.times,
            temperature=self.temperature,
            **(own | {name: value for name, value in options.items() if value is not None}),
            **self._scoring(problem),
        )

    def resume(self, source: DiffusionTree | str | Path, problem: Problem) -> DiffusionTree:
        """Return an earlier tree of the same problem, from its file or as it is; retilted to this temperature.

        Raises:
            UsageError: it belongs to another model, condition, prompt, reward or number of steps.
        """
        if isinstance(source, DiffusionTree):
            tree = source
            _same_problem(tree, problem, self.reward)
        else:
            tree = DiffusionTree.load(source, problem.model, self.reward, **self._scoring(problem))
        if tree.chain.steps != problem.steps or (problem.times is not None and tree.chain.grid != problem.times):
            raise UsageError(
                f"this tree was built with {tree.chain.steps} steps or another scheduler; give num_inference_steps="
                f"{tree.chain.steps} and the scheduler that it had, or build a new tree."
            )
        return tree if tree.config.temperature == self.temperature else tree.retilt(self.temperature)

    def target(
        self,
        problem: Problem,
        index: int,
        seed: int,
        *,
        step: str | Step | None = None,
        batch: int | None = None,
        poll: Callable[[], None] | None = None,
    ) -> Target:
        """Return what a particle sampler works on for one of the prompts; arguments as in `Target`."""
        one = problem.only(index)
        scorer = Scorer(self.reward, one.decode, one.context, self.reward_batch)
        return Target(one.chain(step, self.autocast), scorer, self.temperature, seed, batch, poll)

    def _scoring(self, problem: Problem) -> dict[str, Any]:
        """What a tree needs to know beside its law."""
        return {
            "cond": problem.cond,
            "decode": problem.decode,
            "context": problem.context,
            "reward_batch": self.reward_batch,
            "autocast": problem.autocast(self.autocast),
            "store": self.store,
        }

    def _built(
        self, tree: DiffusionTree, nfe: int, callback: Callback | None
    ) -> tuple[int, int, tuple[float, ...], DiffusionTree, None]:
        """Grow a tree; returns the facts of an output: what this growth cost, log Z, and the tree."""
        nfe_before, calls_before = tree.nfe, tree.reward_calls
        with self._bar(nfe * tree.roots, tree.nfe, callback) as after:
            for progress in tree.build(nfe):
                if after(progress):
                    break
        stats = [tree.stats(root) for root in range(tree.roots)]
        # importance-weighted, or where UCT chose the rollouts from the fresh ones: neither is biased by where the
        # search went, as the tree's own estimate is
        log_z = tuple(s["log_z_base"] if math.isnan(s["log_z_iw"]) else s["log_z_iw"] for s in stats)
        return tree.nfe - nfe_before, tree.reward_calls - calls_before, log_z, tree, None

    def _particles(
        self,
        problem: Problem,
        sampler: str,
        nfe: int,
        seed: int,
        how: Mapping[str, Any],
        options: Mapping[str, Any],
        callback: Callback | None,
    ) -> list[Particles]:
        """Run a particle sampler prompt by prompt, until the callback ends it."""
        found: list[Particles] = []
        with self._bar(nfe * len(problem.prompts), 0, callback) as after:
            for index in range(len(problem.prompts)):
                target = self.target(problem, index, stream_seed(seed, "search/prompt", index), **how)
                found.append(spend(sampler, target, nfe, **options))
                reached = Progress(
                    sum(each.nfe for each in found),
                    sum(each.reward_calls for each in found),
                    tuple(float(each.rewards[each.valid].max()) for each in found),
                    tuple(each.log_z for each in found),
                    tuple(each.ess / len(each) for each in found),
                    len(found),
                )
                if after(reached):
                    break
        return found

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
    def _output(
        self, problem: Problem, x: Tensor, rewards: Tensor, facts: tuple[Any, ...], kind: str
    ) -> ImageSearchOutput | AudioSearchOutput:
        """Decode in batches, in the form that was asked for."""
        samples: Any = x
        if kind != "latent":
            samples = torch.cat([problem.decode(part) for part in x.split(self.reward_batch)])
        if self._searchable.kind == "audio":
            assert problem.sampling_rate is not None
            samples = samples.cpu().numpy() if kind == "np" else samples
            return AudioSearchOutput(samples, problem.sampling_rate, rewards, *facts)
        if kind == "pil":
            samples = [to_pil(image) for image in samples]
        elif kind == "np":
            samples = samples.permute(0, 2, 3, 1).cpu().numpy()
        return ImageSearchOutput(samples, rewards, *facts)

    def _count(self, images: int | None, waveforms: int | None) -> int:
        """Samples per prompt, by the name that fits the pipeline."""
        if self._searchable.kind == "audio":
            _refuse({"num_images_per_prompt": images}, "{} has no effect with an audio pipeline; drop it.")
            return arguments.positive(1 if waveforms is None else waveforms, "num_waveforms_per_prompt")
        _refuse({"num_waveforms_per_prompt": waveforms}, "{} has no effect with an image pipeline; drop it.")
        return arguments.positive(1 if images is None else images, "num_images_per_prompt")

    def _output_type(self, name: str | None) -> str:
        """The form of the samples, checked."""
        known = _OUTPUTS[self._searchable.kind]
        if name is not None and name not in known:
            raise UsageError(f"output_type is '{name}'.{nearest(name, known)} Known here: {', '.join(known)}.")
        return name or known[0]


def _refuse(given: Mapping[str, Any], message: str) -> None:
    """Raise UsageError for the first argument that is not None: it has no use here."""
    for name, value in given.items():
        if value is not None:
            raise UsageError(message.format(name))


def read(tree: DiffusionTree, root: int, count: int, readout: str) -> Leaves:
    """Return samples of a tree: its best leaves, draws of its law, or distinct draws (best first; what there is).

    Raises:
        UsageError: the tree has no valid leaf of this root.
    """
    if readout == "best":
        return tree.best(count, root=root)
    rule = "weighted" if tree.weighable else "robust"
    if readout == "sample":
        return tree.draw(count, root=root, rule=rule)
    drawn = tree.draw(max(1, min(count, len(tree.leaf_law(root, rule)[0]))), root=root, rule=rule, replace=False)
    order = drawn.rewards.argsort(descending=True, stable=True)
    return Leaves(*(part[order.to(part.device)] for part in drawn))


def take(found: Particles, count: int, readout: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return states and rewards of samples of one population: the best, draws by weight, or distinct draws, best first.

    Fewer than `count` where fewer are valid, except for draws with repeats.
    """
    generator = torch.Generator().manual_seed(seed)
    if readout == "sample":
        order = torch.multinomial(found.weights, count, replacement=True, generator=generator)
    elif readout == "best":
        order = found.rewards.masked_fill(~found.valid, -math.inf).argsort(descending=True, stable=True)
        order = order[: int(found.valid.sum())][:count]
    else:
        valid = found.valid & torch.isfinite(found.log_weights)
        uniform = torch.rand(len(found), generator=generator, dtype=torch.float64)
        # the largest Gumbel keys are a draw without replacement
        keys = (found.log_weights - torch.log(-torch.log(uniform))).masked_fill(~valid, -math.inf)
        order = keys.argsort(descending=True, stable=True)[: min(count, int(valid.sum()))]
        order = order[found.rewards[order].argsort(descending=True, stable=True)]
    return found.samples[order.to(found.samples.device)], found.rewards[order].double()


def _same_problem(tree: DiffusionTree, problem: Problem, reward: Any) -> None:
    """Raise UsageError naming what differs between a tree's problem and this one."""
    mine, theirs = ([leaf.cpu() for leaf in cond_leaves(cond)] for cond in (problem.cond, tree.chain.cond))
    equal = len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))
    found = {
        "size": tree.chain.item_shape == tuple(problem.item_shape),
        "prompt": list(tree.scorer.context.prompts or []) == problem.prompts,
        "negative prompt or guidance": equal,
        "model or guidance": fingerprint(tree.chain.model) == fingerprint(problem.model),
        "reward": tree.scorer.reward.name == reward.name,
    }
    for name, same in found.items():
        if not same:
            raise UsageError(f"this tree was built with another {name}; give the same {name}, or build a new tree.")
