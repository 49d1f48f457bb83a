"""`search`: the best samples for a reward that a budget of model calls finds, without training.

Trees (DTS, DTS*) are kept in tree.safetensors, so a search that was stopped or gets a larger budget goes on; particles
are drawn prompt by prompt and kept as they are finished.  A round of a tree is a pure function of the tree, and a
prompt's particles of the seed, so a search that was killed and started again ends with the same bits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gencontrol.config import build, dump_toml
from gencontrol.errors import CheckpointError, Inconclusive, Preempted, RewardError, UsageError
from gencontrol.files import FileLayer, disk_errors
from gencontrol.jobs.search.config import SearchConfig, SourceConfig, branch_of, parse_widening
from gencontrol.jobs.search.drawn import draw_all, with_peers
from gencontrol.jobs.search.results import (
    SUMMARY,
    Found,
    Saver,
    clean,
    clean_staging,
    headline,
    mean,
    of_tree,
    read_json,
    write_results,
)
from gencontrol.jobs.setup.checks import check_model, check_reference, check_rewards, check_source, download_hint
from gencontrol.jobs.setup.environment import choose_device, prepare
from gencontrol.jobs.setup.models import folder_of, human_bytes
from gencontrol.jobs.setup.prompts import read_prompts
from gencontrol.jobs.setup.runs import RunFolder, open_run, record
from gencontrol.jobs.setup.settings import Start, called, describe, place
from gencontrol.sampling.samplers import NO_GRADIENT, sampler

if TYPE_CHECKING:
    from gencontrol.pipelines.search.problem import Problem
    from gencontrol.pipelines.search.tree_search import TreeSearchPipeline
    from gencontrol.sampling.chain import Chain
    from gencontrol.sampling.tree.tree import DiffusionTree

#: options that may change between two commands on one folder: they alter what is shown, not what is drawn
_FREE = ("search.count", "search.save_every", "search.peer", "run.device", "run.threads")
_TREE = "tree.safetensors"
#: bytes per node beside its state, children and rollouts included (measured)
_NODE = 74
#: our own pipelines, whose law is read from files
_OWN = ("TextToAudioPipeline", "ClassToImagePipeline", "TextToImagePipeline")


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Args:
        folder: the run folder, with samples/, results.csv, metrics.jsonl and report.html.
        items: the rows of results.csv: prompt, rank, reward, nfe, file (relative to the folder) and others.
        tree: the forest, one root per prompt; None for particles, and where the search was finished before.
    """

    folder: Path
    items: Sequence[Mapping[str, Any]]
    tree: DiffusionTree | None = None

    @property
    def undecided(self) -> list[str]:
        """What the search could not do, one sentence each: trees that never branched."""
        from gencontrol.reports.search import unbranched

        return unbranched(read_json(self.folder / SUMMARY) or {})

    @property
    def files(self) -> list[Path]:
        """The samples, prompt by prompt, best first."""
        return [self.folder / str(item["file"]) for item in self.items]


@dataclass(frozen=True)
class Live:
    """What was handed over as an object instead of by name; None or empty where nothing was."""

    pipeline: Any = None
    rewards: Sequence[Any] = ()


@dataclass(frozen=True)
class Job:
    """A checked search, before anything is loaded.

    Args:
        source, search: the two configurations.
        prompts: what is searched for, one tree each.
        folder: the run folder.
        law: what the model's small files say, or None; with the scale of its guidance.
    """

    source: SourceConfig
    search: SearchConfig
    prompts: list[str]
    folder: RunFolder
    law: tuple[Chain, float] | None


