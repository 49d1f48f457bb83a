"""README.md of final/: the model card, made from what the run recorded and what its classes say about themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gencontrol.reports.data import RunData, parse_weight, read_json, read_run
from gencontrol.reports.page import write

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

_TEMPLATES = Path(__file__).parent / "templates"


class _Words(NamedTuple):
    """How a card speaks of what the model makes."""

    item: str
    task: str
    pipeline: str
    example: str
    grammar: str


_SOUND = _Words("sound", "text-to-audio", "TextToAudioPipeline", "a slow sad piano melody", "sound")
_IMAGE = _Words("image", "text-to-image", "TextToImagePipeline", "a red circle left of a blue square", "scene")


def write_card(run_dir: str | Path) -> Path | None:
    """Write final/README.md of a run and return its path; None where there is no final/ yet.

    Raises:
        UsageError: the folder is not there or holds no run.
        DiskError: it cannot be written.
    """
    run = read_run(run_dir)
    return write(run.path / "final" / "README.md", str(make_card(run))) if run.final else None


def make_card(run: RunData) -> ModelCard:
    """Return the card with the hub's metadata."""
    from huggingface_hub import ModelCard, ModelCardData

    if run.record.get("kind") == "policy":
        data, values = _policy(run)
    elif "reward" in run.settings:
        data, values = _finetuned(run)
    else:
        data, values = _pretrained(run)
    algorithm = str(run.settings.get("algorithm") or run.settings.get("stage", ""))
    sections = ("train", "algorithm", "model", "process", "policy")
    python, shell = loading(run)
    newest = run.starts[-1] if run.starts else {}
    data["tags"] = ["gencontrol", *data.get("tags", ())]
    values = {
        "rewards": (),
        "measured": (),
        "remark": "",
        "data_text": "",
        "limits": "",
        "trained": "",
        **values,
        "name": run.name,
        "method": run.about("algorithm", algorithm),
        "parameters": [
            (f"{name}.{key}", _cell(value)) for name in sections for key, value in run.config.get(name, {}).items()
        ],
        "python": python,
        "shell": shell,
        "command": newest.get("command", ""),
        "versions": ", ".join(f"{name} {value}" for name, value in dict(newest.get("versions", {})).items()),
        "device": newest.get("device", ""),
    }
    return ModelCard.from_template(
        ModelCardData(library_name="gencontrol", **data), template_path=str(_TEMPLATES / "card.md.j2"), **values
    )


def _finetuned(run: RunData) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and texts of a model that was tuned towards rewards."""
    from huggingface_hub import EvalResult

    settings, words, base = run.settings, _words(run), str(run.settings.get("model", "bundled"))
    algorithm, rank = str(settings.get("algorithm", "")), settings.get("lora_rank", 0)
    bundled = base.startswith("bundled")
    gain, wins = run.last("eval/reward/gain"), run.last("eval/win_rate")
    data: dict[str, Any] = {"pipeline_tag": words.task, "tags": [algorithm, "reward-fine-tuning"]}
    data["license"] = "apache-2.0" if bundled else None  # of anything else only its author can speak
    data["base_model"] = base if "/" in base and not bundled and not Path(base).exists() else None
    if gain is not None:
        prompts = {"task_type": words.task, "dataset_type": "prompts", "dataset_name": "evaluation prompts"}
        shown = [("paired gain of the reward", gain), ("win rate against the base", wins)]
        results = [EvalResult(**prompts, metric_type=name, metric_value=v) for name, v in shown if v is not None]
        data |= {"model_name": run.name, "eval_results": results}
    if (run.path / "final" / "control").is_dir():
        beside = f", and a LoRA adapter of rank {rank} beside it" if rank else ""
        trained = f"A new condition was trained{beside}: it lies in control/, and final/ itself is the untouched base."
    elif rank:
        trained = f"A LoRA adapter of rank {rank} was trained; final/ holds it merged, and alone in lora/."
    else:
        trained = "All weights of the denoiser were trained."
    rows = [
        ("reward of the base", _n(run.last("eval/reward/base_mean")), ""),
        ("reward of this model", _n(run.last("eval/reward/mean")), ""),
        ("paired gain", _n(gain), _range(run, "eval/reward/gain")),
        ("win rate", _n(wins), _range(run, "eval/win_rate")),
    ]
    drawn = f"the {words.item}s to learn from were drawn from the model itself."
    if prompts_file := settings.get("prompts"):
        source = f"Prompts of `{prompts_file}`; {drawn}"
    else:
        source = (
            f"{settings.get('prompt_count', 0)} prompts of the bundled {words.grammar} grammar; evaluation prompts "
            f"describe {words.item}s that training never had. {drawn[0].upper()}{drawn[1:]}"
        )
    origin = "the model bundled with gencontrol (Apache-2.0)" if bundled else f"`{base}` (its licence applies)"
    used = [(key, settings[key]) for key in ("reward_model", "reference", "encoder") if settings.get(key)]
    return data, {
        "lead": f"A {words.task} model, fine-tuned from {origin} with gencontrol.",
        "trained": trained,
        "rewards": [_reward(run, spec) for spec in run.rewards],
        "reward_parts": ", ".join(f"{key.replace('_', ' ')}: `{value}`" for key, value in used),
        "heads": ("evaluation prompts, same noise", "value", "95 % interval"),
        "measured": [row for row in rows if row[1] != "–"] if gain is not None else (),
        "remark": f"{run.last('eval/items') or 0:.0f} samples, step {run.step}. Curves and samples: report.html of the "
        "run."
        if gain is not None
        else "No evaluation was run.",
        "data_text": source,
        "limits": "The model was moved towards a reward, which is a stand-in for what people want: pushed far enough, "
        f"a reward rises while the {words.item} gets worse (reward over-optimisation), and variety can shrink. The "
        "numbers above are of one run and one seed, on the reward that was trained on. Licence and biases of the base "
        "model, of its data and of the reward's network carry over.",
    }


def _pretrained(run: RunData) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and texts of a model that was trained from nothing on data of ours."""
    losses = run.series("loss/total")[1]
    rows = [("training loss, last step", _n(losses[-1] if losses else None))]
    stage = run.settings.get("stage", "model")
    return {"license": "apache-2.0"}, {
        "lead": f"Result of `gencontrol pretrain {stage}`, trained from nothing; {run.step} steps.",
        "heads": ("metric", "value"),
        "measured": [*rows, *_evaluated(run)],
    }


