"""README.md of final/: the model card, made from what the run recorded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gencontrol.files import FileLayer
from gencontrol.reports.data import RunData, read_run

_METHODS = {
    "dragon": ("DRAGON, distributional rewards (Bai et al. 2025)", "https://arxiv.org/abs/2504.15217"),
    "crd": ("CRD, centred reward distillation", "https://arxiv.org/abs/2603.14128"),
    "ctrl": ("CTRL, a new condition by reward (Zhao et al. 2024)", "https://arxiv.org/abs/2406.12120"),
    "nft": ("DiffusionNFT (Zheng et al. 2025)", "https://arxiv.org/abs/2509.16117"),
    "awm": ("advantage-weighted matching (2025)", "https://arxiv.org/abs/2509.25050"),
    "flow-grpo": ("Flow-GRPO (Liu et al. 2025)", "https://arxiv.org/abs/2505.05470"),
    "ddpo": ("DDPO (Black et al. 2023)", "https://arxiv.org/abs/2305.13301"),
    "draft": ("DRaFT, direct reward fine-tuning (Clark et al. 2023)", "https://arxiv.org/abs/2309.17400"),
    "rwr": ("reward-weighted regression (Peters & Schaal 2007; Lee et al. 2023)", "https://arxiv.org/abs/2302.12192"),
}

#: pipelines whose samples are sounds
_SOUNDS = ("TextToAudioPipeline", "StableAudioPipeline", "AudioLDM2Pipeline")


def write_card(run_dir: str | Path) -> Path | None:
    """Write final/README.md of a run and return its path; None where there is no final/ yet.

    Raises:
        UsageError: the folder is not there or holds no run.
    """
    run = read_run(run_dir)
    if not run.final:
        return None
    path = run.path / "final" / "README.md"
    FileLayer().replace_file(path, render_card(run).encode())
    return path


def loading(run: RunData) -> tuple[str, str]:
    """Return lines of Python that load what the run made, and a shell command that uses it."""
    final = run.path / "final"
    if run.record.get("kind") == "policy":
        from gencontrol.reports.card_policy import loading as policy_loading

        return policy_loading(run)
    stage = run.config.get("run", {}).get("stage", "")
    if stage == "clap":
        return (
            f'from gencontrol.rewards import load_reward\n\nreward = load_reward("clap", reward_model="{final}")',
            f"gencontrol finetune --reward clap --reward-model {final}",
        )
    if stage == "attributes":
        return (
            "from gencontrol.models.readers.attributes import AttributeNet\n\n"
            f'judge = AttributeNet.from_pretrained("{final}")',
            "gencontrol doctor",
        )
    if stage == "digits":
        return (
            "from gencontrol.pipelines import ClassToImagePipeline\n\n"
            f'pipe = ClassToImagePipeline.from_pretrained("{final}")\nimage = pipe(3, seed=0).images[0]',
            "gencontrol doctor",
        )
    words = _words(run)
    lines = [
        f"from gencontrol.pipelines import {words.pipeline}\n",
        f'pipe = {words.pipeline}.from_pretrained("{final}")',
        f'{words.item} = pipe("{words.example}", seed=0)[0][0]',
    ]
    if (final / "lora").is_dir():
        lines += [
            "\n# or only the adapter, on top of the base model",
            f'pipe = {words.pipeline}.from_pretrained("{run.config.get("run", {}).get("model", "bundled")}")',
            f'pipe.load_lora_weights("{final / "lora"}")',
        ]
    if (final / "control").is_dir():
        lines += ["\n# the weights are the base's; what was learned is the control", f'pipe.load_control("{final}")']
        lines += ["print(pipe.control_labels)  # pipe(prompt, y={attribute: label}, y_scale=1.0)"]
    return "\n".join(lines), f'gencontrol sample --model {final} --prompt "{words.example}" --output samples'


@dataclass(frozen=True)
class _Words:
    """How a card speaks of what the model makes."""

    item: str
    task: str
    pipeline: str
    example: str
    grammar: str


_SOUND = _Words("sound", "text-to-audio", "TextToAudioPipeline", "a slow sad piano melody", "sound")
_IMAGE = _Words("image", "text-to-image", "TextToImagePipeline", "a red circle left of a blue square", "scene")


def _words(run: RunData) -> _Words:
    """By the class that final/ names; a sound where there is none yet."""
    try:
        index = json.loads((run.path / "final" / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return _SOUND
    return _SOUND if index.get("_class_name") in _SOUNDS else _IMAGE


def _loading(run: RunData) -> str:
    python, shell = loading(run)
    return f"```python\n{python}\n```\n\n```sh\n{shell}\n```\n"


def render_card(run: RunData) -> str:
    """Return the card as Markdown with the hub's metadata."""
    settings = run.config.get("run", {})
    if run.record.get("kind") == "policy":
        from gencontrol.reports.card_policy import render

        return render(run, _parameters(run), _provenance(run))
    if "reward" not in settings:
        return _pretrain_card(run)
    method, link = _METHODS.get(str(settings.get("algorithm")), (str(settings.get("algorithm")), ""))
    base = str(settings.get("model", "bundled"))
    words = _words(run)
    metadata = ["---", "library_name: gencontrol", f"pipeline_tag: {words.task}", "tags:", "- gencontrol"]
    metadata += [f"- {settings.get('algorithm')}", "- reward-fine-tuning"]
    if "/" in base and not Path(base).exists():
        metadata += [f"base_model: {base}"]
    return "\n".join(
        [
            *metadata,
            "---\n",
            f"# {run.path.resolve().name}\n",
            f"A {words.task} model, fine-tuned from {_base(base)} with gencontrol.\n",
            "## Method\n",
            f"{method}{f', <{link}>' if link else ''}. {_adapter(settings)}\n",
            "## Reward\n",
            *_rewards(settings),
            "## Results\n",
            *_results(run),
            "## Data\n",
            f"{_data(settings, words)}\n",
            "## Hyper-parameters\n",
            *_parameters(run),
            "## Limits\n",
            "The model was moved towards a reward, which is a stand-in for what people want: pushed far enough, a "
            f"reward rises while the {words.item} gets worse (reward over-optimisation), and variety can shrink. "
            "The numbers above are of one run and one seed, on the reward that was trained on. Licence and biases of "
            "the base model, of its data and of the reward's network carry over.\n",
            "## How to load\n",
            _loading(run),
            *_provenance(run),
        ]
    )


