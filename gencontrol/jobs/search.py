"""`search`: the best samples for a reward that a budget of model calls finds, without training.

Trees (DTS, DTS*) are kept in tree.safetensors, so a search that was stopped or gets a larger budget goes on; particles
are drawn prompt by prompt and kept as they are finished.  A round of a tree is a pure function of the tree, and a
prompt's particles of the seed, so a search that was killed and started again ends with the same bits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import io
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AllowInfNan

from gencontrol.config import Count, Natural, NonNegative, build, dump_toml, options
from gencontrol.errors import CheckpointError, Preempted, RewardError, UsageError, nearest
from gencontrol.files import FileLayer, disk_errors
from gencontrol.jobs.search_results import SUMMARY, Found, clean, read_json, summarise, write_results
from gencontrol.jobs.setup.checks import check_model, check_reference, check_rewards, check_source, download_hint
from gencontrol.jobs.setup.environment import choose_device, prepare
from gencontrol.jobs.setup.models import folder_of
from gencontrol.jobs.setup.plan import human_bytes
from gencontrol.jobs.setup.prompts import read_prompts
from gencontrol.jobs.setup.runs import RunFolder, open_run, record
from gencontrol.jobs.setup.settings import Start, called, describe, place
from gencontrol.sampling.samplers import NO_GRADIENT, SAMPLERS, TREES, sampler

if TYPE_CHECKING:
    from gencontrol.pipelines.search.problem import Problem
    from gencontrol.pipelines.search.tree_search import TreeSearchPipeline
    from gencontrol.sampling.chain import Chain
    from gencontrol.sampling.tree.tree import DiffusionTree
    from gencontrol.train.signals import SignalGuard

#: options that may change between two commands on one folder: they alter what is shown, not what is drawn
_FREE = ("search.count", "search.save_every", "run.device", "run.threads")
_TREE = "tree.safetensors"
_PARTICLES = "gencontrol-particles-1"
#: Saving may take at most this share of the time (ours): a large tree is saved less often.
_SAVING_SHARE = 0.1
#: bytes per node beside its state, children and rollouts included (measured)
_NODE = 70
_RULES, _WIDENINGS = ("boltzmann", "uct", "tempered", "uniform"), ("paper", "text", "small")
#: our own pipelines, whose law is read from files
_OWN = ("TextToAudioPipeline", "ClassToImagePipeline", "TextToImagePipeline")


@options
class SourceConfig:
    """The [run] section: which model, prompts and rewards, and where the results go.

    Args:
        model: "bundled", "bundled-digits", a folder or a hub id.
        reward: clap, clip:0.3, package.module:Name, http://…; several are summed with their weights.
        prompt: a prompt as text; may be repeated.
        prompts: prompt file (txt, jsonl, csv); its prompts follow those of `prompt`.
        reward_model: folder or hub id of the reward's network; None takes the bundled one.
        reference: folder of sound, or a text file of captions, for rewards that compare with a reference law.
        encoder: encoder of such rewards; None takes theirs.
        output: the run folder.
        online: allow downloads from the hub.
        device: where it runs.
        threads: CPU threads; 0 leaves it to the library.
        precision: of the network's autocast; states and rewards stay float32.
        prompts_hash: written by a search, so that an edited prompt file is noticed; not meant to be set.
    """

    model: str = "bundled"
    reward: tuple[str, ...] = ("clap",)
    prompt: tuple[str, ...] = ()
    prompts: str | None = None
    reward_model: str | None = None
    reference: str | None = None
    encoder: str | None = None
    output: str = "runs/search"
    online: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Natural = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    prompts_hash: str | None = None

    def __post_init__(self) -> None:
        if not self.reward:
            raise ValueError("reward is empty; name at least one, e.g. reward = ['clap']")
        if not self.output:
            raise ValueError("output is empty; name the run folder")


@options
class SearchConfig:
    """The [search] section: how p(x)·exp(reward/temperature) is searched.

    Args:
        sampler: {SAMPLERS}; a tree ("dts" samples, "dts-star" maximises) or particles.
        nfe: model calls per prompt; a guided call (two rows of the network) counts one.
        temperature: τ > 0 in units of the reward; smaller follows the reward more.
        steps: sampler steps of a whole path; None is the model's own number.
        branch: equal segments between levels ("5"), "all", or times such as "0.8,0.6,0.4"; where particles resample.
            None is 5 segments, or one per step where there are fewer.
        leaf_batch: leaves per round and prompt of a tree; particles of one model call.
        widening: "paper", "text", "small", or "C,alpha": how many children a node of N visits may have, C·N^alpha;
            None is the sampler's own.
        select: rule while a tree grows: "boltzmann", "uct", "tempered", "uniform"; None is the sampler's own.
        backup: how values go up a tree: "soft", or "max" (the limit τ → 0).
        guidance_scale: classifier-free guidance; None is the model's own, 1 or below is none.
        gradient: strength of the reward's gradient in a tree's proposals, 0 is none.
        max_grad_norm: longer reward gradients are shortened to this; 0 leaves them.
        children: candidates per step of the beam.
        count: samples written per prompt.
        seed: of everything drawn.
        save_every: seconds between saves of a tree.
    """

    sampler: str = "dts-star"
    nfe: Count = 4000
    temperature: float = 0.1
    steps: Count | None = None
    branch: str | None = None
    leaf_batch: Count = 8
    widening: str | None = None
    select: str | None = None
    backup: str = "soft"
    guidance_scale: Annotated[float, AllowInfNan(False)] | None = None
    gradient: NonNegative = 0.0
    max_grad_norm: NonNegative = 0.0
    children: Count = 10
    count: Count = 4
    seed: Natural = 0
    save_every: NonNegative = 30.0

    def __post_init__(self) -> None:
        row = sampler(self.sampler)
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature = {self.temperature}; it must be above 0 and finite (for the limit 0 give --backup max)"
            )
        for what, name, known in (("backup", self.backup, ("soft", "max")), ("selection rule", self.select, _RULES)):
            if name is not None and name not in known:
                raise ValueError(f"unknown {what} '{name}'.{nearest(name, known)} Known: {', '.join(known)}.")
        given = {"select": self.select, "widening": self.widening, "gradient": self.gradient or None}
        for name, value in {**given, "backup": self.backup if self.backup != "soft" else None}.items():
            if value is not None and not row.tree:
                raise ValueError(
                    f"{name} has no effect on {self.sampler}; leave it out, or choose {' or '.join(TREES)}"
                )
        if self.branch is not None:
            parse_branch(self.branch)
        if self.widening is not None:
            parse_widening(self.widening)

    @property
    def needs_gradient(self) -> bool:
        """Whether the reward must be differentiable."""
        return SAMPLERS[self.sampler].gradient or self.gradient > 0


SearchConfig.__doc__ = (SearchConfig.__doc__ or "").replace("{SAMPLERS}", ", ".join(SAMPLERS))


def parse_branch(text: str) -> int | str | list[float]:
    """Return a number of segments, "all", or times.

    Raises:
        UsageError: something else.
    """
    if text == "all":
        return text
    if text.isdigit() and int(text) > 0:
        return int(text)
    try:
        times = [float(part) for part in text.split(",")]
    except ValueError:
        times = []
    if not times or not all(0 < time <= 1 for time in times):
        raise UsageError(
            f"branch '{text}' is not understood; give a number of segments (5), all, or times in (0, 1] (0.8,0.6,0.4)."
        )
    return times


def parse_widening(text: str) -> str | tuple[float, float]:
    """Return the name of a preset, or (C, alpha).

    Raises:
        UsageError: something else.
    """
    if text in _WIDENINGS:
        return text
    try:
        constant, alpha = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"unknown widening '{text}'.{nearest(text, _WIDENINGS)} Known: {', '.join(_WIDENINGS)}, or C,alpha such as "
            "2,0.8."
        ) from None
    if not (0 < constant < math.inf and 0 < alpha <= 1):
        raise UsageError(f"widening {text}: C·N^alpha needs C > 0 and alpha in (0, 1].")
    return constant, alpha


# ---------------------------------------------------------------- the job


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
    """
    live = live or Live()
    job = check(table, start, live)
    folder, config = job.folder.path, job.search
    if start.dry_run:
        print(*plan(job), "\nconfiguration (save it as search.toml for --config)\n", sep="\n")
        print(dump_toml(job.folder.table), end="")
        return None
    summary = read_json(folder / SUMMARY) or {}
    if summary.get("finished") and summary["nfe"] >= config.nfe and summary["count"] == config.count:
        hint = "a larger --nfe goes on" if sampler(config.sampler).tree else "another --output starts anew"
        calls = f"{folder} holds {summary['nfe']} model calls per prompt"
        print(f"finished before: {calls}; see {folder / 'report.html'} ({hint}).", file=sys.stderr)
        return SearchResult(folder, read_json(folder / "results.json") or [])
    from gencontrol.reports.run import write_report
    from gencontrol.train.run_folder import Lock

    loaded = _load(job, live)
    with loaded.at_work():
        problem = loaded.problem(job.prompts, num_inference_steps=config.steps, guidance_scale=config.guidance_scale)
        check_budget(config, problem.steps)
        if config.needs_gradient:
            check_gradient(problem, loaded.reward, config.sampler)
        with disk_errors("the run folder", folder):
            FileLayer().make_folder(folder)
        with Lock(folder):
            _begin(job)
            found, facts, tree = (_trees if sampler(config.sampler).tree else _particles)(job, loaded, problem)
            whole = {"sampler": config.sampler, "nfe": config.nfe, "count": config.count, "steps": problem.steps}
            rows = write_results(folder, found, whole | facts, _decoder(problem), _artefacts(loaded))
    print(f"table:  {folder / 'results.csv'}\nreport: {write_report(folder)}")
    return SearchResult(folder, rows, tree)


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
    free = (*_FREE, *(("search.nfe",) if sampler(config.sampler).tree else ()), *start.allow)
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


