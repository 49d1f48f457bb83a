"""Defaults that are called official against the configuration files of the published code; deviations have a reason."""

from __future__ import annotations

from typing import Any

import pytest

from gencontrol.algorithms.forward.awm import AwmConfig
from gencontrol.algorithms.forward.base import LinearDecay
from gencontrol.algorithms.forward.crd import CrdConfig
from gencontrol.algorithms.forward.nft import NftConfig
from gencontrol.algorithms.offline.diffusion_dpo import DpoConfig
from gencontrol.algorithms.path.flow_grpo import DdpoConfig, FlowGrpoConfig
from tests.helpers.golden import official

#: (method, preset, our defaults, our option → its name there)
TABLE: list[tuple[str, str, Any, dict[str, str]]] = [
    (
        "flow_grpo",
        "geneval_sd3",
        FlowGrpoConfig(),
        {
            "clip_range": "clip_range",
            "adv_clip": "adv_clip_max",
            "noise": "noise_level",
            "demo_steps": "sample_steps",
            "eval_steps": "eval_steps",
            "generations": "group_size",
        },
    ),
    (
        "diffusion_nft",
        "sd3_geneval",
        NftConfig(),
        {
            "beta": "nft_beta",
            "kl_coef": "kl_coef",
            "adv_clip": "adv_clip_max",
            "demo_steps": "sample_steps",
            "eval_steps": "eval_steps",
            "generations": "group_size",
            "guidance_scale": "guidance_scale",
        },
    ),
    (
        "awm",
        "geneval_sd3_no_cfg_1node",
        AwmConfig(),
        {
            "kl_coef": "kl_coef",
            "clip_range": "clip_range",
            "adv_clip": "adv_clip_max",
            "advantage_max": "advantage_max",
            "robust": "ghuber_power",
            "snapshot_coef": "ema_beta",
            "train_times": "train_timesteps",
            "time_range": "timestep_fraction",
            "demo_steps": "sample_steps",
            "generations": "group_size",
        },
    ),
    (
        "ddpo",
        "aesthetic",
        DdpoConfig(),
        {"clip_range": "clip_range", "adv_clip": "adv_clip_max", "demo_steps": "sample_steps"},
    ),
    ("diffusion_dpo", "argument_defaults", DpoConfig(), {"beta": "beta_dpo"}),
]


@pytest.mark.parametrize(("method", "preset", "config", "names"), TABLE, ids=[row[0] for row in TABLE])
def test_defaults_are_the_official_ones(method: str, preset: str, config: Any, names: dict[str, str]) -> None:
    theirs = official(method)[preset]
    assert {name: getattr(config, name) for name in names} == {name: theirs[other] for name, other in names.items()}


def test_settings_with_another_form() -> None:
    """KL of Flow-GRPO in its own unit, spread, snapshots, times, records."""
    grpo, nft, awm, ddpo = (official(name) for name in ("flow_grpo", "diffusion_nft", "awm", "ddpo"))
    assert FlowGrpoConfig().path_kl_unit == "code" and FlowGrpoConfig().kl_weight() == grpo["geneval_sd3"]["kl_coef"]
    assert grpo["geneval_sd3"]["global_std"] and nft["sd3_geneval"]["global_std"]
    assert FlowGrpoConfig().spread == NftConfig().spread == AwmConfig().spread == "global"
    trained = grpo["geneval_sd3"]["timestep_fraction"] * grpo["geneval_sd3"]["sample_steps"]
    assert int(trained) == FlowGrpoConfig().demo_steps - 1  # the last one is deterministic in ours
    assert ddpo["aesthetic"]["timestep_fraction"] == 1.0 and ddpo["aesthetic"]["eta"] == 1.0
    record = ddpo["aesthetic"]["per_prompt_stat_tracking"]
    assert (DdpoConfig().history, DdpoConfig().min_history) == (record["buffer_size"], record["min_count"])
    assert nft["sd3_geneval"]["decay_type"] == 1 and NftConfig().decay == "0-0-0.001-0.5"  # held by snapshot_decay
    wanted = awm["geneval_sd3_no_cfg_1node"]
    assert wanted["time_type"] == "discrete_wo_init" and AwmConfig().time_start == "out"
    assert LinearDecay.parse(AwmConfig().snapshot_decay).last == wanted["kl_ema_decay"]
    assert AwmConfig().updates_per_round == 1 and not wanted["off_policy"]


#: option of CRD → (the preset's value, ours, why)
CRD_DEVIATIONS = {
    "time_sampling": ("discrete", "stratified", "ours: lower variance on small networks; `grid` is the preset's"),
    "train_times": (20, 9, "DiffusionNFT's number; at equal samples it costs half"),
    "combine": ("sum", "gdpo", "rewards of unequal units; with one reward they agree"),
}


def test_crd_and_its_deviations() -> None:
    theirs, ours = official("flow_factory")["crd_sd3_5"]["train"], CrdConfig()
    names = {
        "beta": "crd_beta",
        "loss": "crd_loss_type",
        "weight_temp": "weight_temp",
        "old_decay": "old_model_decay",
        "sampling_decay": "sampling_model_decay",
        "time_range": "timestep_range",
        "kl_coef": "kl_beta",
        "kl_guidance": "kl_cfg",
        "adv_clip": "adv_clip_range",
        "demo_steps": "num_inference_steps",
        "guidance_scale": "guidance_scale",
        "generations": "group_size",
        "prompts_per_round": "unique_sample_num_per_epoch",
        "updates_per_round": "gradient_step_per_epoch",
    }
    assert {name: getattr(ours, name) for name in names} == {name: theirs[other] for name, other in names.items()}
    there = {
        "time_sampling": theirs["time_sampling_strategy"],
        "train_times": theirs["num_train_timesteps"],
        "combine": theirs["advantage_aggregation"],
    }
    assert there == {name: row[0] for name, row in CRD_DEVIATIONS.items()}
    assert {name: getattr(ours, name) for name in there} == {name: row[1] for name, row in CRD_DEVIATIONS.items()}
