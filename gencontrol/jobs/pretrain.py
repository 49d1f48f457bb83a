"""`gencontrol pretrain`: the stages that make what is bundled, from sound-data to scenes, and classifiers of labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gencontrol.config import build, dump_toml, options
from gencontrol.errors import UsageError, nearest
from gencontrol.jobs.setup.environment import choose_device, prepare
from gencontrol.jobs.setup.runs import RunFolder, fit, open_run
from gencontrol.jobs.setup.settings import describe, given_flags, merge, run_mode
from gencontrol.recipes.digits.plan import DigitsRun
from gencontrol.recipes.digits.plan import train_defaults as digits_defaults
from gencontrol.recipes.scenes.plan import CaptionedRun, ScenesRun, readers_defaults
from gencontrol.recipes.scenes.plan import train_defaults as scenes_defaults

STAGES = ("sound-data", "clap", "attributes", "flow", "digits", "scenes", "scene-readers", "classifier")
SECTIONS = ("run", "train", "algorithm", "model", "process")

ROUTES = {
    "data": "run.data",
    "output": "run.output",
    "batch": "algorithm.batch",
    **{
        name: f"train.{name}"
        for name in (
            "steps lr lr_schedule warmup max_grad_norm micro_batch precision seed device threads save_every keep "
            "eval_every track"
        ).split()
    },
}


@dataclass(frozen=True)
class PretrainRun:
    """The [run] section of a pretraining on sound.

    Args:
        stage: clap, attributes or flow.
        data: folder of `gencontrol pretrain sound-data`.
        output: the run folder.
        clap: "bundled" or a CLAP folder, whose text encoder conditions the flow model.
        codec: "bundled" or a folder of a MelCodec.
        cache: folder of the cached latents; empty means `latents` inside the data folder.
    """

    stage: str
    data: str = "data/sound"
    output: str = ""
    clap: str = "bundled"
    codec: str = "bundled"
    cache: str = ""


@options
class SoundDataConfig:
    """The [run] section of sound-data: the folder (`data`, or `output`), clips per split, worker processes."""

    data: str = "data/sound"
    output: str = ""
    train: int = 12000
    val: int = 500
    test: int = 1000
    workers: int = 2

    def __post_init__(self) -> None:
        if min(self.train, self.val, self.test, self.workers) < 1:
            raise ValueError("train, val, test and workers must be at least 1")


def command(parameters: Mapping[str, Any]) -> None:
    """Run one stage with the options as typer parsed them."""
    stage = parameters["what"]
    if stage not in STAGES:
        raise UsageError(f"pretrain has no stage '{stage}'.{nearest(stage, STAGES)} Stages: {', '.join(STAGES)}.")
    overrides = [*(parameters["overrides"] or []), *(parameters["set_"] or [])]
    table = merge(parameters["config"], given_flags(parameters, ROUTES), overrides, SECTIONS)
    if stage == "sound-data":
        _sound_data(table, dry_run=bool(parameters["dry_run"]))
    elif stage == "classifier":
        from gencontrol.jobs.pretrain_classifier import command as fit_classifier

        fit_classifier(table, dry_run=bool(parameters["dry_run"]))
    else:
        _train(stage, table, parameters)


def _sound_data(table: Mapping[str, Mapping[str, Any]], *, dry_run: bool) -> None:
    seed = dict(table["train"]).pop("seed", 0)
    extra = [f"{section}.{key}" for section in table for key in table[section] if section != "run" and key != "seed"]
    if extra:
        raise UsageError(
            f"pretrain sound-data does not use {', '.join(extra)}; give run.train, run.val, run.test, --seed."
        )
    config = build(SoundDataConfig, table["run"], "run")
    folder = config.output or config.data
    if dry_run:
        print(dump_toml(describe([("run", config)])), end="")
        return
    from gencontrol.recipes.sound.data import build_sound_dataset

    path = build_sound_dataset(
        folder, train=config.train, val=config.val, test=config.test, seed=int(seed), workers=config.workers
    )
    print(path)


def _train(stage: str, table: dict[str, dict[str, Any]], parameters: Mapping[str, Any]) -> None:
    """Check everything, then make the algorithm and fit it."""
    from gencontrol.registry import PRETRAIN, find
    from gencontrol.train.config import TrainConfig

    table["run"]["stage"] = stage
    table["run"].setdefault("output", f"runs/{stage}")
    run: PretrainRun | DigitsRun | ScenesRun
    if stage == "digits":
        run, defaults = build(DigitsRun, table["run"], "run"), digits_defaults(table["train"])
    elif stage in ("scenes", "scene-readers", "classifier"):
        kind, settings = (CaptionedRun, scenes_defaults) if stage == "scenes" else (ScenesRun, readers_defaults)
        run, defaults = build(kind, table["run"], "run"), settings(table["train"])
    else:
        run, defaults = build(PretrainRun, table["run"], "run"), _train_defaults(table["train"])
    train = build(TrainConfig, {**defaults, **table["train"]}, "train")
    if train.shard:
        raise UsageError("train.shard is an option of gencontrol finetune; pretraining networks fit on one device.")
    prepare(threads=train.threads)
    algorithm = find(PRETRAIN, stage, "pretraining")
    options = build(algorithm.Config, table["algorithm"], "algorithm")
    sections: list[tuple[str, Any]] = [("run", run), ("train", train), ("algorithm", options)]
    architecture = _architecture(stage, table)
    if architecture is not None:
        sections += [("model", architecture[0]), ("process", architecture[1])]
    if isinstance(run, PretrainRun):
        _check_data(run.data)
    folder = open_run(run.output, describe(sections), mode=run_mode(parameters), allow=parameters["allow_change"] or ())
    if parameters["dry_run"]:
        print(dump_toml(folder.table), end="")
        return
    _fit(stage, algorithm, run, options, train, architecture, folder)


def _architecture(stage: str, table: Mapping[str, Mapping[str, Any]]) -> tuple[Any, Any] | None:
    """Sizes of the network and the process of a denoiser's stage; None for the others, which have neither."""
    if stage not in ("flow", "digits", "scenes"):
        if table["model"] or table["process"]:
            raise UsageError(
                f"pretrain {stage} has no sections [model] and [process]; only flow, digits and scenes have."
            )
        return None
    from gencontrol.recipes.digits import plan as pretrain_digits
    from gencontrol.recipes.scenes import plan as pretrain_scenes
    from gencontrol.recipes.sound import plan as pretrain_flow

    if stage == "flow":
        sizes: Any = build(pretrain_flow.FlowModel, table["model"], "model")
        return sizes, pretrain_flow.flow_process(table["process"])
    if stage == "scenes":
        sizes = build(pretrain_scenes.ScenesModel, table["model"], "model")
        return sizes, pretrain_flow.flow_process({**pretrain_scenes.PROCESS, **table["process"]})
    sizes = build(pretrain_digits.DigitsModel, table["model"], "model")
    return sizes, pretrain_flow.flow_process({**pretrain_digits.PROCESS, **table["process"]})


