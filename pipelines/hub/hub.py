"""Where a pipeline comes from: a folder, a hub id or the bundled weights; every wrong answer is one sentence.

A class named in a `model_index.json` is looked up in an allow-list and never imported by its name; only safetensors
and JSON are read, so that loading a stranger's folder runs no code of theirs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gencontrol import weights
from gencontrol._compat import quiet
from gencontrol.errors import EnvironmentMissing, UsageError, nearest

INDEX = "model_index.json"
LORA_FILE = "pytorch_lora_weights.safetensors"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}
#: names of the bundled models → their folders
BUNDLED_NAMES: Mapping[str, str] = {
    "bundled": "text_to_audio",
    "bundled-sound": "text_to_audio",
    "bundled-image": "text_to_image",
    "bundled-digits": "digits",
}
#: libraries whose components a model_index.json may name
_LIBRARIES = frozenset({"gencontrol", "diffusers", "transformers", "stable_audio", "audioldm2", "stable_diffusion"})


@dataclass(frozen=True)
class LoadOptions:
    """Keywords of `from_pretrained` that say which files are meant and in which precision they are wanted.

    Args:
        revision: branch, tag or commit of a hub repository.
        variant: file variant of a diffusers folder, e.g. "fp16".
        dtype: of the networks' weights.
        cache_dir: folder for downloads; None is huggingface_hub's own.
        local_files_only: never ask the hub.
        token: for private repositories; None uses the one of `hf auth login` or HF_TOKEN.
    """

    revision: str | None = None
    variant: str | None = None
    dtype: torch.dtype = torch.float32
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    token: str | None = None


def pick_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype:
    """Return the one dtype that was asked for under its new or its old keyword; float32 when neither was given.

    Raises:
        UsageError: both keywords, or an unknown name.
    """
    if dtype is not None and torch_dtype is not None:
        raise UsageError(f"dtype={dtype} and torch_dtype={torch_dtype} are both given; give dtype alone.")
    chosen = dtype if dtype is not None else torch_dtype
    if chosen is None:
        return torch.float32
    if isinstance(chosen, torch.dtype) and chosen.is_floating_point:
        return chosen
    if isinstance(chosen, str) and chosen in _DTYPES:
        return _DTYPES[chosen]
    raise UsageError(f"dtype {chosen!r} is not a floating-point type; use one of {', '.join(_DTYPES)}.")


def bundled_folder(name: str) -> Path:
    """Return the folder of the weights that come with the package.

    Raises:
        EnvironmentMissing: this installation has none.
    """
    folder = weights.BUNDLED / name
    if not (folder / INDEX).is_file():
        raise EnvironmentMissing(
            f"the bundled model '{name}' is not in this installation ({folder}); install gencontrol from its wheel or "
            "a full checkout, or name a folder or a hub id."
        )
    return folder


def locate(source: str | Path, options: LoadOptions, bundled: str) -> tuple[dict[str, Any], str | Path]:
    """Return the parsed `model_index.json` of a source and where the rest of it is: a folder, or a hub id.

    Raises:
        UsageError: neither a folder of a pipeline nor a reachable hub repository.
        EnvironmentMissing: "bundled" (or "bundled-" and the model's name) was asked for and is not installed.
    """
    if source == "bundled" or BUNDLED_NAMES.get(str(source)) == bundled:
        folder = bundled_folder(bundled)
        return read_index(folder), folder
    path = Path(source).expanduser()
    if path.is_dir():
        return read_index(path), path
    if path.exists():
        raise UsageError(f"'{source}' is a file; a pipeline is a folder with {INDEX}: give the folder.")
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source) or source.startswith("."):
        raise UsageError(
            f"'{source}' does not exist; give a folder written by save_pretrained, a hub id (owner/name) or 'bundled'."
        )
    return _parse_index(Path(_download(source, INDEX, options)), source), source


def read_index(folder: Path) -> dict[str, Any]:
    """Read and check the `model_index.json` of a folder.

    Raises:
        UsageError: it is not there, not JSON, or names components of libraries that are not allowed.
    """
    path = folder / INDEX
    if not path.is_file():
        raise UsageError(f"'{folder}' is not a pipeline: it has no {INDEX}; {_remedy(folder)}.")
    return _parse_index(path, str(folder))


def _remedy(folder: Path) -> str:
    """Guess what the user meant by a folder without an index."""
    for inner in ("final", "pipeline"):
        if (folder / inner / INDEX).is_file():
            return f"give '{folder / inner}'"
    if (folder / LORA_FILE).is_file():
        return "it holds LoRA weights: load the base model and call load_lora_weights on it"
    if (folder / "config.json").is_file():
        return "it holds a single component (config.json): give the folder above it"
    return "give a folder written by save_pretrained, a run's final/ folder, a hub id (owner/name) or 'bundled'"


def _parse_index(path: Path, source: str) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"'{source}': {INDEX} cannot be read as JSON ({error}); save or download it again.") from error
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise UsageError(f"'{source}': {INDEX} names no pipeline class (_class_name); save or download it again.")
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list):
            continue
        if len(entry) != 2 or (entry[0] is not None and entry[0] not in _LIBRARIES):
            raise UsageError(
                f"'{source}': component '{name}' is {entry}; only components of {', '.join(sorted(_LIBRARIES))} are "
                "loaded, code that lies in a model folder never is."
            )
    return index


def check_pipeline_class(index: Mapping[str, Any], known: Mapping[str, Any], source: str | Path, loader: str) -> str:
    """Return the pipeline class that an index names if `loader` can load it.

    Raises:
        UsageError: another kind of pipeline; the message names the folder and what to use instead.
    """
    name = str(index["_class_name"])
    if name not in known:
        raise UsageError(
            f"'{source}' holds a {name}; {loader} loads {', '.join(sorted(known))}.{nearest(name, known)} "
            "Load it with its own class, or give another model."
        )
    return name


def check_component(index: Mapping[str, Any], name: str, allowed: Mapping[str, tuple[str, ...]], source: Path) -> None:
    """Raise UsageError unless component `name` of an index is of a class that `allowed[name]` lists."""
    entry = index.get(name)
    if not isinstance(entry, list):
        raise UsageError(f"'{source}': {INDEX} has no component '{name}'; save the pipeline again.")
    if entry[1] not in allowed[name]:
        raise UsageError(
            f"'{source}': component '{name}' is a '{entry[1]}'; this version loads {' or '.join(allowed[name])}."
        )
    if not (source / name).is_dir():
        raise UsageError(f"'{source}': the folder of component '{name}' is missing; copy or download it again.")


def _download(repo: str, filename: str, options: LoadOptions) -> str:
    """Fetch one file of a hub repository into the cache and return its path."""
    from huggingface_hub import hf_hub_download

    with hub_errors(repo, options):
        return hf_hub_download(
            repo,
            filename,
            revision=options.revision,
            cache_dir=options.cache_dir,
            local_files_only=options.local_files_only,
            token=options.token,
        )


def download_folder(repo: str, options: LoadOptions) -> Path:
    """Fetch the JSON, text and safetensors files of a hub repository and return the local folder."""
    from huggingface_hub import snapshot_download

    with hub_errors(repo, options), quiet():
        folder = snapshot_download(
            repo,
            revision=options.revision,
            cache_dir=options.cache_dir,
            local_files_only=options.local_files_only,
            token=options.token,
            allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"],
        )
    return Path(folder)


@contextmanager
def hub_errors(repo: str, options: LoadOptions) -> Iterator[None]:
    """Turn what huggingface_hub raises into one sentence that names the repository and the remedy."""
    from huggingface_hub import errors

    at = f" at revision '{options.revision}'" if options.revision else ""
    try:
        yield
    except errors.GatedRepoError as error:
        raise UsageError(f"'{repo}' is gated: accept its licence on the hub and log in (`hf auth login`).") from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"the hub has no repository '{repo}' that you can read; check the name, or log in (`hf auth login`)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"'{repo}' has no revision '{options.revision}'; check its branches and tags.") from error
    except errors.RemoteEntryNotFoundError as error:
        raise UsageError(f"'{repo}'{at} is not a pipeline: it has no {INDEX}; give another repository.") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        raise UsageError(
            f"'{repo}'{at} is not a folder here, not in the hub's cache, and the hub was not reached "
            f"({type(error).__name__}); check the name, unset HF_HUB_OFFLINE and local_files_only, or give a folder."
        ) from error


def own_memory(module: torch.nn.Module) -> None:
    """Copy memory-mapped weights into aligned memory of their own.

    Mapped tensors start where the file put them, which sends matrix products down other code paths (results differ in
    the last bit), and they change when their file is written again.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()
