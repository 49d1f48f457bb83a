"""What a search leaves behind: samples as files, results.csv and results.json, and search.json for the report."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gencontrol.errors import RewardError
from gencontrol.files import FileLayer, disk_errors

if TYPE_CHECKING:
    from gencontrol.jobs.search.model import SearchModel
    from gencontrol.jobs.search.search import SearchJob

SUMMARY, SAMPLES = "search.json", "samples"
COLUMNS = ("prompt", "sampler", "rank", "reward", "nfe", "reward_calls", "seconds", "file")
_DECODE = 16  # samples in one pass of the decoder
_OURS = re.compile(r"\d{3}_(\d{2,}|base)\.(wav|png|txt)")


@dataclass(frozen=True)
class PromptResult:
    """What was found for one prompt.

    Args:
        samples: clean states [k *d], best first, or None.
        rewards: of the samples.
        base: the first sample of the model alone [1 *d], or None; `base_reward` is its reward.
        nfe: model calls for this prompt.
        seconds: of the whole search (prompts share their batches).
        summary: for the report; holds "reward_calls".
    """

    prompt: str
    samples: Any
    rewards: Sequence[float]
    base: Any
    base_reward: float | None
    nfe: int
    seconds: float
    summary: Mapping[str, Any]


def read_summary(path: Path) -> dict[str, Any]:
    """Return search.json of a run folder; empty where there is none or it is damaged."""
    try:
        found = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_results(
    job: SearchJob, model: SearchModel, results: Sequence[PromptResult], reasons: Mapping[str, int]
) -> None:
    """Write the samples of all prompts, the tables, and search.json last; prints the table.

    Raises:
        DiskError: the disk is full; what lay there before is intact.
        RewardError: no prompt has a sample.
    """
    if not any(result.rewards for result in results):
        why = "; ".join(f"{reason} ({count})" for reason, count in reasons.items())
        raise RewardError(f"no sample could be scored: {why or 'the reward returned no number'}.")
    path, files = job.folder.path, FileLayer()
    with disk_errors("the samples", path / SAMPLES):
        files.make_folder(path / SAMPLES)
        named = [_write_samples(files, path, model, index, result) for index, result in enumerate(results)]
        written = {Path(name).name for groups in named for group in groups for name in group}
        for old in (path / SAMPLES).iterdir():
            if _OURS.fullmatch(old.name) and old.name not in written:
                old.unlink()
    rows = [row for result, groups in zip(results, named, strict=True) for row in _rows(job, result, groups)]
    with disk_errors("the results", path):
        files.replace_file(path / "results.csv", _as_csv(rows))
        files.replace_file(path / "results.json", _as_json(rows))
        files.replace_file(path / SUMMARY, _as_json(_summary(job, model, results, named, reasons)))
    for row in rows:
        print(f"{path / row['file']}  {row['reward']:8.4f}  {row['prompt']}")


def _write_samples(
    files: FileLayer, path: Path, model: SearchModel, index: int, result: PromptResult
) -> list[list[str]]:
    """Write the files of a prompt; returns, for base and then each sample, their names relative to the run folder."""
    named: list[list[str]] = [[]]
    if result.base is not None:
        named[0] = _write_one(files, path, model.artefacts(f"{index:03d}_base", model.decode(result.base)[0]))
    for first in range(0, len(result.rewards), _DECODE):
        decoded = model.decode(result.samples[first : first + _DECODE])
        for rank, sample in enumerate(decoded, first + 1):
            named.append(_write_one(files, path, model.artefacts(f"{index:03d}_{rank:02d}", sample)))
    return named


def _write_one(files: FileLayer, path: Path, artefacts: Mapping[str, bytes]) -> list[str]:
    """Write the files of one sample, the one to listen to or look at first."""
    names = sorted(artefacts, key=lambda name: not name.endswith(".wav"))
    for name in names:
        files.replace_file(path / SAMPLES / name, artefacts[name])
    return [f"{SAMPLES}/{name}" for name in names]


def _rows(job: SearchJob, result: PromptResult, named: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Lines of the results of a prompt."""
    return [
        {
            "prompt": result.prompt,
            "sampler": job.search.sampler,
            "rank": rank,
            "reward": reward,
            "nfe": result.nfe,
            "reward_calls": result.summary["reward_calls"],
            "seconds": round(result.seconds, 2),
            "file": names[0],
        }
        for rank, (reward, names) in enumerate(zip(result.rewards, named[1:], strict=True), 1)
    ]


def _as_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _summary(
    job: SearchJob,
    model: SearchModel,
    results: Sequence[PromptResult],
    named: Sequence[Sequence[Sequence[str]]],
    reasons: Mapping[str, int],
) -> dict[str, Any]:
    """What the report shows, and what says that this search is finished."""
    prompts = [
        {
            "prompt": result.prompt,
            "nfe": result.nfe,
            **result.summary,
            "base": {"files": groups[0], "reward": result.base_reward} if groups[0] else None,
            "samples": [
                {"files": files, "reward": reward} for files, reward in zip(groups[1:], result.rewards, strict=True)
            ],
        }
        for result, groups in zip(results, named, strict=True)
    ]
    return {
        "finished": True,
        "sampler": job.search.sampler,
        "nfe": job.search.nfe,
        "count": job.search.count,
        "steps": model.problem.steps,
        "seconds": results[0].seconds,
        "excluded": dict(reasons),
        "prompts": prompts,
    }
