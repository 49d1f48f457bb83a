"""`gencontrol search`: the best samples for a reward that a budget of model calls finds, without training.

Trees (DTS, DTS*) are kept in tree.safetensors, so a search that was stopped or gets a larger budget goes on; particles
are drawn prompt by prompt and kept as they are finished.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

from gencontrol.config import build
from gencontrol.errors import UsageError
from gencontrol.files import FileLayer, digest, disk_errors
from gencontrol.jobs.search.model import Law, check_gradient, load_model, read_law
from gencontrol.jobs.search.settings import (
    FREE,
    FREE_OF_TREES,
    PARTICLES,
    TREES,
    SearchConfig,
    SourceConfig,
    all_prompts,
)
from gencontrol.jobs.setup.checks import check_model, check_reference, check_rewards, check_source, download_hint
from gencontrol.jobs.setup.environment import choose_device, prepare
from gencontrol.jobs.setup.prompts import read_prompts
from gencontrol.jobs.setup.runs import RunFolder, open_run, record
from gencontrol.jobs.setup.settings import Start, describe


@dataclass(frozen=True)
class SearchJob:
    """A checked search, before anything is loaded.

    Args:
        source, search: the two configurations.
        prompts: what is searched for, one tree each.
        folder: the run folder.
        law: what the model's small files say, or None.
    """

    source: SourceConfig
    search: SearchConfig
    prompts: list[str]
    folder: RunFolder
    law: Law | None


def command(table: dict[str, dict[str, Any]], start: Start) -> None:
    """Check all options; then print the plan (--dry-run), say that it is done, or search."""
    job = check(table, start)
    if start.dry_run:
        from gencontrol.jobs.search.plan import print_plan

        print_plan(job)
    elif done := finished(job):
        print(f"finished before: {done}", file=sys.stderr)
    else:
        search(job)


def check(table: dict[str, dict[str, Any]], start: Start) -> SearchJob:
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
    _check_names(source, config)
    prompts = all_prompts(source, read_prompts(source.prompts) if source.prompts else [])
    source = _with_fingerprint(source, prompts)
    choose_device(source.device)
    law = read_law(source.model, config)
    if law is not None:
        check_budget(config, law.steps)
    sections = describe([("run", source), ("search", config)])
    free = (*FREE, *(FREE_OF_TREES if config.sampler in TREES else ()), *start.allow)
    folder = open_run(source.output, sections, mode=start.mode, allow=free)
    return SearchJob(source, config, prompts, folder, law)


def _check_names(source: SourceConfig, config: SearchConfig) -> None:
    """Check model, rewards and references by name."""
    check_rewards(source.reward)
    _check_kinds(source, config)
    check_model(source.model)
    if source.reference is not None:
        check_reference(source.reference)
    if source.reward_model is not None:
        check_source(source.reward_model, "--reward-model")


def _check_kinds(source: SourceConfig, config: SearchConfig) -> None:
    """Refuse set rewards, and rewards without a gradient where one is needed; user code is looked at when loaded."""
    from gencontrol.registry import REWARDS, find
    from gencontrol.rewards.loading import parse_spec

    for spec in source.reward:
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
            f"reward '{name}' has no gradient, which {config.sampler} needs; choose a sampler without: "
            f"{', '.join([*TREES, 'smc', 'beam', 'snis', 'best-of-n'])}."
        )


def check_budget(config: SearchConfig, steps: int) -> None:
    """Raise UsageError where the budget does not pay for one sample."""
    if config.sampler == "beam":
        needed = 1 + config.children * (steps - 1)
    else:
        needed = steps
    if config.nfe < needed:
        raise UsageError(
            f"--nfe {config.nfe} is less than the {needed} model calls of one {config.sampler} sample "
            f"({steps} steps); give at least {needed}, or fewer --steps."
        )


def _with_fingerprint(source: SourceConfig, prompts: list[str]) -> SourceConfig:
    """Put a hash of the prompts into the configuration, so that an edited file does not pass as the same search."""
    mark = digest(prompts, 12)
    if source.prompts_hash not in (None, mark):
        raise UsageError(
            "the prompts differ from those that this configuration was made with; remove run.prompts_hash from the "
            "config file to search for the new ones."
        )
    return dataclasses.replace(source, prompts_hash=mark)


def finished(job: SearchJob) -> str:
    """Return a line about a search that needs nothing more, else "".

    A smaller budget than was spent is done, too; other budgets or counts go on from the tree.
    """
    from gencontrol.jobs.search.output import read_summary

    summary = read_summary(job.folder.path)
    if not summary.get("finished") or summary["nfe"] < job.search.nfe or summary["count"] != job.search.count:
        return ""
    hint = "a larger --nfe goes on" if job.search.sampler in TREES else "another --output starts anew"
    page = job.folder.path / "report.html"
    return f"{job.folder.path} holds {summary['nfe']} model calls per prompt; see {page} ({hint})."


def search(job: SearchJob) -> None:
    """Load model and reward, spend the budget, write samples, tables and report.html."""
    device = choose_device(job.source.device)
    model = load_model(job.source, job.search, job.prompts, device)
    check_budget(job.search, model.problem.steps)
    reward = _load_reward(job, device)
    if job.search.needs_gradient:
        check_gradient(model, reward, job.search.sampler)
    from gencontrol.train.run_folder import Lock

    with disk_errors("the run folder", job.folder.path):
        FileLayer().make_folder(job.folder.path)
    with Lock(job.folder.path):
        _begin(job)
        if job.search.sampler in PARTICLES:
            from gencontrol.jobs.search.particles import run
        else:
            from gencontrol.jobs.search.tree import run
        with model.at_work():
            run(job, model, reward)
    from gencontrol.reports.run import write_report

    print(f"table:  {job.folder.path / 'results.csv'}\nreport: {write_report(job.folder.path)}")


def _load_reward(job: SearchJob, device: str) -> Any:
    """Load the weighted sum of the rewards, and check that a search can use it."""
    from gencontrol.rewards import load_rewards

    source = job.source
    with download_hint(source.reward_model, online=source.online):
        reward = load_rewards(
            list(source.reward),
            reward_model=source.reward_model,
            reference=source.reference,
            encoder=source.encoder,
            device=device,
        )
    check_reward_kind(reward.name, reward.kind, job.search, differentiable=reward.differentiable)
    return reward


def _begin(job: SearchJob) -> None:
    """Record settings and start in the run folder."""
    from gencontrol.train.run_folder import check_settings

    for note in job.folder.notes:
        print(f"changed since the last start: {note}", file=sys.stderr)
    with disk_errors("the settings", job.folder.path):
        check_settings(job.folder.path, job.folder.table, job.folder.allow, FileLayer())
        record(job.folder, {"kind": "search", "prompts": job.prompts})