def search(
    model: Any = "bundled",
    reward: Any = "clap",
    *,
    prompt: str | Sequence[str] = (),
    sampler: str = "dts-star",
    nfe: int = 4000,
    output: str | Path = "runs/search",
    mode: Literal["auto", "fresh"] = "auto",
    allow_change: Sequence[str] = (),
    **options: Any,
) -> SearchResult:
    """Search for the samples that a reward likes best; the same call goes on where an earlier one was stopped.

    Args:
        model: "bundled", "bundled-digits", a folder, a hub id, a loaded pipeline of diffusers or of ours, or anything
            with the methods of `gencontrol.pipelines.search.problem.Searchable`.
        reward: a spec such as "clap:0.7", a Reward, a function of samples or of (samples, context) that returns one
            number per sample, or a list of these, summed.
        prompt: one text or several; `prompts=` names a file of further ones.
        sampler: a name of `gencontrol.sampling.samplers.SAMPLERS`.
        nfe: model calls per prompt, counted from the beginning of the search.
        output: the run folder.
        mode: "auto" goes on in a used folder, "fresh" refuses one.
        allow_change: options such as "search.seed" that may differ from those of the run folder.
        options: further fields of SourceConfig and SearchConfig, e.g. temperature=0.05, steps=20, count=8.

    Raises:
        UsageError, EnvironmentMissing: what cannot work, and what to do.
        RewardError: the reward broke its contract, or nothing could be scored.
        Preempted: a signal came (Ctrl-C too); what was reached is saved.
    """
    rewards = list(reward) if isinstance(reward, (list, tuple)) else [reward]
    table = place(options, {"run": SourceConfig, "search": SearchConfig})
    table["run"] |= {"prompt": [prompt] if isinstance(prompt, str) else list(prompt), "model": called(model)}
    table["run"] |= {"reward": [called(one) for one in rewards], "output": str(output)}
    table["search"] |= {"sampler": sampler, "nfe": nfe}
    result = run(
        table,
        Start(mode=mode, allow=tuple(allow_change)),
        Live(None if isinstance(model, (str, Path)) else model, rewards),
    )
    assert result is not None  # None is a dry run's
    return result


def run(table: dict[str, dict[str, Any]], start: Start, live: Live | None = None) -> SearchResult | None:
    """Check all options; then print the plan (dry run: None), say that it is done, or search.

    Args:
        table: {section: {option: value}}, what was given.
        live: None for the command line, which tells by its exit code what Python reads from `SearchResult.undecided`.

    Raises:
        Inconclusive: on the command line, after all is written: no tree branched, so this was best of n.
    """
    called_by_command, live = live is None, live or Live()
    job = check(table, start, live)
    folder, config = job.folder.path, job.search
    if start.dry_run:
        print(*plan(job), "\nconfiguration (save it as search.toml for --config)\n", sep="\n")
        print(dump_toml(job.folder.table), end="")
        return None
    summary = read_json(folder / SUMMARY) or {}
    done = summary.get("finished") and summary["nfe"] >= config.nfe and summary["count"] == config.count
    if done and (summary.get("peer") or not config.peer):
        hint = "a larger --nfe goes on" if sampler(config.sampler).anytime else "another --output starts anew"
        calls = f"{folder} holds {summary['nfe']} model calls per prompt"
        print(f"finished before: {calls}; see {folder / 'report.html'} ({hint}).", file=sys.stderr)
        return _checked(SearchResult(folder, read_json(folder / "results.json") or []), called_by_command)
    import torch

    from gencontrol.reports.data import about
    from gencontrol.reports.run import write_report
    from gencontrol.reports.search import compared
    from gencontrol.train.run_folder import Lock, check_settings

    loaded = _load(job, live)
    with loaded.at_work():
        problem = loaded.problem(job.prompts, num_inference_steps=config.steps, guidance_scale=config.guidance_scale)
        check_budget(config, problem.steps)
        if config.needs_gradient:
            check_gradient(problem, loaded.reward, config.sampler)
        with disk_errors("the run folder", folder):
            FileLayer().make_folder(folder)
        with Lock(folder):
            for note in job.folder.notes:
                print(f"changed since the last start: {note}", file=sys.stderr)
            with disk_errors("the settings", folder):
                check_settings(folder, job.folder.table, job.folder.allow, FileLayer())
                known = {called(one): one for one in live.rewards if not isinstance(one, str)}
                said = about("", job.source.reward, known)
                record(job.folder, {"kind": "search", "prompts": job.prompts, "about": said})
            clean_staging(folder)
            if sampler(config.sampler).tree:
                found, facts, tree = _trees(job, loaded, problem)
            else:
                (found, facts), tree = draw_all(folder, config, loaded, problem, job.prompts), None
            if config.peer:
                found = with_peers(config, loaded, problem, found)
            facts |= {
                "peer": config.peer,
                "sampler": config.sampler,
                "nfe": config.nfe,
                "count": config.count,
                "steps": problem.steps,
            }
            with torch.no_grad():
                rows = write_results(folder, found, facts, lambda x: problem.decode(x).cpu(), loaded.pipe)
    for line in compared(read_json(folder / SUMMARY) or {}):
        print(line)
    print(f"table:  {folder / 'results.csv'}\nreport: {write_report(folder)}")
    return _checked(SearchResult(folder, rows, tree), called_by_command)


