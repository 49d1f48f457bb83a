"""Settings of the process that must be in place before a heavy library is imported."""

from __future__ import annotations

import os
from typing import Any

from gencontrol.errors import EnvironmentMissing, UsageError


def prepare(*, threads: int = 0, online: bool = False) -> None:
    """Set offline mode (unless `online` or the user's own variable), quiet tokenizers and the number of threads."""
    if online:
        os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "0"
    else:
        offline = os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("TRANSFORMERS_OFFLINE", offline)
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if threads:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
        import torch

        torch.set_num_threads(threads)


def choose_device(name: str) -> str:
    """Return "cpu", "cuda" or, under a launcher, this process' "cuda:N" for the setting "auto", "cpu" or "cuda".

    Raises:
        EnvironmentMissing: CUDA is asked for and not here.
    """
    import torch

    here = torch.cuda.is_available()
    if name == "cuda" and not here:
        raise EnvironmentMissing(
            "--device cuda: torch sees no CUDA device; use --device cpu, or run gencontrol doctor."
        )
    if name == "cpu" or not here:
        return "cpu"
    local = os.environ.get("LOCAL_RANK", "")
    return f"cuda:{local}" if local.isdigit() and torch.cuda.device_count() > 1 else "cuda"


def processes() -> int:
    """Return the number of processes that torchrun or accelerate launch started, or 1."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdigit() else 1


def launched_precision(given: str | None) -> Any:
    """Return the precision that `accelerate launch` chose, or what was given.

    Raises:
        UsageError: both are set and contradict each other.
    """
    chosen = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}.get(os.environ.get("ACCELERATE_MIXED_PRECISION", ""))
    if chosen is None or (given is None and chosen == "fp32"):
        return given
    if given not in (None, "auto", chosen):
        raise UsageError(
            f"precision is {given}, but accelerate launch was told {chosen}; leave --mixed_precision out there, or "
            f"give --precision {chosen}."
        )
    return chosen