def _train_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    steps = given.get("steps", 1000)
    return {"eval_every": max(1, steps // 10)} if isinstance(steps, int) else {}


def _check_data(folder: str) -> None:
    if not (Path(folder) / "train.npy").exists():
        raise UsageError(f"no sound data in '{folder}'; make it: gencontrol pretrain sound-data --data {folder}")


def _fit(
    stage: str,
    algorithm: Any,
    run: PretrainRun | DigitsRun | ScenesRun,
    options: Any,
    train: Any,
    architecture: tuple[Any, Any] | None,
    folder: RunFolder,
) -> None:
    device = choose_device(train.device)
    if not isinstance(run, PretrainRun):
        from gencontrol.recipes.digits.plan import make_digits
        from gencontrol.recipes.scenes.plan import make_readers, make_scenes

        if architecture is None:
            made = make_readers(algorithm, options, seed=train.seed, device=device)
        else:
            make = partial(make_scenes, words=run.words) if isinstance(run, CaptionedRun) else make_digits
            made = make(algorithm, options, *architecture, seed=train.seed, device=device)
    elif architecture is not None:
        from gencontrol.recipes.sound.plan import make_flow

        made = make_flow(algorithm, run, options, architecture[0], architecture[1], seed=train.seed, device=device)
    else:
        codec = load_codec(run.codec) if options.codec_share > 0 else None
        made = algorithm(run.data, options, codec=codec, seed=train.seed, device=device)
    fit(folder, train, made, {"kind": "pretrain", "stage": stage})


def load_codec(name: str) -> Any:
    """Load the MelCodec of a folder, or the bundled one."""
    from gencontrol.models.networks.codec import MelCodec
    from gencontrol.weights import BUNDLED

    return MelCodec.from_pretrained(BUNDLED / "text_to_audio" / "codec" if name == "bundled" else name)