def _policy(run: RunData) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and texts of a policy that was trained on demonstrations."""
    episodes, windows = run.record.get("episodes", {}), run.record.get("windows", {})
    env = _env(run)
    return {"pipeline_tag": "robotics", "tags": ["robotics"]}, {
        "lead": f"A policy{f' for `{env}`' if env else ''}, trained on demonstrations with gencontrol; {run.step} "
        "steps.",
        "trained": "The weights are the moving average.",
        "heads": ("metric", "value"),
        "measured": _evaluated(run),
        "remark": "Losses on held-out episodes do not say whether the robot succeeds: evaluate it in its environment.",
        "data_text": f"`{run.settings.get('dataset')}`: {episodes.get('train', '?')} episodes "
        f"({windows.get('train', '?')} windows) to train on, {episodes.get('held_out', 0)} kept apart.",
        "limits": "The policy imitates these demonstrations; away from the states that they visited its actions mean "
        "little. The licence of the data set applies.",
    }


def write_measured(
    model: Path,
    sections: Mapping[str, Mapping[str, float]],
    *,
    title: str,
    text: str,
    origin: str,
    source: str,
    note: str,
    caption: str,
    picture: tuple[str, bytes],
) -> None:
    """Write the card of a bundled model, its picture, and measured.json beside its weights.

    Args:
        model: the folder.
        sections: heading → quantity → value.
        title, text: what it is and how it is loaded.
        origin: how it was made, see `origin_of_run`.
        source: of the data.
        note: where the numbers come from.
        caption: of the picture.
        picture: name and content of its file.
    """
    from huggingface_hub import ModelCard, ModelCardData

    card = ModelCard.from_template(
        ModelCardData(library_name="gencontrol", license="apache-2.0", tags=["gencontrol"]),
        template_path=str(_TEMPLATES / "measured.md.j2"),
        megabytes=sum(path.stat().st_size for path in model.rglob("*.safetensors")) / 1e6,
        title=title,
        text=text,
        origin=origin,
        source=source,
        note=note,
        caption=caption,
        sections=sections,
        picture=picture[0],
    )
    write(model / "README.md", str(card))
    write(model / "measured.json", json.dumps(sections, indent=1) + "\n")
    (model / picture[0]).write_bytes(picture[1])


def origin_of_run(path: Path, machine: str = "shared with other work") -> str:
    """Say by which commands, where and how long a run folder's model was trained, as the run recorded it."""
    run = read_run(path)
    first, versions = run.starts[0], run.starts[0]["versions"]
    lines = [f"    {first['command']}"]
    for before, after in pairwise(run.starts):
        if after["command"] != before["command"]:
            lines += ["", f"then, from step {after['step']}:", "", f"    {after['command']}"]
    shown = ", ".join(f"{name} {versions[name]}" for name in ("gencontrol", "torch", "transformers"))
    made = f"{run.step} steps in {run.last('time/wall'):.0f} s of wall time ({first['device']}, {machine}; {shown}; "
    return "\n".join([*lines, "", f"{made}commit {first['commit']})."])