def _checked(result: SearchResult, called_by_command: bool) -> SearchResult:
    """The result; a command ends with Inconclusive where no tree of it branched."""
    said = result.undecided
    if called_by_command and said and len(said) == len({row["prompt"] for row in result.items}):
        raise Inconclusive(" ".join(said))
    return result


def check(table: dict[str, dict[str, Any]], start: Start, live: Live) -> Job:
    """Validate everything; loads no weights and writes nothing.

    Raises:
        UsageError, EnvironmentMissing: what cannot work, and what to do.
    """
    branch = table["search"].get("branch")
    if isinstance(branch, int):  # an override without quotes
        table["search"]["branch"] = str(branch)
    source = build(SourceConfig, table["run"], "run")
    config = build(SearchConfig, table["search"], "search")
    prepare(threads=source.threads, online=source.online)
    _check_rewards([spec for spec in live.rewards or source.reward if isinstance(spec, str)], config)
    if live.pipeline is None:
        check_model(source.model)
    if source.reference is not None:
        check_reference(source.reference)
    if source.reward_model is not None:
        check_source(source.reward_model, "--reward-model")
    prompts = [*source.prompt, *(read_prompts(source.prompts) if source.prompts else [])]
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UsageError("no prompt is given, or an empty one; use --prompt TEXT (repeatable) or --prompts FILE.")
    mark = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:12]
    if source.prompts_hash not in (None, mark):
        raise UsageError(
            "the prompts differ from those that this configuration was made with; remove run.prompts_hash from the "
            "config file to search for the new ones."
        )
    source = dataclasses.replace(source, prompts_hash=mark)  # so that an edited file does not pass as the same search
    choose_device(source.device)
    law = read_law(source.model, config) if live.pipeline is None else None
    if law is not None:
        check_budget(config, law[0].steps)
    sections = describe([("run", source), ("search", config)])
    free = (*_FREE, *(("search.nfe",) if sampler(config.sampler).anytime else ()), *start.allow)
    return Job(source, config, prompts, open_run(source.output, sections, mode=start.mode, allow=free), law)


def _check_rewards(specs: Sequence[str], config: SearchConfig) -> None:
    """Check rewards by name, and what is known of the registered ones; user code is looked at when loaded."""
    from gencontrol.registry import REWARDS, find
    from gencontrol.rewards.loading import parse_spec

    check_rewards(specs)
    for spec in specs:
        name, _ = parse_spec(spec)
        if name in REWARDS:
            kind = find(REWARDS, name, "reward")
            check_reward_kind(name, kind.kind, config, differentiable=kind.differentiable)


def check_reward_kind(name: str, kind: str, config: SearchConfig, *, differentiable: bool) -> None:
    """Raise UsageError for a set reward, or for one without the gradient that the sampler needs."""
    if kind != "item":
        raise UsageError(
            f"reward '{name}' scores whole sets; a search scores single samples: use an item reward such as clap, "
            "quality or the per-clip fad."
        )
    if config.needs_gradient and not differentiable:
        raise UsageError(
            f"reward '{name}' has no gradient, which {config.sampler} needs; choose a sampler without: {NO_GRADIENT}."
        )


