"""`gencontrol finetune`: from options to a trained model.

The loss is two calls away: `Trainer.fit` → `algorithm.loss`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gencontrol.config import build
from gencontrol.errors import UsageError
from gencontrol.files import digest
from gencontrol.jobs.setup.checks import check_names, download_hint, load_prompts
from gencontrol.jobs.setup.environment import choose_device, launched_precision, prepare, processes
from gencontrol.jobs.setup.models import load_pipeline
from gencontrol.jobs.setup.runs import RunFolder, fit, open_run
from gencontrol.jobs.setup.settings import RunConfig, describe, given_flags, merge, run_mode

ROUTES = {
    **{
        name: f"run.{name}"
        for name in (
            "model reward algorithm prompts eval_prompts reward_model reference output lora_rank lora_alpha "
            "lora_targets online task gradient_checkpointing"
        ).split()
    },
    **{
        name: f"train.{name}"
        for name in (
            "steps lr lr_schedule warmup max_grad_norm micro_batch precision seed device threads save_every keep "
            "eval_every track"
        ).split()
    },
    "batch": "algorithm.batch",
    "compile_": "train.compile",
    "shard": "train.shard",
    "eval_samples": "algorithm.eval_samples",
}

#: what algorithms call the number of prompts drawn in one step, which --batch sets
BATCH_FIELDS = ("pairs_per_round", "prompts_per_round")


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
    train: Any
    algorithm: Any
    kind: Any
    prompts: list[str]
    eval_prompts: list[str]
    folder: RunFolder


def command(parameters: Mapping[str, Any]) -> None:
    """Check all options; then print the plan (--dry-run) or train."""
    job = check(parameters)
    if parameters["dry_run"]:
        from gencontrol.jobs.setup.plan import print_plan

        print_plan(job)
        return
    train(job)


def check(parameters: Mapping[str, Any]) -> Job:
    """Merge and validate everything; loads no weights and writes nothing.

    Raises:
        UsageError, EnvironmentMissing, CheckpointError: what cannot work, and what to do.
    """
    from gencontrol.registry import ALGORITHMS, find
    from gencontrol.train.config import TrainConfig

    mode = run_mode(parameters)
    overrides = [*(parameters["overrides"] or []), *(parameters["set_"] or [])]
    table = merge(parameters["config"], given_flags(parameters, ROUTES), overrides)
    table["run"] = {**_run_defaults(table["run"]), **table["run"]}
    run = build(RunConfig, table["run"], "run")
    precision = launched_precision(table["train"].get("precision"))
    table["train"] |= {} if precision is None else {"precision": precision}
    trainer = build(TrainConfig, {**_train_defaults(table["train"], lora=run.lora_rank > 0), **table["train"]}, "train")
    prepare(threads=trainer.threads, online=run.online)
    kind = find(ALGORITHMS, run.algorithm, "algorithm")
    fields = {field.name for field in dataclasses.fields(kind.Config)}
    options = _name_batch(run.algorithm, table["algorithm"], fields)
    algorithm = build(kind.Config, options, "algorithm")
    check_names(run)
    prompts, eval_prompts = load_prompts(run)
    run = _with_fingerprint(run, prompts, eval_prompts)
    choose_device(trainer.device)
    sections = describe([("run", run), ("train", trainer), ("algorithm", algorithm)])
    folder = open_run(run.output, sections, mode=mode, allow=parameters["allow_change"] or ())
    return Job(run, trainer, algorithm, kind, prompts, eval_prompts, folder)


def _run_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """A reward that means something for what the model makes."""
    from gencontrol.jobs.setup.models import DEFAULT_REWARD, medium_of

    medium = medium_of(str(given.get("model", "bundled")), str(given.get("task", "auto")))
    return {} if medium is None else {"reward": [DEFAULT_REWARD[medium]]}


def _train_defaults(given: Mapping[str, Any], *, lora: bool) -> dict[str, Any]:
    """Twenty rounds; evaluate the base, the result, and four times on the way.

    The rates are those that worked on the bundled sound model: 4e-5 on all weights, 1e-3 on LoRA of rank 16.
    """
    steps = given.get("steps", 20)
    rate = 1e-3 if lora else 4e-5
    return {"steps": 20, "lr": rate, "eval_every": max(1, steps // 5)} if isinstance(steps, int) else {}


def _name_batch(algorithm: str, given: Mapping[str, Any], fields: set[str]) -> dict[str, Any]:
    """Give --batch the algorithm's own name for it."""
    options = dict(given)
    if "batch" in options and "batch" not in fields:
        own = next((name for name in BATCH_FIELDS if name in fields), None)
        if own is None:
            raise UsageError(f"--batch: algorithm '{algorithm}' sets its batch itself; leave the option out.")
        options[own] = options.pop("batch")
    return options


def _with_fingerprint(run: RunConfig, prompts: list[str], eval_prompts: list[str]) -> RunConfig:
    """Put a hash of the prompts into the configuration, so that an edited file does not pass as the same run."""
    mark = digest([prompts, eval_prompts], 12)
    if run.prompts_hash not in (None, mark):
        raise UsageError(
            "the prompts differ from those that this configuration was made with; remove run.prompts_hash from the "
            "config file to train on the new ones."
        )
    return dataclasses.replace(run, prompts_hash=mark)


def train(job: Job) -> None:
    """Load the model and the reward, make the algorithm, fit it; writes final/ with its card, and report.html."""
    from gencontrol.train.config import check_processes

    check_processes(job.train, processes())
    device = choose_device(job.train.device)
    pipeline = load_pipeline(job.run.model, device, online=job.run.online, task=job.run.task)
    if job.run.gradient_checkpointing:
        pipeline.enable_gradient_checkpointing()
    reward = load_reward(job.run, device)
    task = job.kind.prepare(pipeline.task(job.prompts, job.eval_prompts), reward, job.algorithm)
    roles = make_roles(job, task.denoiser.network)
    algorithm = job.kind(task, reward, job.algorithm, roles=roles, seed=job.train.seed)
    fit(job.folder, job.train, algorithm, {"kind": "finetune", "eval_prompts": job.eval_prompts})


def load_reward(run: RunConfig, device: str) -> Any:
    """Load the weighted sum of the rewards."""
    from gencontrol.rewards import load_rewards

    with download_hint(run.reward_model, online=run.online):
        return load_rewards(
            run.reward,
            reward_model=run.reward_model,
            reference=run.reference,
            encoder=run.encoder,
            device=device,
            weights=run.attribute_weights,
        )


def make_roles(job: Job, network: Any) -> Any:
    """Make the parameter sets that the algorithm needs: LoRA slots, or copies of all weights at rank 0."""
    from gencontrol.models.roles import LoraConfig, Roles

    lora = None
    if job.run.lora_rank:
        lora = LoraConfig(job.run.lora_rank, job.run.lora_alpha, job.run.lora_targets or None)
    whole = job.kind.whole_parameters(job.algorithm) if lora is not None else ()
    return Roles(network, job.kind.role_names(job.algorithm), lora, job.train.seed, whole)