def loading(run: RunData) -> tuple[str, str]:
    """Return lines of Python that load what the run made, and a shell command that uses it; final/ says what it is."""
    final = run.path / "final"
    if run.record.get("kind") == "policy":
        return (
            f'from gencontrol.pipelines import PolicyPipeline\n\npolicy = PolicyPipeline.from_pretrained("{final}")\n'
            "policy.reset()\n"
            "action = policy.select_action(observation)  # {key: array}, one observation or one per environment",
            f"gencontrol evaluate {final} --env {_env(run) or 'ENV_ID'} --episodes 100",
        )
    kind = _class_of(final)
    if kind == "ClapModel":
        return (
            f'from gencontrol.rewards import load_reward\n\nreward = load_reward("clap", reward_model="{final}")',
            f"gencontrol finetune --reward clap --reward-model {final}",
        )
    if kind == "AttributeNet":
        return (
            "from gencontrol.models.readers.attributes import AttributeNet\n\n"
            f'judge = AttributeNet.from_pretrained("{final}")',
            "gencontrol doctor",
        )
    if (final / "scene_reader").is_dir():
        return (
            "from gencontrol.recipes.scenes.networks import SceneJudge, SceneReader\n\n"
            f'reader = SceneReader.from_pretrained("{final / "scene_reader"}")\n'
            f'judge = SceneJudge.from_pretrained("{final / "scene_judge"}")',
            "gencontrol doctor",
        )
    if kind == "ClassToImagePipeline":
        return (
            f"from gencontrol.pipelines import {kind}\n\n"
            f'pipe = {kind}.from_pretrained("{final}")\nimage = pipe(3, seed=0).images[0]',
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
            f'pipe = {words.pipeline}.from_pretrained("{run.settings.get("model", "bundled")}")',
            f'pipe.load_lora_weights("{final / "lora"}")',
        ]
    if (final / "control").is_dir():
        lines += ["\n# the weights are the base's; what was learned is the control", f'pipe.load_control("{final}")']
        lines += ["print(pipe.control_labels)  # pipe(prompt, y={attribute: label}, y_scale=1.0)"]
    return "\n".join(lines), f'gencontrol sample --model {final} --prompt "{words.example}" --output samples'


def _class_of(final: Path) -> str:
    """Name of the class that a folder was saved by, or ""."""
    index = read_json(final / "model_index.json", {}) or read_json(final / "config.json", {})
    return str(index.get("_class_name") or next(iter(index.get("architectures") or ()), ""))


def _words(run: RunData) -> _Words:
    """By the class that final/ names (TextToAudioPipeline, StableAudioPipeline, …); a sound where there is none yet."""
    kind = _class_of(run.path / "final")
    return _SOUND if "audio" in kind.lower() or not kind else _IMAGE


def _env(run: RunData) -> str:
    """Id of the environment that the data set names, or ""."""
    env = run.record.get("env", {})
    return str(env.get("env_id") or env.get("env_name") or "") if isinstance(env, dict) else ""


def _reward(run: RunData, spec: str) -> tuple[str, str, str]:
    """Name, weight and definition of a reward."""
    name, weight = parse_weight(spec)
    about = run.about("reward", name)
    extra = "" if about.summary.rstrip(".") in ("", about.title) else f". {about.summary}"
    paper = f" ({about.paper})" if about.paper else ""
    return _cell(name), f"{weight:g}", "user code" if about.title == name else _cell(f"{about.title}{paper}{extra}")


def _evaluated(run: RunData) -> list[tuple[str, str]]:
    return [(name, _n(run.last(name))) for name in run.names() if name.startswith("eval/")]


def _cell(value: Any) -> str:
    """A value that cannot break out of its cell of a Markdown table."""
    return " ".join(str(value).replace("|", "\\|").split())


def _n(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _range(run: RunData, name: str) -> str:
    low, high = run.last(f"{name}_low"), run.last(f"{name}_high")
    return "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