def branch_of(config: SearchConfig, steps: int) -> int | str | list[float]:
    """Return where levels lie on a path of so many steps."""
    return min(5, steps) if config.branch is None else parse_branch(config.branch)  # arXiv 2506.20701, table 2


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
    dtype = torch.bfloat16 if source.precision == "bf16" else None
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


def _decoder(problem: Problem) -> Callable[[Any], Any]:
    """Clean states [b *d] → samples on the CPU."""
    import torch

    def decode(x: Any) -> Any:
        with torch.no_grad():
            return problem.decode(x).cpu()

    return decode


def _artefacts(loaded: TreeSearchPipeline) -> Callable[[str, Any], dict[str, bytes]]:
    """How samples become files: as the pipeline writes them; diffusers' own pictures at their size."""
    from gencontrol.data.images import to_pil
    from gencontrol.pipelines import Pipeline

    if isinstance(loaded.pipe, Pipeline):
        return loaded.pipe.artefacts

    def picture(stem: str, sample: Any) -> dict[str, bytes]:
        buffer = io.BytesIO()
        to_pil(sample).save(buffer, format="PNG")
        return {f"{stem}.png": buffer.getvalue()}

    return picture


def _begin(job: Job) -> None:
    """Record settings and start in the run folder; delete half-written files that a killed process left."""
    from gencontrol.train.run_folder import check_settings

    for note in job.folder.notes:
        print(f"changed since the last start: {note}", file=sys.stderr)
    with disk_errors("the settings", job.folder.path):
        check_settings(job.folder.path, job.folder.table, job.folder.allow, FileLayer())
        record(job.folder, {"kind": "search", "prompts": job.prompts})
    _clean_staging(job.folder.path)


