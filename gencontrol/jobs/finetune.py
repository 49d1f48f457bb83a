"""`finetune`: from options, or from objects of yours, to a trained model.

The loss is two calls away: `Trainer.fit` → `algorithm.loss`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gencontrol.config import Count, Natural, Positive, build, dump_toml, options, to_table
from gencontrol.errors import UsageError
from gencontrol.files import digest
from gencontrol.jobs.setup.checks import (
    beside_the_run,
    check_medium,
    check_model,
    check_reference,
    check_rewards,
    check_source,
    download_hint,
)
from gencontrol.jobs.setup.environment import choose_device, launched_precision, prepare, processes
from gencontrol.jobs.setup.models import (
    DEFAULT_REWARD,
    Medium,
    adopt,
    count_parameters,
    folder_of,
    human_bytes,
    load_pipeline,
    medium_of,
    medium_of_class,
)
from gencontrol.jobs.setup.prompts import bundled_prompts, read_prompts
from gencontrol.jobs.setup.runs import RunFolder, open_run, running
from gencontrol.jobs.setup.settings import Start, called, describe, place
from gencontrol.train.config import TrainConfig


@options
class RunConfig:
    """The [run] section: what is trained, on what, towards what, and where.

    Args:
        model: "bundled" (sound), "bundled-image", a folder or a hub id.
        task: "audio" or "image"; "auto" takes what the model is ("bundled" with "image" is "bundled-image").
        reward: clap, clip:0.3, package.module:Name, http://…; several are summed with their weights (default: clap for
            sound, compositional for pictures).
        algorithm: the method, e.g. crd, dragon, flow-grpo, nft, rwr, or package.module:Class of your own.
        prompts: prompt file (txt, jsonl, csv); None takes prompts of the bundled grammar.
        eval_prompts: likewise; None takes bundled prompts that training never saw, or the first of `prompts`.
        prompt_count, eval_count: how many prompts of the bundled grammar, or of `prompts`, those are.
        reward_model: folder or hub id of the reward's network; None takes the bundled one.
        attribute_weights: attribute → weight of its classifier in the reward "classifier"; 1 where not named.
        reference: folder of sound, or a text file of captions, for set rewards that compare with a reference law.
        encoder: encoder of the set rewards; None takes theirs.
        output: the run folder.
        lora_rank: rank of the adapter; 0 trains all weights.
        lora_alpha: scale of the adapter; None means the rank.
        lora_targets: names of the linear layers; empty takes the library's choice.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        online: allow downloads from the hub.
        prompts_hash: written by a run, so that edited prompt files are noticed; not meant to be set.
    """

    model: str = "bundled"
    task: Literal["auto", "audio", "image"] = "auto"
    reward: tuple[str, ...] = ("clap",)
    algorithm: str = "dragon"
    prompts: str | None = None
    eval_prompts: str | None = None
    prompt_count: Count = 2000
    eval_count: Count = 16
    reward_model: str | None = None
    attribute_weights: dict[str, Positive] | None = None
    reference: str | None = None
    encoder: str | None = None
    output: str = "runs/finetune"
    lora_rank: Natural = 16
    lora_alpha: Positive | None = None
    lora_targets: tuple[str, ...] = ()
    gradient_checkpointing: bool = False
    online: bool = False
    prompts_hash: str | None = None

    def __post_init__(self) -> None:
        if not self.reward:
            raise ValueError("reward is empty; name at least one, e.g. reward = ['clap']")
        if not self.output:
            raise ValueError("output is empty; name the run folder")


@options
class TrainOptions(TrainConfig):
    """The [train] section: the training loop.

    The rates are those that worked on the bundled sound model.

    Args:
        lr: peak learning rate, > 0 (default: 1e-3 for LoRA, 4e-5 on all weights).
        eval_every: steps between evaluations; 0 = never, else also before the first and after the last step (default:
            a fifth of the steps).
    """

    steps: Count = 20
    lr: Positive = 1e-3
    eval_every: Natural = 4


@dataclass(frozen=True)
class Live:
    """What was handed over as an object instead of by name; None or empty where nothing was.

    Args:
        pipeline: one of ours.
        rewards: reward specs and objects, in the order of `run.reward`.
        prompts, eval_prompts: texts.
        algorithm: a class.
    """

    pipeline: Any = None
    rewards: Sequence[Any] = ()
    prompts: Sequence[str] | None = None
    eval_prompts: Sequence[str] | None = None
    algorithm: type | None = None


@dataclass(frozen=True)
class Job:
    """A checked fine-tuning, before anything is loaded.

    Args:
        run, train, algorithm: the three configurations.
        kind: the algorithm's class.
        prompts, eval_prompts: what it is trained and judged on.
        folder: the run folder.
    """

    run: RunConfig
    train: TrainConfig
    algorithm: Any
    kind: Any
    prompts: list[str]
    eval_prompts: list[str]
    folder: RunFolder


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning made.

    Args:
        folder: the run folder, with metrics.jsonl, samples/, final/ and report.html.
        metrics: the last line of metrics.jsonl.
        device: where `pipeline` is loaded to.
    """

    folder: Path
    metrics: Mapping[str, Any]
    device: str = field(default="cpu", repr=False)

    @property
    def pipeline(self) -> Any:
        """The tuned pipeline, loaded anew from final/ at each access."""
        return load_pipeline(str(self.folder / "final"), self.device, online=False)