def check_budget(config: SearchConfig, steps: int) -> None:
    """Raise UsageError where the budget does not pay for one sample."""
    needed = sampler(config.sampler).cost(steps, config.children)
    if config.nfe < needed:
        raise UsageError(
            f"--nfe {config.nfe} is less than the {needed} model calls of one {config.sampler} sample "
            f"({steps} steps); give at least {needed}, or fewer --steps."
        )


def check_gradient(problem: Problem, reward: Any, name: str) -> None:
    """Check that the reward of a decoded sample has a gradient in the clean state.

    Raises:
        UsageError: it has none; most decoders of sound pass none.
    """
    import torch

    from gencontrol.sampling.loop import model_device
    from gencontrol.sampling.scoring import Scorer

    first = problem.only(0)
    with torch.enable_grad():
        state = torch.zeros((1, *problem.item_shape), device=model_device(problem.model, None), requires_grad=True)
        value = Scorer(reward, first.decode, first.context).differentiable(state, torch.zeros(1, dtype=torch.int64))
        found = torch.autograd.grad(value.sum(), state, allow_unused=True)[0] if value.requires_grad else None
    if found is None:
        raise UsageError(
            f"{name} follows the reward's gradient, but reward or decoder of this model passes none; choose one of "
            f"{NO_GRADIENT}."
        )


# ---------------------------------------------------------------- the plan


