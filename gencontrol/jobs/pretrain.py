"""`pretrain`: the stages that make what is bundled, from sound-data to scenes, and classifiers of labels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gencontrol.config import Count, Natural, build, dump_toml, options
from gencontrol.errors import UsageError, nearest
from gencontrol.jobs.pretrain_classifier import ClassifierRun, fit_classifiers
from gencontrol.jobs.setup.environment import choose_device, prepare
from gencontrol.jobs.setup.runs import open_run, running
from gencontrol.jobs.setup.settings import Start, describe, place
from gencontrol.recipes.digits import plan as digits
from gencontrol.recipes.scenes import plan as scenes
from gencontrol.recipes.sound import plan as sound
from gencontrol.train.config import TrainConfig

#: stages with a training loop → [run], defaults of [train] from what is given there, [model], given part of [process]
_STAGES: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "clap": (sound.SoundRun, sound.train_defaults, None, {}),
    "attributes": (sound.SoundRun, sound.train_defaults, None, {}),
    "flow": (sound.SoundRun, sound.train_defaults, sound.FlowModel, {}),
    "digits": (digits.DigitsRun, digits.train_defaults, digits.DigitsModel, digits.PROCESS),
    "scenes": (scenes.CaptionedRun, scenes.train_defaults, scenes.ScenesModel, scenes.PROCESS),
    "scene-readers": (scenes.ScenesRun, scenes.readers_defaults, None, {}),
}
STAGES = ("sound-data", *_STAGES, "classifier")


@options
class SoundDataConfig:
    """The [run] section: clips of the sound data.

    Args:
        data: the folder, if `output` names none.
        output: the folder.
        train, val, test: clips of each split.
        seed: of everything drawn.
        workers: processes that draw.
    """

    data: str = "data/sound"
    output: str = ""
    train: Count = 12000
    val: Count = 500
    test: Count = 1000
    seed: Natural = 0
    workers: Count = 2


def variants(stage: str | None) -> dict[str, Any]:
    """Return the options of a stage, with the defaults that its run will have.

    Raises:
        UsageError: there is no such stage.
    """
    if stage is None:
        return {}
    if stage not in STAGES:
        raise UsageError(f"pretrain has no stage '{stage}'.{nearest(stage, STAGES)} Stages: {', '.join(STAGES)}.")
    if stage not in _STAGES:
        # the sections of the others exist, so that an option of theirs in a file is refused by its name
        others: dict[str, Any] = dict.fromkeys(("train", "algorithm", "model", "process"), ())
        return {"run": SoundDataConfig if stage == "sound-data" else ClassifierRun, **others}
    from gencontrol.registry import PRETRAIN, find

    run, defaults, model, process = _STAGES[stage]
    config = find(PRETRAIN, stage, "pretraining").Config
    train = build(TrainConfig, defaults({}), "train")
    spec = () if model is None else sound.flow_process(process)
    return {"run": run, "train": train, "algorithm": config, "model": model or (), "process": spec}


def pretrain(stage: str, *, mode: str = "auto", allow_change: tuple[str, ...] = (), **options: Any) -> Path:
    """Run one stage; returns its folder.

    Args:
        stage: one of STAGES.
        mode: "auto" goes on in a used folder, "resume" insists on it, "fresh" refuses one.
        allow_change: options such as "train.lr" that may differ from those of the run folder.
        options: fields of the stage's options (`gencontrol pretrain STAGE --help`); `section__name` where two of
            them have one name.

    Raises:
        UsageError: an option or the data do not fit; nothing is written.
    """
    sections = {section: kind for section, kind in variants(stage).items() if kind != ()}
    empty: dict[str, dict[str, Any]] = {section: {} for section in ("run", "train", "algorithm", "model", "process")}
    folder = run(empty | place(options, sections), Start(mode=mode, allow=allow_change, what=stage))
    assert folder is not None  # None is a dry run's
    return folder


def run(table: Mapping[str, Mapping[str, Any]], start: Start) -> Path | None:
    """Check everything (dry run: print it), then make what the stage makes; returns its folder."""
    stage = start.what
    if stage not in _STAGES:
        if extra := [f"{section}.{key}" for section in table for key in table[section] if section != "run"]:
            raise UsageError(f"pretrain {stage} does not use {', '.join(extra)}; leave it out.")
        if stage == "classifier":
            return fit_classifiers(build(ClassifierRun, table["run"], "run"), dry_run=start.dry_run)
        config = build(SoundDataConfig, table["run"], "run")
        if start.dry_run:
            print(dump_toml(describe([("run", config)])), end="")
            return None
        from gencontrol.recipes.sound.data import build_sound_dataset

        sizes = {"train": config.train, "val": config.val, "test": config.test}
        path: Path = build_sound_dataset(
            config.output or config.data, **sizes, seed=config.seed, workers=config.workers
        )
        print(path)
        return path
    from gencontrol.registry import PRETRAIN, find

    kind, defaults, model, process = _STAGES[stage]
    config = build(kind, {"output": f"runs/{stage}", **table["run"], "stage": stage}, "run")
    train = build(TrainConfig, {**defaults(table["train"]), **table["train"]}, "train")
    if train.shard:
        raise UsageError("train.shard is an option of gencontrol finetune; pretraining networks fit on one device.")
    prepare(threads=train.threads)
    algorithm = find(PRETRAIN, stage, "pretraining")
    options = build(algorithm.Config, table["algorithm"], "algorithm")
    sections: list[tuple[str, Any]] = [("run", config), ("train", train), ("algorithm", options)]
    architecture: tuple[Any, ...] = ()
    if model is not None:
        architecture = (build(model, table["model"], "model"), sound.flow_process({**process, **table["process"]}))
        sections += zip(("model", "process"), architecture, strict=True)
    elif table["model"] or table["process"]:
        raise UsageError(f"pretrain {stage} has no sections [model] and [process]; only flow, digits and scenes have.")
    if kind is sound.SoundRun and not (Path(config.data) / "train.npy").exists():
        raise UsageError(
            f"no sound data in '{config.data}'; make it: gencontrol pretrain sound-data --data {config.data}"
        )
    folder = open_run(config.output, describe(sections), mode=start.mode, allow=start.allow)
    if start.dry_run:
        print(dump_toml(folder.table), end="")
        return None
    makers = {
        "flow": partial(sound.make_flow, algorithm, config),
        "digits": partial(digits.make_digits, algorithm),
        "scenes": partial(scenes.make_scenes, algorithm, words=getattr(config, "words", 0.0)),
        "scene-readers": partial(scenes.make_readers, algorithm),
    }
    make = makers.get(stage, partial(sound.make_reader, algorithm, config))
    made = make(options, *architecture, seed=train.seed, device=choose_device(train.device))
    with running(folder, train, {"kind": "pretrain", "stage": stage}) as trainer:
        trainer.fit(made)
    return folder.path