def _base(base: str) -> str:
    if base.startswith("bundled"):
        return "the model bundled with gencontrol (Apache-2.0)"
    return f"`{base}` (its licence applies)"


def _adapter(settings: dict[str, Any] | Any) -> str:
    rank = settings.get("lora_rank", 0)
    if settings.get("algorithm") == "ctrl" or (settings.get("algorithm") == "cfg-finetune" and rank):
        beside = f", and a LoRA adapter of rank {rank} beside it" if rank else ""
        return f"A new condition was trained{beside}: it lies in control/, and final/ itself is the untouched base."
    if not rank:
        return "All weights of the denoiser were trained."
    return f"A LoRA adapter of rank {rank} was trained; final/ holds it merged, and alone in lora/."


def _rewards(settings: Any) -> list[str]:
    rows = ["| reward | weight | definition |", "|---|---|---|"]
    for spec in settings.get("reward", []):
        name, weight = _weight(str(spec))
        rows.append(f"| {name} | {weight:g} | {_title(name)} |")
    extra = [
        f"{key.replace('_', ' ')}: `{settings[key]}`"
        for key in ("reward_model", "reference", "encoder")
        if settings.get(key)
    ]
    return [*rows, "", *([", ".join(extra) + "\n"] if extra else [])]


def _title(name: str) -> str:
    """What a reward measures; user code is not imported for it."""
    from gencontrol.registry import REWARDS, find

    return str(find(REWARDS, name, "reward").title) if name in REWARDS else "user code"


def _weight(spec: str) -> tuple[str, float]:
    name, _, last = spec.rpartition(":")
    try:
        return (name, float(last)) if name else (spec, 1.0)
    except ValueError:
        return spec, 1.0


def _results(run: RunData) -> list[str]:
    gain, wins = run.last("eval/reward/gain"), run.last("eval/win_rate")
    if gain is None:
        return ["No evaluation was run.\n"]
    rows = ["| evaluation prompts, same noise | value | 95 % interval |", "|---|---|---|"]
    rows.append(f"| reward of the base | {_n(run.last('eval/reward/base_mean'))} | |")
    rows.append(f"| reward of this model | {_n(run.last('eval/reward/mean'))} | |")
    rows.append(f"| paired gain | {_n(gain)} | {_range(run, 'eval/reward/gain')} |")
    if wins is not None:
        rows.append(f"| win rate | {_n(wins)} | {_range(run, 'eval/win_rate')} |")
    return [
        *rows,
        "",
        f"{run.last('eval/items') or 0:.0f} samples, step {run.step}. Curves and samples: report.html of the run.\n",
    ]


def _n(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _range(run: RunData, name: str) -> str:
    low, high = run.last(f"{name}_low"), run.last(f"{name}_high")
    return "" if low is None or high is None else f"{low:.4g} to {high:.4g}"


def _data(settings: Any, words: _Words) -> str:
    prompts = settings.get("prompts")
    if prompts:
        return f"Prompts of `{prompts}`; the {words.item}s to learn from were drawn from the model itself."
    return (
        f"{settings.get('prompt_count', 0)} prompts of the bundled {words.grammar} grammar; evaluation prompts "
        f"describe {words.item}s that training never had. The {words.item}s to learn from were drawn from the model "
        "itself."
    )


def _parameters(run: RunData) -> list[str]:
    rows = ["| option | value |", "|---|---|"]
    for section in ("train", "algorithm", "model", "process", "policy"):
        rows += [f"| {section}.{key} | {value} |" for key, value in run.config.get(section, {}).items()]
    return [*rows, ""]


def _provenance(run: RunData) -> list[str]:
    starts = [start for start in run.record.get("starts", []) if isinstance(start, dict)]
    if not starts:
        return []
    newest = starts[-1]
    versions = ", ".join(f"{name} {value}" for name, value in newest.get("versions", {}).items())
    return [
        "## Made with\n",
        f"```sh\n{newest.get('command', '')}\n```\n",
        f"{versions}; {newest.get('device', '')}.\n",
    ]


def _pretrain_card(run: RunData) -> str:
    stage = run.config.get("run", {}).get("stage", "model")
    losses = run.series("loss/total")[1]
    data = "scikit-learn's 8x8 digits" if stage == "digits" else "rendered sound"
    measured = [f"| {name} | {_n(run.last(name))} |" for name in run.names() if name.startswith("eval/")]
    return "\n".join(
        [
            "---\nlibrary_name: gencontrol\nlicense: apache-2.0\ntags:\n- gencontrol\n---\n",
            f"# {run.path.resolve().name}\n",
            f"Result of `gencontrol pretrain {stage}`, trained from nothing on {data}; {run.step} steps.\n",
            "## Measured\n",
            "| metric | value |",
            "|---|---|",
            f"| training loss, last step | {_n(losses[-1] if losses else None)} |",
            *measured,
            "",
            "## Hyper-parameters\n",
            *_parameters(run),
            "## How to load\n",
            _loading(run),
            *_provenance(run),
        ]
    )