def read_law(model: str, config: SearchConfig) -> tuple[Chain, float] | None:
    """Return law and guidance scale of a model folder of ours from its small files; None where only loading tells.

    Raises:
        UsageError: a folder that is no pipeline, or branch times that are not in the grid.
    """
    from torch import nn

    from gencontrol.pipelines.backends.audio import ProcessSpec
    from gencontrol.pipelines.hub.hub import read_index
    from gencontrol.sampling.chain import branch_indices, make_chain

    folder = folder_of(model)
    kind = None if folder is None else str(read_index(folder)["_class_name"])
    if folder is None or kind not in _OWN:
        return None
    spec = ProcessSpec.read(folder)
    file = folder / ("codec" if kind == _OWN[0] else "transformer") / "config.json"
    try:
        parts = json.loads(file.read_text(encoding="utf-8"))
        if kind == _OWN[0]:
            tokens = int(parts["clip_samples"]) // (int(parts["hop"]) * int(parts["frames_per_token"]))
            shape: tuple[int, ...] = (tokens, int(parts["channels"]))
        else:
            shape = (int(parts["channels"]), int(parts["size"]), int(parts["size"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"'{file}' cannot be read ({error}); save or download the model again.") from error
    chain = make_chain(spec.denoiser(nn.Identity()), shape, steps=config.steps or spec.steps)
    branch_indices(chain, branch_of(config, chain.steps))
    return chain, spec.guidance_scale if config.guidance_scale is None else config.guidance_scale


def plan(job: Job) -> list[str]:
    """Return the lines of the plan: what would be done, the budget's arithmetic, memory."""
    from gencontrol.sampling.chain import branch_indices
    from gencontrol.sampling.particles import particles_for_budget
    from gencontrol.sampling.tree.rules import WIDENINGS

    config, source, row, prompts = job.search, job.source, sampler(job.search.sampler), len(job.prompts)
    lines = [f"plan: {config.sampler} towards {' + '.join(source.reward)} on {source.model} → {job.folder.path}"]
    if (job.folder.path / _TREE).exists():
        lines.append("  the run folder holds a tree: the search goes on from it")
    lines += [f"  changed since the last start: {note}" for note in job.folder.notes]
    lines.append(f"  prompts        {prompts}, {config.count} samples written of each")
    budget = f"  budget         {config.nfe} model calls per prompt"
    if job.law is None:
        return [*lines, budget, "                 steps and sizes are known once the model is loaded"]
    chain, scale = job.law
    lines.append(budget + (f" × {prompts} prompts = {config.nfe * prompts}" if prompts > 1 else ""))
    if scale > 1:
        lines.append(f"                 a call is 2 rows of the network (guidance {scale:g}) and counts one")
    steps, state = chain.steps, 4 * math.prod(chain.item_shape)
    lines.append(f"  one path       {steps} steps = {steps} model calls, then 1 decoding and 1 reward call")
    if not row.tree:
        number = particles_for_budget(config.sampler, config.nfe, steps, config.children)
        size = f"{number} states of {human_bytes(state)} = {human_bytes(number * state)}"
        lines.append(f"  particles      {number} per prompt, {config.leaf_batch} rows per model call")
        return [*lines, f"  memory         {size}, beside model and reward"]
    levels = branch_indices(chain, branch_of(config, steps))
    segments = [after - before for before, after in zip((0, *levels), levels)]
    fewest, most = config.nfe // steps, config.nfe // segments[-1]
    widening = parse_widening(config.widening or row.widening)
    if isinstance(widening, str):
        widening = WIDENINGS[widening].constant, WIDENINGS[widening].alpha
    formula = f"{widening[0]:g}·N^{widening[1]:g}"
    nodes = config.nfe * prompts // min(segments)
    times = ", ".join(f"{chain.grid[index]:.3g}" for index in levels)
    size = f"{'×'.join(map(str, chain.item_shape))} float32 = {human_bytes(state)} per node"
    lines += [
        f"  tree           {len(segments)} levels below the root, at times {times}",
        f"                 segments of {', '.join(map(str, segments))} steps; widening {formula}",
        f"  paths          {fewest} whole ones to {most} that only take the last segment, per prompt",
        f"  rounds         {-(-fewest // config.leaf_batch)} or more, {config.leaf_batch * prompts} paths at once",
        f"  reward calls   one per path: {fewest * prompts} to {most * prompts}",
        f"  states         {size}",
        f"  memory         at most {nodes} nodes = {human_bytes(nodes * (state + _NODE))}, beside model and reward",
    ]
    if fewest < 8:
        lines.append("  note           so few paths leave a tree no room to search: raise --nfe or lower --steps")
    return lines


# ---------------------------------------------------------------- loading


def _load(job: Job, live: Live) -> TreeSearchPipeline:
    """Load model (float32) and reward, and bind them.

    Raises:
        UsageError: no model there, one that cannot be searched, or a reward that does not fit.
    """
    import torch

    from gencontrol.pipelines import TreeSearchPipeline
    from gencontrol.rewards import load_rewards
    from gencontrol.sampling.scoring import as_item_reward
    from gencontrol.train.precision import autocast_dtype

    source, config = job.source, job.search
    device = choose_device(source.device)
    pipeline = live.pipeline
    if pipeline is None:
        with download_hint(source.model, online=source.online):
            pipeline = _pipeline(source.model, online=source.online).to(device)
    # a plain function of samples, or of samples and their context, may carry a gradient
    rewards = [as_item_reward(one) if inspect.isfunction(one) else one for one in live.rewards or source.reward]
    with download_hint(source.reward_model, online=source.online):
        reward = load_rewards(
            rewards,
            reward_model=source.reward_model,
            reference=source.reference,
            encoder=source.encoder,
            device=device,
        )
    check_reward_kind(reward.name, reward.kind, config, differentiable=reward.differentiable)
    dtype = autocast_dtype(source.precision, torch.device(device).type)
    return TreeSearchPipeline(
        pipeline, reward, temperature=config.temperature, sampler=config.sampler, reward_batch=64, autocast=dtype
    )


def _pipeline(model: str, *, online: bool) -> Any:
    """Load the pipeline that the model's index names."""
    from gencontrol import pipelines
    from gencontrol.pipelines.hub.hub import BUNDLED_NAMES, LoadOptions, check_pipeline_class, locate
    from gencontrol.pipelines.search.searchable import SEARCHABLE

    index, where = locate(
        model, LoadOptions(local_files_only=not online), BUNDLED_NAMES.get(model, BUNDLED_NAMES["bundled"])
    )
    kind = check_pipeline_class(index, SEARCHABLE, where, "a search")
    if kind in ("StableAudioPipeline", "AudioLDM2Pipeline"):
        kind = "TextToAudioPipeline"
    if kind in _OWN:
        return getattr(pipelines, kind).from_pretrained(model, local_files_only=not online)
    import diffusers

    return getattr(diffusers, kind).from_pretrained(where, use_safetensors=True, local_files_only=not online)


# ---------------------------------------------------------------- trees


def _trees(job: Job, loaded: TreeSearchPipeline, problem: Problem) -> tuple[list[Found], dict[str, Any], DiffusionTree]:
    """Grow one tree per prompt up to the budget, saved now and then, at the end, and when a signal ends it.

    Raises:
        Preempted: a signal came; the tree is saved.
        RewardError: nothing could be scored.
        UsageError, CheckpointError: the tree in the folder is of another search, or damaged.
        DiskError: the tree could not be written.
    """
    from gencontrol.train.run_folder import MetricsFile
    from gencontrol.train.signals import SignalGuard
    from gencontrol.train.tracking import Progress

    path, config = job.folder.path, job.search
    tree = _open_tree(path / _TREE, config, loaded, problem)
    metrics = MetricsFile(path / "metrics.jsonl", FileLayer())
    metrics.rewind(tree.rounds)
    rows = metrics.read()
    begin = time.monotonic() - (rows[-1].get("time/wall", 0.0) if rows else 0.0)
    bar = Progress(len(job.prompts) * config.nfe, visible=True, unit="model call", describe=headline)
    saver = Saver(tree, path / _TREE, config.save_every)
    bar.start(tree.nfe)
    with SignalGuard() as guard:
        try:
            for reached in tree.build(config.nfe, total=True, poll=guard.poll):
                row: dict[str, Any] = {
                    "step": reached.rounds,
                    "nfe": reached.nfe,
                    "reward_calls": reached.reward_calls,
                    "reward/best": mean(reached.best),
                    "log_z": mean(reached.log_z),
                    "excluded": tree.scorer.excluded,
                    "time/wall": time.monotonic() - begin,
                }
                if tree.roots > 1:
                    row["reward/best_each"] = [clean(value) for value in reached.best]
                metrics.append(row)
                bar.show(reached.nfe, row)
                saver.when_due()
        except (Preempted, RewardError):
            saver.save()  # what was found before stays
            raise
        finally:
            bar.close()
            metrics.sync()
        saver.save()
    if not tree.counts["valid"].any():
        why = "; ".join(f"{reason} ({count})" for reason, count in tree.scorer.reasons.items())
        raise RewardError(f"reward '{tree.scorer.reward.name}' scored none of {tree.scorer.excluded} samples: {why}.")
    how = "best" if sampler(config.sampler).readout == "best" else "distinct"
    found = [of_tree(tree, root, prompt, config.count, how) for root, prompt in enumerate(job.prompts)]
    return found, {"seconds": time.monotonic() - begin, "excluded": dict(tree.scorer.reasons)}, tree


def _open_tree(file: Path, config: SearchConfig, loaded: TreeSearchPipeline, problem: Problem) -> DiffusionTree:
    """The tree of the run folder, or a new one.

    Raises:
        UsageError: the file is of another model, prompt or reward.
        CheckpointError: the file is damaged; it is left as it is.
    """
    if not file.exists():
        return loaded.plant(
            problem,
            config.sampler,
            branch=branch_of(config, problem.steps),
            select=config.select,
            backup=config.backup,
            widening=None if config.widening is None else parse_widening(config.widening),
            leaf_batch=config.leaf_batch,
            generator=config.seed,
            guidance=config.gradient,
            max_grad_norm=config.max_grad_norm or None,
        )
    try:
        return loaded.resume(file, problem)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UsageError) and "damaged" not in str(error):
            raise UsageError(f"'{file}': {error}") from error
        why = str(error) if isinstance(error, UsageError) else f"tree file '{file}' is damaged ({error})."
        raise CheckpointError(
            f"{why[:400]} Nothing was changed; put a good copy there, or name another --output to start anew."
        ) from error