def finetune(
    model: Any = "bundled",
    reward: Any = None,
    *,
    algorithm: str | type = "dragon",
    prompts: str | Path | Sequence[str] | None = None,
    eval_prompts: str | Path | Sequence[str] | None = None,
    output: str | Path = "runs/finetune",
    mode: Literal["auto", "resume", "fresh"] = "auto",
    allow_change: Sequence[str] = (),
    **options: Any,
) -> FinetuneResult:
    """Fine-tune a model towards a reward; the same call goes on where an earlier one was stopped.

    Args:
        model: "bundled", "bundled-image", a folder, a hub id, or a loaded pipeline of diffusers or of ours.  A loaded
            one stays as it is: a copy of its network is trained (name a folder to spare the memory).
        reward: a spec such as "clap:0.7", a Reward, a function of (samples, context) that returns one number per
            sample, or a list of these, summed; None takes the one for what the model makes.
        algorithm: name of a method, "package.module:Class", or a class.
        prompts: a file, or texts; None takes bundled ones.
        eval_prompts: likewise, for the evaluations.
        output: the run folder.
        mode: "auto" goes on in a used folder, "resume" insists on it, "fresh" refuses one.
        allow_change: options such as "train.lr" that may differ from those of the run folder.
        options: fields of RunConfig, of TrainOptions and of the algorithm's Config, e.g. steps=100, lora_rank=8;
            `section__name` where two of them have one name.

    Raises:
        UsageError, EnvironmentMissing, CheckpointError: what cannot work, and what to do; nothing is written.
        RewardError, NumericsError, Preempted: as `Trainer.fit`.
    """
    kind = algorithm_class(algorithm)
    rewards = [] if reward is None else list(reward) if isinstance(reward, (list, tuple)) else [reward]
    texts = {
        name: None if given is None or isinstance(given, (str, Path)) else list(given)
        for name, given in {"prompts": prompts, "eval_prompts": eval_prompts}.items()
    }
    live = Live(None if isinstance(model, (str, Path)) else adopt(model), rewards, algorithm=kind, **texts)
    named = {"model": model, "algorithm": algorithm, "prompts": prompts, "eval_prompts": eval_prompts}
    table = place(options, {"run": RunConfig, "train": TrainOptions, "algorithm": kind.Config})
    table["run"] |= {name: called(value) for name, value in named.items() if value is not None}
    table["run"] |= {"output": str(output)} | ({"reward": [called(one) for one in rewards]} if rewards else {})
    result = run(table, Start(mode=mode, allow=tuple(allow_change)), live)
    assert result is not None  # None is a dry run's
    return result


def variants(name: str | None) -> dict[str, type]:
    """Return the options of the algorithm of that name; None is the default's."""
    return {"algorithm": algorithm_class(name or RunConfig.algorithm).Config}


def algorithm_class(given: str | type) -> Any:
    """Return the class of an algorithm: of a registered name, of "package.module:Class", or the class itself.

    Raises:
        UsageError: an unknown name (nearest one named), or a class that is no algorithm (what it lacks is named).
    """
    from gencontrol.registry import ALGORITHMS, find, fitting

    if not isinstance(given, str):
        return fitting(given, called(given), "algorithm")
    if ":" in given:
        beside_the_run()
    return find(ALGORITHMS, given, "algorithm")