def _clean_staging(path: Path) -> None:
    """Delete half-written files; they are never read."""
    for kind in ("safetensors", "json", "jsonl", "csv", "toml"):
        for file in path.glob(f".tmp_*.{kind}_*"):
            file.unlink()


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
    bar = Progress(len(job.prompts) * config.nfe, visible=True, unit="model call", describe=_headline)
    saver = _Saver(tree, path / _TREE, config.save_every)
    bar.start(tree.nfe)
    with SignalGuard() as guard:
        try:
            for reached in tree.build(config.nfe, total=True, poll=guard.poll):
                row = {
                    "step": reached.rounds,
                    "nfe": reached.nfe,
                    "reward_calls": reached.reward_calls,
                    "reward/best": _mean(reached.best),
                    "log_z": _mean(reached.log_z),
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
    found = [_read_out(tree, root, prompt, config) for root, prompt in enumerate(job.prompts)]
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


class _Saver:
    """Saves a tree every so often, but never for more than a tenth of the time."""

    def __init__(self, tree: DiffusionTree, file: Path, every: float) -> None:
        self._tree, self._file, self._every = tree, file, every
        self._saved = tree.rounds if file.exists() else -1
        self._due = time.monotonic() + every

    def when_due(self) -> None:
        """Save where it is time."""
        if time.monotonic() >= self._due:
            self.save()

    def save(self) -> None:
        """Save unless the file holds this very state."""
        if self._saved == self._tree.rounds:
            return
        begin = time.monotonic()
        try:
            self._tree.save(self._file)
        except BaseException:
            _clean_staging(self._file.parent)  # a full disk must not keep half a tree
            raise
        self._saved = self._tree.rounds
        taken = time.monotonic() - begin
        self._due = time.monotonic() + max(self._every, taken / _SAVING_SHARE if self._every else 0.0)


def _headline(record: Mapping[str, Any]) -> str:
    """The numbers to watch."""
    best = record["reward/best"]
    return f"best {best:.4g}" if math.isfinite(best) else "nothing scored yet"


def _mean(values: Sequence[float]) -> float:
    """Mean of the finite values; NaN without one."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _read_out(tree: DiffusionTree, root: int, prompt: str, config: SearchConfig) -> Found:
    """Samples of a prompt: the best leaves of dts-star, distinct draws from the tree's law of dts."""
    import numpy as np

    from gencontrol.pipelines.search.tree_search import read

    leaves = None
    if tree.counts["valid"][root]:
        how = "best" if sampler(config.sampler).readout == "best" else "distinct"
        leaves = read(tree, root, config.count, how)
    leaf = tree.rollouts["leaf"].astype(np.int64)
    plain = (tree.rollouts["start"] == 0) & tree.nodes["ready"][leaf] & (tree.nodes.root_of(leaf) == root)
    # the first rollout that is a plain sample of the model and could be scored
    base = tree.gather(leaf[plain][:1]) if plain.any() else None
    return Found(
        prompt,
        None if leaves is None else leaves.x,
        [] if leaves is None else leaves.rewards.tolist(),
        None if base is None else base.x,
        None if base is None else float(base.rewards[0]),
        int(tree.counts["nfe"][root]),
        summarise(tree, root, None if leaves is None else int(leaves.nodes[0])),
    )


# ---------------------------------------------------------------- particles


@dataclass(frozen=True)
class _Kept:
    """Particles of one prompt as a file keeps them, the base sample beside them, and what they cost."""

    samples: Any
    rewards: Any
    log_weights: Any
    base: Any
    base_reward: float | None
    facts: Mapping[str, Any]


def _particles(job: Job, loaded: TreeSearchPipeline, problem: Problem) -> tuple[list[Found], dict[str, Any], None]:
    """Run the sampler for every prompt; finished prompts are kept, so a stopped search goes on with the next.

    Raises:
        Preempted: a signal came; finished prompts are kept.
        UsageError, CheckpointError: kept particles are of another model, or damaged.
        RewardError, DiskError: as the sampler and the disk have it.
    """
    from gencontrol.sampling.tree.store import fingerprint
    from gencontrol.train.run_folder import MetricsFile
    from gencontrol.train.signals import SignalGuard
    from gencontrol.train.tracking import Progress

    path, config = job.folder.path, job.search
    metrics = MetricsFile(path / "metrics.jsonl", FileLayer())
    metrics.rewind(0)
    bar = Progress(len(job.prompts), visible=True, unit="prompt", describe=_headline)
    mark = fingerprint(problem.model)
    kept: list[_Kept] = []
    reasons: dict[str, int] = {}
    bar.start(0)
    with SignalGuard() as guard:
        try:
            for index in range(len(job.prompts)):
                guard.poll()
                file = path / f"particles_{index:03d}.safetensors"
                if file.exists():
                    kept.append(_read(file, mark))
                else:
                    kept.append(_drawn(config, loaded, problem, index, guard))
                    _write(file, kept[-1], mark)
                facts = [each.facts for each in kept]
                for reason, count in facts[-1]["reasons"].items():
                    reasons[reason] = reasons.get(reason, 0) + count
                row = {
                    "step": len(kept),
                    "nfe": sum(each["nfe"] for each in facts),
                    "reward_calls": sum(each["reward_calls"] for each in facts),
                    "reward/best": sum(float(each.rewards.nan_to_num(-math.inf).max()) for each in kept) / len(kept),
                    "log_z": facts[-1]["log_z"],
                    "ess": facts[-1]["ess"],
                    "excluded": sum(each["excluded"] for each in facts),
                    "time/wall": sum(each["seconds"] for each in facts),
                }
                metrics.append(row)
                bar.show(index + 1, row)
        finally:
            bar.close()
            metrics.sync()
    found = [_chosen(config, prompt, each) for prompt, each in zip(job.prompts, kept, strict=True)]
    return found, {"seconds": row["time/wall"], "excluded": reasons}, None


def _drawn(config: SearchConfig, loaded: TreeSearchPipeline, problem: Problem, index: int, guard: SignalGuard) -> _Kept:
    """Run the sampler for one prompt; the base sample beside it costs one more path, which is not counted."""
    from gencontrol.rng import stream_seed
    from gencontrol.sampling.particles import options_of, spend
    from gencontrol.sampling.particles.population import base_samples

    begin, seed = time.monotonic(), stream_seed(config.seed, "search", index)
    wanted = {
        "resample_at": branch_of(config, problem.steps),
        "max_norm": config.max_grad_norm or None,
        "children": config.children,
    }
    own = options_of(config.sampler)
    target = loaded.target(problem, index, seed, batch=config.leaf_batch, poll=guard.poll)
    found = spend(config.sampler, target, config.nfe, **{key: value for key, value in wanted.items() if key in own})
    base, scores = base_samples(loaded.target(problem, index, seed), 1)
    facts = {
        "nfe": found.nfe,
        "reward_calls": found.reward_calls,
        "excluded": target.scorer.excluded,
        "log_z": clean(found.log_z),
        "ess": found.ess,
        "reasons": dict(target.scorer.reasons),
        "seconds": time.monotonic() - begin,
    }
    base_reward = clean(float(scores.values[0]))
    return _Kept(found.samples.cpu(), found.rewards, found.log_weights, base.x.cpu(), base_reward, facts)


def _write(file: Path, kept: _Kept, mark: str) -> None:
    from safetensors.torch import save

    plain = {"format": _PARTICLES, "model": mark, "base_reward": kept.base_reward, **kept.facts}
    tensors = {name: getattr(kept, name).contiguous() for name in ("samples", "rewards", "log_weights", "base")}
    with disk_errors("the particles", file.parent):
        FileLayer().replace_file(file, save(tensors, metadata={"particles": json.dumps(plain)}))


def _read(file: Path, mark: str) -> _Kept:
    """Read the particles of a finished prompt.

    Raises:
        CheckpointError: the file is damaged.
        UsageError: they are of another model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            plain = json.loads((opened.metadata() or {})["particles"])
            parts = {name: opened.get_tensor(name) for name in ("samples", "rewards", "log_weights", "base")}
        base_reward, model = plain.pop("base_reward"), plain.pop("model")
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"'{file}' is damaged ({str(error)[:200]}); delete it, and the same command draws its prompt again."
        ) from error
    if model != mark:
        raise UsageError(f"'{file}' holds particles of another model; give the same --model, or another --output.")
    return _Kept(**parts, base_reward=base_reward, facts=plain)


def _chosen(config: SearchConfig, prompt: str, kept: _Kept) -> Found:
    """The samples of a prompt: the best, or distinct draws by weight."""
    import torch

    from gencontrol.pipelines.search.tree_search import take
    from gencontrol.rng import stream_seed
    from gencontrol.sampling.particles import Particles

    facts, valid = kept.facts, torch.isfinite(kept.rewards)
    population = Particles(
        kept.samples, kept.rewards, valid, kept.log_weights, facts["nfe"], facts["reward_calls"], math.nan, facts["ess"]
    )
    how = "best" if sampler(config.sampler).readout == "best" else "distinct"
    x, rewards = take(population, config.count, how, stream_seed(config.seed, "search/readout", prompt))
    scored = kept.rewards[valid].tolist()
    stats = {"rollouts": len(kept.rewards), "leaves": len(scored), "excluded": facts["excluded"]}
    stats |= {"log_z": facts["log_z"], "ess": facts["ess"], "best": max(scored, default=None)}
    summary = {
        "stats": stats,
        "warnings": [],
        "reward_calls": facts["reward_calls"],
        "base_rewards": [] if kept.base_reward is None else [kept.base_reward],
        "grown_rewards": scored,
    }
    return Found(prompt, x, rewards.tolist(), kept.base, kept.base_reward, facts["nfe"], summary)
