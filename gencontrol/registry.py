"""Lazy registry: a name maps to "module:attribute", imported when asked for.  A new method is one line here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from gencontrol.errors import UsageError, nearest

ALGORITHMS = {
    "dragon": "gencontrol.algorithms.matching.dragon:Dragon",
    "rwr": "gencontrol.algorithms.matching.rwr:RewardWeightedRegression",
    "ctrl": "gencontrol.algorithms.ctrl.ctrl:Ctrl",
    "flow-grpo": "gencontrol.algorithms.path.flow_grpo:FlowGrpo",
    "ddpo": "gencontrol.algorithms.path.flow_grpo:Ddpo",
    "draft": "gencontrol.algorithms.path.draft:Draft",
    "cfg-finetune": "gencontrol.algorithms.offline.cfg_finetune:CfgFinetune",
    "diffusion-dpo": "gencontrol.algorithms.offline.diffusion_dpo:DiffusionDpo",
    "crd": "gencontrol.algorithms.forward.crd:Crd",
    "nft": "gencontrol.algorithms.forward.nft:Nft",
    "awm": "gencontrol.algorithms.forward.awm:Awm",
}
PRETRAIN = {
    "flow": "gencontrol.recipes.sound.flow:FlowPretrain",
    "clap": "gencontrol.recipes.sound.clap:ClapPretrain",
    "attributes": "gencontrol.recipes.sound.attributes:AttributePretrain",
    "digits": "gencontrol.recipes.digits.train:DigitsPretrain",
    "scenes": "gencontrol.recipes.scenes.flow:ScenesPretrain",
    "scene-readers": "gencontrol.recipes.scenes.readers:SceneReadersPretrain",
}
#: what `gencontrol train` makes from data sets
TRAIN = {
    "diffusion-policy": "gencontrol.algorithms.agents.behavior_cloning:DiffusionPolicyPretrain",
    "flow-policy": "gencontrol.algorithms.agents.behavior_cloning:FlowPolicyPretrain",
}
REWARDS = {
    "clap": "gencontrol.rewards.audio.clap:ClapReward",
    "fad": "gencontrol.rewards.distribution:FadReward",
    "fad-set": "gencontrol.rewards.distribution:SetFadReward",
    "vendi": "gencontrol.rewards.distribution:VendiReward",
    "quality": "gencontrol.rewards.audio.quality:QualityReward",
    "loudness-range": "gencontrol.rewards.audio.signal:LoudnessRange",
    "spectral-centroid": "gencontrol.rewards.audio.signal:SpectralCentroid",
    "compositional": "gencontrol.rewards.image.compositional:Compositional",
    "ocr": "gencontrol.rewards.image.ocr:OcrReward",
    "digit-class": "gencontrol.rewards.image.classifier:DigitClassReward",
    "classifier": "gencontrol.rewards.image.classifier:ClassifierReward",
    "clip": "gencontrol.rewards.image.preference:ClipReward",
    "pickscore": "gencontrol.rewards.image.preference:PickScore",
    "hps": "gencontrol.rewards.image.preference:Hps",
    "aesthetic": "gencontrol.rewards.image.aesthetic:AestheticReward",
    "compressibility": "gencontrol.rewards.image.compressibility:Compressibility",
    "incompressibility": "gencontrol.rewards.image.compressibility:Incompressibility",
    "remote": "gencontrol.rewards.remote.client:RemoteReward",
}
BENCHES = {
    "policy-latency": "gencontrol.bench.policy_latency:main",
    "overhead": "gencontrol.bench.overhead:main",
    "dragon": "gencontrol.bench.dragon.main:main",
    "faults": "gencontrol.bench.faults:main",
    "epoch": "gencontrol.bench.epoch:main",
    "dts": "gencontrol.bench.dts.main:main",
    "ctrl": "gencontrol.bench.ctrl.main:main",
    "crd": "gencontrol.bench.crd.main:main",
    "gpc": "gencontrol.bench.gpc.main:main",
    "policies": "gencontrol.bench.policies:main",
    "digits-quality": "gencontrol.recipes.digits.quality:main",
    "scenes-quality": "gencontrol.recipes.scenes.quality:main",
    "sound-quality": "gencontrol.recipes.sound.quality:main",
    "sound-generation": "gencontrol.recipes.sound.generation_quality:main",
}


#: what an outside class of a kind must have at least; its other methods come with the base classes
NEEDS = {
    "algorithm": (
        *("Config", "name", "role_names", "collect", "minibatches", "loss", "after_update", "evaluate"),
        *("state_dict", "load_state_dict", "save_final"),
    ),
}


def find(table: Mapping[str, str], name: str, kind: str) -> Any:
    """Return the class of a registered name, or user code named `package.module:Class`.

    Args:
        table: name → "module:attribute".
        name: one of the table's, or a dotted path with a colon.
        kind: what it is, for messages; a kind in `NEEDS` is checked for its attributes.

    Raises:
        UsageError: no such name (the message gives the nearest one and all of them), nothing to import there, or a
            class that lacks an attribute of its kind.
    """
    if ":" in name:
        return fitting(resolve_dotted(name, kind), name, kind)
    if name not in table:
        raise UsageError(
            f"unknown {kind} '{name}'.{nearest(name, table)} Known: {', '.join(sorted(table))}; or package.module:Name "
            "of your own."
        )
    module, attribute = table[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def fitting(found: Any, name: str, kind: str) -> Any:
    """Return a class of user code.

    Raises:
        UsageError: it lacks an attribute of its kind.
    """
    missing = [attribute for attribute in NEEDS.get(kind, ()) if not hasattr(found, attribute)]
    if missing:
        raise UsageError(
            f"{kind} '{name}' has no {missing[0]}; {'an' if kind[0] in 'aeiou' else 'a'} {kind} is a class with "
            f"{', '.join(NEEDS[kind])}."
        )
    return found


def resolve_dotted(path: str, kind: str) -> Any:
    """Return user code named `package.module:Name`.

    Raises:
        UsageError: the module or the attribute is not there.
    """
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"{kind} '{path}' cannot be imported ({error}); give package.module:Name of an importable module "
            "(is its folder on PYTHONPATH?)."
        ) from error


def lazily(package: str, where: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a `__getattr__` for a package whose names load their module when they are first asked for.

    Args:
        package: its `__name__`.
        where: name → module inside the package.
    """

    def find(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{where[name]}"), name)

    return find
