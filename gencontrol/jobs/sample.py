"""`sample`: sounds and pictures from prompts, with a table of what was drawn and how it was scored."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gencontrol.config import Count, Natural, build, dump_toml, options
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
from gencontrol.jobs.setup.models import adopt, load_pipeline, medium_of, medium_of_class
from gencontrol.jobs.setup.prompts import read_prompts
from gencontrol.jobs.setup.settings import Start, called, check_output, describe, place

_CHUNK = 16  # samples in one pass of the network


@options
class SampleConfig:
    """The [run] section: what is drawn, from which model, and how it is scored.

    Args:
        model: "bundled" (sound), "bundled-image", a folder or a hub id.
        prompt: a prompt as text; several are drawn one after the other.
        prompts: file of further prompts (txt, jsonl, csv).
        num: samples of each prompt.
        steps: sampler steps; the model's own choice if not given.
        guidance_scale: classifier-free guidance; the model's own choice if not given.
        negative_prompt: what to steer away from.
        seed: of the first sample; the others follow.
        lora: folder or file of LoRA weights to load on top.
        y: labels of a trained control as [ATTRIBUTE=]LABEL, one for each attribute.
        y_scale: strength of the control (default: 1, as trained).
        control: folder of the control; the model's if not given.
        reward: clap, clip:0.3, package.module:Name, http://…; several are summed with their weights.
        reward_model: folder or hub id of the reward's network; the bundled one if not given.
        reference: folder of sound, or a text file of captions, for rewards that compare with a reference law.
        output: folder of the wav and png files and samples.json.
        online: allow downloads from the hub.
        device: where it runs.
        threads: CPU threads; 0 leaves it to the library.
    """

    model: str = "bundled"
    prompt: tuple[str, ...] = ()
    prompts: str | None = None
    num: Count = 4
    steps: Count | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    seed: int = 0
    lora: str | None = None
    y: tuple[str, ...] = ()
    y_scale: float | None = None
    control: str | None = None
    reward: tuple[str, ...] = ()
    reward_model: str | None = None
    reference: str | None = None
    output: str = "samples"
    online: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Natural = 0

    def __post_init__(self) -> None:
        for needs, names in {"reward": ("reward_model", "reference"), "y": ("y_scale", "control")}.items():
            for name in names:
                if getattr(self, name) is not None and not getattr(self, needs):
                    raise ValueError(
                        f"--{name.replace('_', '-')} without --{needs} has no effect; give --{needs} or leave it out"
                    )


@dataclass(frozen=True)
class SampleResult:
    """What was drawn.

    Args:
        samples: sounds [c n] or pictures [3 h w], on the CPU, prompt by prompt.
        items: a row for each: files, prompt, seed and, with an item reward, reward (None where it cannot score).
        set_reward: value of the whole set, for a set reward.
        folder: where the files are.
    """

    samples: Sequence[Any]
    items: Sequence[Mapping[str, Any]]
    set_reward: float | None
    folder: Path


def sample(
    prompt: str | Sequence[str],
    model: Any = "bundled",
    *,
    reward: Any = None,
    output: str | Path = "samples",
    **options: Any,
) -> SampleResult:
    """Draw samples, score them, and write the files that `gencontrol sample` writes.

    Args:
        prompt: one text or several.
        model: "bundled", "bundled-image", a folder, a hub id, or a loaded pipeline of diffusers or of ours.
        reward: a spec such as "clap:0.7", a Reward, a function of (samples, context), or a list of these; None: none.
        output: folder of the files and of samples.json.
        options: fields of SampleConfig, e.g. num=2, steps=20, seed=5.

    Raises:
        UsageError, EnvironmentMissing: what cannot work, and what to do.
    """
    rewards = [] if reward is None else list(reward) if isinstance(reward, (list, tuple)) else [reward]
    table = place(options, {"run": SampleConfig})
    table["run"] |= {"prompt": [prompt] if isinstance(prompt, str) else list(prompt), "model": called(model)}
    table["run"] |= {"reward": [called(one) for one in rewards], "output": str(output)}
    result = run(table, Start(), None if isinstance(model, (str, Path)) else adopt(model), rewards)
    assert result is not None  # None is a dry run's
    return result


def run(
    table: Mapping[str, Mapping[str, Any]], start: Start, pipeline: Any = None, rewards: Sequence[Any] = ()
) -> SampleResult | None:
    """Check the options (dry run: print them), draw, score, write wav, png and samples.json.

    Args:
        pipeline, rewards: objects that were handed over instead of names.
    """
    config = build(SampleConfig, table["run"], "run")
    prepare(threads=config.threads, online=config.online)
    prompts = [*config.prompt, *(read_prompts(config.prompts) if config.prompts else [])]
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UsageError("no prompt is given, or an empty one; use --prompt TEXT (repeatable) or --prompts FILE.")
    specs = [spec for spec in rewards or config.reward if isinstance(spec, str)]
    check_rewards(specs)
    if pipeline is None:
        check_model(config.model)
        check_medium(specs, config.model, medium_of(config.model, "auto"))
    else:
        check_medium(specs, config.model, medium_of_class(type(pipeline).__name__, "the pipeline"))
    if config.reward_model:
        check_source(config.reward_model, "--reward-model")
    if config.reference:
        check_reference(config.reference)
    folder = check_output(config.output)
    if start.dry_run:
        print(dump_toml(describe([("run", config)])), end="")
        return None
    device = choose_device(config.device)
    reward = None
    if config.reward:
        from gencontrol.rewards import load_rewards

        with download_hint(config.reward_model, online=config.online):
            reward = load_rewards(
                rewards or config.reward, reward_model=config.reward_model, reference=config.reference, device=device
            )
    from gencontrol.pipelines import TextToAudioPipeline

    if pipeline is None:
        pipeline = load_pipeline(config.model, device, online=config.online, lora=config.lora)
    elif config.lora is not None:
        raise UsageError("lora belongs to a model that is loaded by name; call load_lora_weights on your pipeline.")
    labels = _load_control(pipeline, config)
    rate = pipeline.sampling_rate if isinstance(pipeline, TextToAudioPipeline) else None
    texts = [prompt for prompt in prompts for _ in range(config.num)]
    seeds = [config.seed + index for index in range(len(texts))]
    samples = _draw(pipeline, texts, seeds, labels, config)
    scores, set_value = _score(reward, samples, texts, labels, rate)
    items = _write(folder, pipeline, samples, texts, seeds, scores, config.num)
    facts = {
        "model": config.model,
        "lora": config.lora,
        "steps": config.steps,
        "guidance_scale": config.guidance_scale,
        "negative_prompt": config.negative_prompt,
        **({} if labels is None else {"y": labels, "y_scale": _strength(config)}),
        **({} if rate is None else {"sampling_rate": rate}),
        "reward": list(config.reward),
        "set_reward": set_value,
        "samples": items,
    }
    (folder / "samples.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for row in items:
        score = "" if "reward" not in row else "  invalid" if row["reward"] is None else f"  {row['reward']:8.4f}"
        name = next((file for file in row["files"] if file.endswith(".wav")), row["files"][0])
        print(f"{folder / name}{score}  {row['prompt']}")
    if set_value is not None:
        print(f"reward of the whole set: {set_value:.4f}")
    return SampleResult(samples, items, set_value, folder)


def _load_control(pipeline: Any, config: SampleConfig) -> dict[str, str] | None:
    """Load the control that --y asks for; returns the labels, each under its attribute.

    Raises:
        UsageError: no control there, or an attribute or label that it does not have.
    """
    if not config.y:
        return None
    from gencontrol.pipelines.control import parse_labels

    given = parse_labels(config.y)
    pipeline.load_control(config.control or config.model)
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


def _strength(config: SampleConfig) -> float:
    return 1.0 if config.y_scale is None else config.y_scale


def _draw(
    pipeline: Any,
    texts: Sequence[str],
    seeds: Sequence[int],
    labels: Mapping[str, str] | None,
    config: SampleConfig,
) -> list[Any]:
    """Sounds or images as tensors on the CPU; sample i depends on its prompt and seed alone (up to rounding)."""
    sounds: list[Any] = []
    for start in range(0, len(texts), _CHUNK):
        part = slice(start, start + _CHUNK)
        output = pipeline(
            list(texts[part]),
            num_inference_steps=config.steps,
            guidance_scale=config.guidance_scale,
            negative_prompt=config.negative_prompt,
            seed=list(seeds[part]),
            output_type="pt",
            y=labels,
            y_scale=_strength(config),
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
