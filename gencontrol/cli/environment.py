"""Settings of the process that must be in place before a heavy library is imported."""

from __future__ import annotations

import os

from gencontrol.errors import EnvironmentMissing


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
    """Return "cpu" or "cuda" for the device setting "auto", "cpu" or "cuda".

    Raises:
        EnvironmentMissing: CUDA is asked for and not here.
    """
    import torch

    here = torch.cuda.is_available()
    if name == "cuda" and not here:
        raise EnvironmentMissing(
            "--device cuda: torch sees no CUDA device; use --device cpu, or run gencontrol doctor."
        )
    return ("cuda" if here else "cpu") if name == "auto" else name
