"""Lazy registry: a name maps to "module:attribute", imported when asked for.  A new method is one line here."""

from __future__ import annotations

import importlib
from typing import Any

from gencontrol.errors import UsageError, nearest

ALGORITHMS = {
    "dragon": "gencontrol.algorithms.dragon:Dragon",
    "rwr": "gencontrol.algorithms.rwr:RewardWeightedRegression",
    "ctrl": "gencontrol.algorithms.ctrl:Ctrl",
    "flow-grpo": "gencontrol.algorithms.flow_grpo:FlowGrpo",
    "ddpo": "gencontrol.algorithms.flow_grpo:Ddpo",
    "draft": "gencontrol.algorithms.draft:Draft",
    "cfg-finetune": "gencontrol.algorithms.cfg_finetune:CfgFinetune",
    "diffusion-dpo": "gencontrol.algorithms.diffusion_dpo:DiffusionDpo",
    "crd": "gencontrol.algorithms.crd:Crd",
    "nft": "gencontrol.algorithms.nft:Nft",
    "awm": "gencontrol.algorithms.awm:Awm",
}
PRETRAIN = {
    "flow": "gencontrol.algorithms.pretrain_flow:FlowPretrain",
    "clap": "gencontrol.algorithms.pretrain_clap:ClapPretrain",
    "attributes": "gencontrol.algorithms.pretrain_attributes:AttributePretrain",
    "digits": "gencontrol.algorithms.pretrain_digits:DigitsPretrain",
    "scenes": "gencontrol.algorithms.pretrain_scenes:ScenesPretrain",
    "scene-readers": "gencontrol.algorithms.pretrain_scene_readers:SceneReadersPretrain",
}
#: what `gencontrol train` makes from data sets
TRAIN = {
    "diffusion-policy": "gencontrol.algorithms.policy_pretrain:DiffusionPolicyPretrain",
    "flow-policy": "gencontrol.algorithms.policy_pretrain:FlowPolicyPretrain",
}
REWARDS = {
    "clap": "gencontrol.rewards.clap:ClapReward",
    "fad": "gencontrol.rewards.distribution:FadReward",
    "fad-set": "gencontrol.rewards.distribution:SetFadReward",
    "vendi": "gencontrol.rewards.distribution:VendiReward",
    "quality": "gencontrol.rewards.quality:QualityReward",
    "loudness-range": "gencontrol.rewards.signal:LoudnessRange",
    "spectral-centroid": "gencontrol.rewards.signal:SpectralCentroid",
    "digit-class": "gencontrol.rewards.classifier:DigitClassReward",
    "classifier": "gencontrol.rewards.classifier:ClassifierReward",
    "clip": "gencontrol.rewards.clip:ClipReward",
    "pickscore": "gencontrol.rewards.preference:PickScore",
    "hps": "gencontrol.rewards.preference:Hps",
    "aesthetic": "gencontrol.rewards.aesthetic:AestheticReward",
    "compressibility": "gencontrol.rewards.compressibility:Compressibility",
    "incompressibility": "gencontrol.rewards.compressibility:Incompressibility",
    "remote": "gencontrol.rewards.remote:RemoteReward",
    "compositional": "gencontrol.rewards.compositional:Compositional",
    "ocr": "gencontrol.rewards.ocr:OcrReward",
}
#: rewards that score one medium alone
REWARDS_OF = {
    "audio": ("clap", "fad", "fad-set", "vendi", "quality", "loudness-range", "spectral-centroid"),
    "image": (
        *("compositional", "ocr", "clip", "pickscore", "hps", "aesthetic", "classifier", "digit-class"),
        *("compressibility", "incompressibility"),
    ),
}
BENCHES = {
    "policy-latency": "gencontrol.bench.policy_latency:main",
    "overhead": "gencontrol.bench.overhead:main",
    "dragon": "gencontrol.bench.dragon:main",
    "faults": "gencontrol.bench.faults:main",
    "epoch": "gencontrol.bench.epoch:main",
    "dts": "gencontrol.bench.dts:main",
    "ctrl": "gencontrol.bench.ctrl:main",
    "crd": "gencontrol.bench.crd:main",
    "gpc": "gencontrol.bench.gpc:main",
    "policies": "gencontrol.bench.policies:main",
}


def resolve(table: dict[str, str], name: str, kind: str) -> Any:
    """Return the object called `name` in `table`.

    Raises:
        UsageError: no such name; the message gives the nearest one and the whole list.
    """
    if name not in table:
        raise UsageError(f"unknown {kind} '{name}'.{nearest(name, table)} Known: {', '.join(sorted(table))}.")
    module, attribute = table[name].split(":")
    return getattr(importlib.import_module(module), attribute)


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
