"""The files of a trained control: condition.json and .safetensors, plan.json, lora.safetensors where LoRA is beside it.

The backbone is not among them: a control is loaded onto the model that it was trained on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from gencontrol.errors import UsageError
from gencontrol.models.conditions.base import Conditioned, conditioned, load_condition, save_condition
from gencontrol.models.denoiser import Denoiser
from gencontrol.models.roles import LoraConfig, Roles
from gencontrol.sampling.control.controlled import ControlPlan

_PLAN, _LORA = "plan.json", "lora.safetensors"


def control_folder(path: str | Path) -> Path:
    """Return the folder of a control: the path itself, its control/ (a final/ folder), or its final/control/ (a run).

    Raises:
        UsageError: none of them holds one.
    """
    given = Path(path).expanduser()
    for folder in (given, given / "control", given / "final" / "control"):
        if (folder / _PLAN).is_file():
            return folder
    raise UsageError(
        f"'{path}' holds no control (plan.json, condition.json, …); give the folder control/ in the final/ of a run of "
        "ctrl or cfg-finetune."
    )


def save_control(network: Conditioned, roles: Roles, role: str, plan: ControlPlan, folder: Path) -> None:
    """Write the condition, the LoRA beside it where there is one, and the plan it was trained for."""
    from safetensors.torch import save_file

    with roles.use(role):
        save_condition(network, folder)
    table: dict[str, Any] = {**plan.table(), "lora": None}
    if roles.lora is not None:
        weights = {k: v.detach().cpu().contiguous() for k, v in roles.state_dict()[role].items() if ".lora_" in k}
        save_file(weights, str(folder / _LORA), metadata={"format": "pt"})
        table["lora"] = {"rank": roles.lora.rank, "alpha": roles.lora.alpha, "targets": roles.lora.targets}
    (folder / _PLAN).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def load_control(denoiser: Denoiser, folder: str | Path) -> tuple[Denoiser, ControlPlan]:
    """Return the denoiser with a saved control, and the plan to sample it with (`sample_controlled`).

    Raises:
        UsageError: no such folder, or one of another backbone.
    """
    from safetensors.torch import load_file

    folder = control_folder(folder)
    try:
        table = json.loads((folder / _PLAN).read_text(encoding="utf-8"))
        lora = table.pop("lora")
        plan = ControlPlan(**{**table, "grid": tuple(table["grid"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"'{folder}' holds no control (plan.json, condition.json, …): {reason}") from error
    added = load_condition(denoiser, folder)
    if lora is not None:
        config = LoraConfig(lora["rank"], lora["alpha"], None if lora["targets"] is None else tuple(lora["targets"]))
        network = conditioned(added)
        roles = Roles(network, ("policy", "ref"), config)
        held, weights = roles.state_dict()["policy"], load_file(str(folder / _LORA))
        if {k: v.shape for k, v in held.items()} != {k: v.shape for k, v in weights.items()}:
            raise UsageError(f"the LoRA in '{folder}' was made for another backbone; load the one it was trained on.")
        with torch.no_grad():
            for key, value in held.items():
                value.copy_(weights[key])
    return added, plan
