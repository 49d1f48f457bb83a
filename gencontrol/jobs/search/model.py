"""The model of a search: its law without weights (for checks and plans), and loaded with all that a sampler needs."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gencontrol.errors import UsageError
from gencontrol.jobs.search.settings import SearchConfig, SourceConfig, branch_of
from gencontrol.jobs.setup.checks import download_hint
from gencontrol.jobs.setup.models import folder_of

if TYPE_CHECKING:
    from gencontrol.pipelines.search.searchable import Problem

#: our own pipelines, whose law is read from files
_OWN = ("TextToAudioPipeline", "ClassToImagePipeline", "TextToImagePipeline")


@dataclass(frozen=True)
class Law:
    """What is known of a model before its weights are loaded.

    Args:
        grid: sampler times from 1 to 0.
        levels: places in the grid where a tree has its levels; the last is the clean end.
        shape: of one state.
        guidance_scale: classifier-free guidance that will be used.
    """

    grid: tuple[float, ...]
    levels: tuple[int, ...]
    shape: tuple[int, ...]
    guidance_scale: float

    @property
    def steps(self) -> int:
        """Model calls of a whole path."""
        return len(self.grid) - 1


@dataclass(frozen=True)
class SearchModel:
    """A loaded model.

    Args:
        problem: law and decoder for the prompts.
        artefacts: (file stem, one sample) → {file name: bytes}.
        at_work: context of the whole search.
        autocast: context of the model calls.
    """

    problem: Problem
    artefacts: Callable[[str, Any], dict[str, bytes]]
    at_work: Callable[[], AbstractContextManager[None]]
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def decode(self, x: Any) -> Any:
        """Return the samples [b *d] of clean states, on the CPU."""
        import torch

        with torch.no_grad():
            return self.problem.decode(x).cpu()


def read_law(model: str, search: SearchConfig) -> Law | None:
    """Return the law of a model folder of ours from its small files; None where only loading tells.

    Raises:
        UsageError: a folder that is no pipeline, or branch times that are not in the grid.
    """
    from torch import nn

    from gencontrol.pipelines.backends.audio import ProcessSpec
    from gencontrol.pipelines.hub.hub import read_index
    from gencontrol.sampling.chain import branch_indices, make_chain

    folder = folder_of(model)
    if folder is None:
        return None
    kind = str(read_index(folder)["_class_name"])
    if kind not in _OWN:
        return None
    spec = ProcessSpec.read(folder)
    shape = _sound_shape(folder) if kind == _OWN[0] else _picture_shape(folder)
    chain = make_chain(spec.denoiser(nn.Identity()), shape, steps=search.steps or spec.steps)
    levels = branch_indices(chain, branch_of(search, chain.steps))
    scale = spec.guidance_scale if search.guidance_scale is None else search.guidance_scale
    return Law(chain.grid, levels, shape, scale)


def _sound_shape(folder: Path) -> tuple[int, ...]:
    """Latent shape of our sound models: tokens of the clip, channels."""
    config = _read_config(folder / "codec" / "config.json")
    return int(config["clip_samples"]) // (int(config["hop"]) * int(config["frames_per_token"])), int(
        config["channels"]
    )


def _picture_shape(folder: Path) -> tuple[int, ...]:
    """Pixels of our picture models."""
    config = _read_config(folder / "transformer" / "config.json")
    return int(config["channels"]), int(config["size"]), int(config["size"])


def _read_config(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"'{file}' cannot be read ({error}); save or download the model again.") from error


def load_model(source: SourceConfig, search: SearchConfig, prompts: Sequence[str], device: str) -> SearchModel:
    """Load a pipeline in float32 onto the device and take it apart.

    Raises:
        UsageError: no model there, one that cannot be searched, or a prompt that it does not take.
    """
    from gencontrol.pipelines.search.searchable import Request, searchable

    with download_hint(source.model, online=source.online):
        pipeline = _load(source.model, online=source.online).to(device)
    found = searchable(pipeline)
    problem = found.problem(Request(list(prompts), search.steps, search.guidance_scale))
    return SearchModel(problem, _artefacts(pipeline), found.at_work, _autocast(device, source.precision))


def check_gradient(model: SearchModel, reward: Any, sampler: str) -> None:
    """Check that the reward of a decoded sample has a gradient in the clean state.

    Raises:
        UsageError: it has none; most decoders of sound pass none.
    """
    import torch

    from gencontrol.sampling.scoring import Scorer
    from gencontrol.types import RewardContext

    problem = model.problem
    context = RewardContext(prompts=problem.prompts[:1], sampling_rate=problem.sampling_rate)
    device = next(problem.model.parameters()).device
    with torch.enable_grad():
        state = torch.zeros((1, *problem.item_shape), device=device, requires_grad=True)
        value = Scorer(reward, problem.decode, context).differentiable(state, torch.zeros(1, dtype=torch.int64))
        found = torch.autograd.grad(value.sum(), state, allow_unused=True)[0] if value.requires_grad else None
    if found is None:
        raise UsageError(
            f"{sampler} follows the reward's gradient, but reward or decoder of this model passes none; choose "
            "dts-star, dts, smc, beam, snis or best-of-n."
        )


def _load(model: str, *, online: bool) -> Any:
    """Load the pipeline that the model's index names."""
    from gencontrol.pipelines import ClassToImagePipeline, TextToAudioPipeline, TextToImagePipeline
    from gencontrol.pipelines.hub.hub import BUNDLED_NAMES, LoadOptions, check_pipeline_class, locate
    from gencontrol.pipelines.search.searchable import SEARCHABLE

    name = BUNDLED_NAMES.get(model, BUNDLED_NAMES["bundled"])
    index, where = locate(model, LoadOptions(local_files_only=not online), name)
    kind = check_pipeline_class(index, SEARCHABLE, where, "a search")
    ours: dict[str, Any] = {
        "TextToAudioPipeline": TextToAudioPipeline,
        "StableAudioPipeline": TextToAudioPipeline,
        "AudioLDM2Pipeline": TextToAudioPipeline,
        "ClassToImagePipeline": ClassToImagePipeline,
        "TextToImagePipeline": TextToImagePipeline,
    }
    if kind in ours:
        return ours[kind].from_pretrained(model, local_files_only=not online)
    import diffusers

    return getattr(diffusers, kind).from_pretrained(where, use_safetensors=True, local_files_only=not online)


def _artefacts(pipeline: Any) -> Callable[[str, Any], dict[str, bytes]]:
    """How a pipeline's samples become files; diffusers' own pictures are written at their size."""
    from gencontrol.pipelines import Pipeline

    if isinstance(pipeline, Pipeline):
        return pipeline.artefacts
    return _picture


def _picture(stem: str, sample: Any) -> dict[str, bytes]:
    """A PNG of one image [c h w]."""
    from gencontrol.data.images import to_pil

    buffer = io.BytesIO()
    to_pil(sample).save(buffer, format="PNG")
    return {f"{stem}.png": buffer.getvalue()}


def _autocast(device: str, precision: str) -> Callable[[], AbstractContextManager[Any]]:
    import torch

    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(torch.device(device).type, torch.bfloat16)