def check(table: dict[str, dict[str, Any]], start: Start, live: Live) -> Job:
    """Validate everything; loads no weights and writes nothing.

    Args:
        table: {section: {option: value}}, what was given.

    Raises:
        UsageError, EnvironmentMissing, CheckpointError: what cannot work, and what to do.
    """
    given = table["run"]
    if live.pipeline is not None:
        medium: Medium | None = medium_of_class(type(live.pipeline).__name__, "the pipeline")
    else:
        medium = medium_of(str(given.get("model", RunConfig.model)), str(given.get("task", RunConfig.task)))
    run = build(RunConfig, {**({} if medium is None else {"reward": [DEFAULT_REWARD[medium]]}), **given}, "run")
    precision = launched_precision(table["train"].get("precision"))
    table["train"] |= {} if precision is None else {"precision": precision}
    steps = table["train"].get("steps", TrainOptions.steps)
    defaults = {"lr": TrainOptions.lr if run.lora_rank else 4e-5}
    defaults |= {"eval_every": max(1, steps // 5)} if isinstance(steps, int) else {}
    train = build(TrainOptions, {**defaults, **table["train"]}, "train")
    prepare(threads=train.threads, online=run.online)
    kind: Any = live.algorithm or algorithm_class(run.algorithm)
    algorithm = build(kind.Config, table["algorithm"], "algorithm")
    specs = [spec for spec in live.rewards or run.reward if isinstance(spec, str)]
    check_rewards(specs)
    if live.pipeline is None:
        check_model(run.model)
    check_medium(specs, run.model, medium)
    if run.reference is not None:
        check_reference(run.reference)
    if run.reward_model is not None:
        check_source(run.reward_model, "--reward-model")
    prompts, eval_prompts = _prompts(run, medium, live)
    mark = digest([prompts, eval_prompts], 12)
    if run.prompts_hash not in (None, mark):
        raise UsageError(
            "the prompts differ from those that this configuration was made with; remove run.prompts_hash from the "
            "config file to train on the new ones."
        )
    run = dataclasses.replace(run, prompts_hash=mark)  # so that an edited file does not pass as the same run
    choose_device(train.device)
    sections = describe([("run", run), ("train", train), ("algorithm", algorithm)])
    folder = open_run(run.output, sections, mode=start.mode, allow=start.allow)
    return Job(run, train, algorithm, kind, prompts, eval_prompts, folder)


def _prompts(run: RunConfig, medium: str | None, live: Live) -> tuple[list[str], list[str]]:
    """Return training prompts and fixed evaluation prompts: those at hand, of the files, or of the bundled grammar.

    Raises:
        UsageError: a prompt file that cannot be used; see `read_prompts`.
    """
    if run.prompts is None and medium is None:
        raise UsageError(f"--model {run.model}: give --prompts FILE, or --task image or audio for the bundled prompts.")
    kind = medium or "audio"
    if live.prompts is not None:
        train = list(live.prompts)
    else:
        train = read_prompts(run.prompts) if run.prompts else bundled_prompts("train", run.prompt_count, kind)
    if live.eval_prompts is not None:
        return train, list(live.eval_prompts)
    if run.eval_prompts is not None:
        return train, read_prompts(run.eval_prompts)
    if run.prompts is None:
        return train, bundled_prompts("test", run.eval_count, kind)
    return train, list(dict.fromkeys(train))[: run.eval_count]


def run(table: dict[str, dict[str, Any]], start: Start, live: Live | None = None) -> FinetuneResult | None:
    """Check all options; print the plan (dry run: None), or load, train, and write final/, its card and report.html."""
    job = check(table, start, live := live or Live())
    if start.dry_run:
        print("\n".join(plan(job)), "\nconfiguration (save it as run.toml for --config)\n", sep="\n")
        print(dump_toml(job.folder.table), end="")
        return None
    from gencontrol.models.roles import LoraConfig, Roles
    from gencontrol.reports.data import about
    from gencontrol.rewards import load_rewards
    from gencontrol.train.config import check_processes

    options = job.run
    check_processes(job.train, processes())
    device = choose_device(job.train.device)
    if live.pipeline is None:
        pipeline = load_pipeline(options.model, device, online=options.online, task=options.task)
    else:  # the caller's network stays what it is, and the same call can begin from it again
        pipeline = type(live.pipeline).from_pipe(live.pipeline)
        pipeline.register_modules(**{pipeline.network_name: copy.deepcopy(pipeline.network)})
        pipeline.to(device)
    if options.gradient_checkpointing:
        pipeline.enable_gradient_checkpointing()
    with download_hint(options.reward_model, online=options.online):
        reward = load_rewards(
            live.rewards or options.reward,
            reward_model=options.reward_model,
            reference=options.reference,
            encoder=options.encoder,
            device=device,
            weights=options.attribute_weights,
        )
    task = job.kind.prepare(pipeline.task(job.prompts, job.eval_prompts), reward, job.algorithm)
    lora = (
        LoraConfig(options.lora_rank, options.lora_alpha, options.lora_targets or None) if options.lora_rank else None
    )
    whole = job.kind.whole_parameters(job.algorithm) if lora is not None else ()
    roles = Roles(task.denoiser.network, job.kind.role_names(job.algorithm), lora, job.train.seed, whole)
    algorithm = job.kind(task, reward, job.algorithm, roles=roles, seed=job.train.seed)
    known = {options.algorithm: job.kind} | {called(one): one for one in live.rewards if not isinstance(one, str)}
    facts: dict[str, Any] = {"kind": "finetune", "eval_prompts": job.eval_prompts}
    facts["about"] = about(options.algorithm, options.reward, known)
    with running(job.folder, job.train, facts) as trainer:
        summary = trainer.fit(algorithm)
    return FinetuneResult(job.folder.path, summary["metrics"], device)


# ---------------------------------------------------------------- what a run would do and need


def plan(job: Job) -> Iterator[str]:
    """Yield the lines of the plan: batch arithmetic and a memory estimate, from options and file headers alone."""
    run = job.run
    yield f"plan: {run.algorithm} towards {' + '.join(run.reward)} on {run.model} → {job.folder.path}"
    if any(job.folder.path.glob("checkpoints/step_*")):
        yield "  the run folder holds checkpoints: training goes on from the newest intact one"
    for note in job.folder.notes:
        yield f"  changed since the last start: {note}"
    yield f"  prompts        {len(job.prompts)} to train on, {len(job.eval_prompts)} to judge by"
    yield from _arithmetic(job)
    yield from _memory(job)


def _arithmetic(job: Job) -> Iterator[str]:
    options, train = to_table(job.algorithm), job.train
    groups = next((options[name] for name in ("prompts_per_round", "batch") if name in options), None)
    generations = options.get("generations", options.get("group", 1))
    if isinstance(groups, int) and isinstance(generations, int):
        samples = groups * generations
        yield f"  one step       {groups} prompts × {generations} samples = {samples} scored samples"
        updates = options.get("updates_per_round", 1)
        passes = -(-samples // train.micro_batch)
        yield f"                 {updates} optimizer updates, {passes} micro-batches of at most {train.micro_batch}"
        yield f"  whole run      {train.steps} steps = {train.steps * samples} samples, {train.steps * updates} updates"
    else:
        yield f"  whole run      {train.steps} steps, micro-batches of at most {train.micro_batch}"
    steps = [step for step in range(train.steps + 1) if train.eval_every and step % train.eval_every == 0]
    count = len(steps) + bool(train.eval_every and train.steps % train.eval_every)
    yield f"  evaluations    {count}, each {len(job.eval_prompts) * options.get('eval_samples', 1)} samples"
    yield f"  checkpoints    every {train.save_every} steps, {train.keep} kept"


def _memory(job: Job) -> Iterator[str]:
    """Weights in fp32, gradients, two Adam moments, and one copy per further role."""
    run = job.run
    folder = folder_of("bundled-image" if (run.model, run.task) == ("bundled", "image") else run.model)
    if folder is None:
        yield f"  memory         {run.model} is a hub id: sizes are known after the download"
        return
    sizes = count_parameters(folder, run.lora_rank, run.lora_targets)
    copies = len(job.kind.role_names(job.algorithm)) - 1 - (1 if run.lora_rank else 0)
    adapter = sizes.trainable if run.lora_rank else 0
    weights = 4 * (sizes.network + sizes.rest + adapter)
    training = 4 * sizes.trainable * (3 + copies)
    kind = f"LoRA rank {run.lora_rank}" if run.lora_rank else "all weights"
    yield f"  network        {_millions(sizes.network)}, trained {_millions(sizes.trainable)} ({kind})"
    yield f"  frozen parts   {_millions(sizes.rest)}"
    yield (
        f"  memory         {human_bytes(weights)} weights + {human_bytes(training)} gradients, optimizer and averages "
        f"= {human_bytes(weights + training)}"
    )
    yield "                 and activations, which grow with --micro-batch; the reward's network comes on top"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count < 1e9 else f"{count / 1e9:.2f} B"
