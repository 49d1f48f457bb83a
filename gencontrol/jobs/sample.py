"""`gencontrol sample`: sounds and pictures from prompts, with a table of what was drawn and how it was scored."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gencontrol.errors import UsageError, nearest
from gencontrol.jobs.setup.checks import (
    check_medium,
    check_model,
    check_reference,
    check_rewards,
    check_source,
    download_hint,
)
from gencontrol.jobs.setup.environment import choose_device, prepare
from gencontrol.jobs.setup.models import load_pipeline
from gencontrol.jobs.setup.prompts import read_prompts
from gencontrol.jobs.setup.settings import check_output

_CHUNK = 16  # samples in one pass of the network


def command(parameters: Mapping[str, Any]) -> None:
    """Check the options, draw, score, write wav, png and samples.json."""
    prepare(threads=parameters["threads"] or 0, online=bool(parameters["online"]))
    prompts = _prompts(parameters)
    model = parameters["model"] or "bundled"
    _check(parameters, model)
    folder = check_output(parameters["output"])
    device = choose_device(parameters["device"] or "auto")
    reward = _reward(parameters, device)
    from gencontrol.pipelines import TextToAudioPipeline

    pipeline = load_pipeline(model, device, online=bool(parameters["online"]), lora=parameters["lora"])
    labels = _load_control(pipeline, parameters, model)
    rate = pipeline.sampling_rate if isinstance(pipeline, TextToAudioPipeline) else None
    texts = [prompt for prompt in prompts for _ in range(parameters["num"])]
    seeds = [parameters["seed"] + index for index in range(len(texts))]
    sounds = _draw(pipeline, texts, seeds, labels, parameters)
    scores, set_value = _score(reward, sounds, texts, labels, rate)
    items = _write(folder, pipeline, sounds, texts, seeds, scores, parameters["num"])
    table = {
        "model": model,
        "lora": parameters["lora"],
        "steps": parameters["steps"],
        "guidance_scale": parameters["guidance_scale"],
        "negative_prompt": parameters["negative_prompt"],
        **({} if labels is None else {"y": labels, "y_scale": _strength(parameters)}),
        **({} if rate is None else {"sampling_rate": rate}),
        "reward": list(parameters["reward"] or []),
        "set_reward": set_value,
        "samples": items,
    }
    (folder / "samples.json").write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _print(items, set_value, folder)


def _prompts(parameters: Mapping[str, Any]) -> list[str]:
    prompts = list(parameters["prompt"] or [])
    if parameters["prompts"]:
        prompts += read_prompts(parameters["prompts"])
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UsageError("no prompt is given, or an empty one; use --prompt TEXT (repeatable) or --prompts FILE.")
    return prompts


def _check(parameters: Mapping[str, Any], model: str) -> None:
    check_model(model)
    if parameters["reward"]:
        check_rewards(parameters["reward"])
        check_medium(parameters["reward"], model, "auto")
    for option in ("reward_model", "reference"):
        if parameters[option] and not parameters["reward"]:
            raise UsageError(
                f"--{option.replace('_', '-')} without --reward has no effect; name a reward or leave it out."
            )
    for option in ("y_scale", "control"):
        if parameters[option] is not None and not parameters["y"]:
            raise UsageError(f"--{option.replace('_', '-')} without --y has no effect; give labels or leave it out.")
    if parameters["reward_model"]:
        check_source(parameters["reward_model"], "--reward-model")
    if parameters["reference"]:
        check_reference(parameters["reference"])
    if parameters["steps"] is not None and parameters["steps"] < 1:
        raise UsageError(f"--steps {parameters['steps']}: at least 1 sampler step is needed.")


def _load_control(pipeline: Any, parameters: Mapping[str, Any], model: str) -> dict[str, str] | None:
    """Load the control that --y asks for; returns the labels, each under its attribute.

    Raises:
        UsageError: no control there, or an attribute or label that it does not have.
    """
    if not parameters["y"]:
        return None
    from gencontrol.pipelines.control import parse_labels

    given = parse_labels(parameters["y"])
    pipeline.load_control(parameters["control"] or model)
    attributes = pipeline.control_labels
    if not attributes:
        raise UsageError("this control takes numbers, not labels; use it from Python: pipeline(prompt, y=[…]).")
    if isinstance(given, str):
        if len(attributes) != 1:
            raise UsageError(
                f"--y {given}: this control has the attributes {', '.join(attributes)}; write one of them."
            )
        given = {next(iter(attributes)): given}
    for attribute, label in given.items():
        if attribute not in attributes:
            raise UsageError(
                f"--y {attribute}={label}: no attribute '{attribute}'.{nearest(attribute, attributes)} "
                f"Attributes: {', '.join(attributes)}."
            )
        if label not in attributes[attribute]:
            known = attributes[attribute]
            raise UsageError(
                f"--y {attribute}={label}: '{attribute}' has no label '{label}'.{nearest(label, known)} "
                f"Labels: {', '.join(known)}."
            )
    return given


def _strength(parameters: Mapping[str, Any]) -> float:
    return 1.0 if parameters["y_scale"] is None else float(parameters["y_scale"])


def _reward(parameters: Mapping[str, Any], device: str) -> Any | None:
    if not parameters["reward"]:
        return None
    from gencontrol.rewards import load_rewards

    with download_hint(parameters["reward_model"], online=bool(parameters["online"])):
        return load_rewards(
            list(parameters["reward"]),
            reward_model=parameters["reward_model"],
            reference=parameters["reference"],
            device=device,
        )


def _draw(
    pipeline: Any,
    texts: Sequence[str],
    seeds: Sequence[int],
    labels: Mapping[str, str] | None,
    parameters: Mapping[str, Any],
) -> list[Any]:
    """Sounds or images as tensors on the CPU; sample i depends on its prompt and seed alone (up to rounding)."""
    sounds: list[Any] = []
    for start in range(0, len(texts), _CHUNK):
        part = slice(start, start + _CHUNK)
        output = pipeline(
            list(texts[part]),
            num_inference_steps=parameters["steps"],
            guidance_scale=parameters["guidance_scale"],
            negative_prompt=parameters["negative_prompt"],
            seed=list(seeds[part]),
            output_type="pt",
            y=labels,
            y_scale=_strength(parameters),
        )
        sounds += list(output[0].cpu())
    return sounds


def _score(
    reward: Any | None,
    sounds: Sequence[Any],
    texts: Sequence[str],
    labels: Mapping[str, str] | None,
    rate: int | None,
) -> tuple[list[float | None] | None, float | None]:
    """Per-sound values (None for an invalid sound), and the value of the whole set for a set reward."""
    if reward is None:
        return None, None
    import torch

    from gencontrol.types import RewardContext

    asked = {attribute: [label] * len(texts) for attribute, label in (labels or {}).items()}
    out = reward(torch.stack(list(sounds)), RewardContext(prompts=list(texts), sampling_rate=rate, metadata=asked))
    if reward.kind == "set":
        value = float(out.extras["set_value"])
        return None, value if math.isfinite(value) else None
    return [float(v) if ok else None for v, ok in zip(out.values, out.valid, strict=True)], None


def _write(
    folder: Path,
    pipeline: Any,
    sounds: Sequence[Any],
    texts: Sequence[str],
    seeds: Sequence[int],
    scores: Sequence[float | None] | None,
    num: int,
) -> list[dict[str, Any]]:
    """Write the files of every sound; returns the rows of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for index, (sound, text, seed) in enumerate(zip(sounds, texts, seeds, strict=True)):
        files = pipeline.artefacts(f"{index // num:03d}_{index % num:02d}", sound)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        row: dict[str, Any] = {"files": sorted(files), "prompt": text, "seed": seed}
        if scores is not None:
            row["reward"] = scores[index]
        items.append(row)
    return items


def _print(items: Sequence[Mapping[str, Any]], set_value: float | None, folder: Path) -> None:
    for row in items:
        score = "" if "reward" not in row else "  invalid" if row["reward"] is None else f"  {row['reward']:8.4f}"
        name = next((file for file in row["files"] if file.endswith(".wav")), row["files"][0])
        print(f"{folder / name}{score}  {row['prompt']}")
    if set_value is not None:
        print(f"reward of the whole set: {set_value:.4f}")
