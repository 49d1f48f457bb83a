"""Checkpoints: atomic folders of safetensors and JSON with a manifest; never pickle (docs/guarantees.md#checkpoints).

    checkpoints/step_00001000/
        role_<name>.safetensors   parameters of one role (tied ones once; `aliases` in state.json)
        optimizer.safetensors     "<parameter>|<entry>" → tensor
        algorithm.safetensors, algorithm.json   state of the algorithm; {"__tensor__": key} stands for a tensor
        state.json                format, step, counters, health, versions, topology, settings and their hash
        manifest.json             size and sha256 of every file; written last

The newest folder whose manifest holds wins; a damaged one is named aloud and the next older one is tried.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from gencontrol.errors import CheckpointError, DiskError
from gencontrol.files import FileLayer, digest, disk_error
from gencontrol.train.optim import strip_prefix

FORMAT = 1
_STEP = re.compile(r"step_(\d{8})")
_LEFTOVER = re.compile(r"\.(tmp|del)_step_\d{8}_\d+")


class Damaged(Exception):
    """A checkpoint folder is not what its manifest says; the message names the file."""


@dataclass
class TrainState:
    """All that a run needs to go on: roles {role: {name: tensor}}, optimizer {parameter: {entry: tensor}}, the
    algorithm's own state, and `meta` (JSON values: counters, health, versions, topology, settings)."""

    step: int
    roles: dict[str, dict[str, Tensor]]
    optimizer: dict[str, dict[str, Tensor]]
    algorithm: dict[str, Any]
    meta: dict[str, Any] = field(default_factory=dict)


def split_tensors(value: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Return (JSON with {"__tensor__": key} in the tensors' places, {key: tensor}).

    Raises:
        TypeError: a value is neither JSON nor a tensor; the message gives its path.
    """
    if isinstance(value, Tensor):
        return {"__tensor__": path}, {path: value}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value, {}
    tensors: dict[str, Tensor] = {}
    if isinstance(value, Mapping):
        table = {}
        for key, item in value.items():
            if not isinstance(key, str) or key == "__tensor__":
                raise TypeError(f"state '{path}' has the key {key!r}; keys must be text other than '__tensor__'")
            table[key], inner = split_tensors(item, f"{path}/{key}")
            tensors.update(inner)
        return table, tensors
    if isinstance(value, (list, tuple)):
        rows = []
        for index, item in enumerate(value):
            row, inner = split_tensors(item, f"{path}/{index}")
            rows.append(row)
            tensors.update(inner)
        return rows, tensors
    raise TypeError(f"state '{path}' is a {type(value).__name__}; only tensors and JSON values can be saved")


def join_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `split_tensors` (tuples come back as lists)."""
    if isinstance(value, dict):
        if set(value) == {"__tensor__"}:
            return tensors[value["__tensor__"]]
        return {key: join_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [join_tensors(item, tensors) for item in value]
    return value


def _pack(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, str]]:
    """Serialise tensors; returns the bytes and {tied name: name it is stored under}."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        identity = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and identity in seen:
            aliases[name] = seen[identity]
            continue
        seen[identity] = name
        kept[name] = tensor.detach().cpu().clone().contiguous()
    return safetensors.torch.save(kept), aliases


def clean_names(tensors: Mapping[str, Tensor], role: str) -> dict[str, Tensor]:
    """Return the tensors without `_orig_mod.` and `module.` in their names; a clash is an error."""
    clean = {strip_prefix(name): tensor for name, tensor in tensors.items()}
    if len(clean) != len(tensors):
        raise CheckpointError(f"role '{role}': names clash once '_orig_mod.' and 'module.' are removed; rename them.")
    return clean


def restore_names(stored: Mapping[str, Tensor], current: Mapping[str, Tensor], role: str) -> dict[str, Tensor]:
    """Return stored tensors under the names that the live role uses, after a strict comparison.

    Raises:
        CheckpointError: names are missing or unexpected (both lists are given), or a shape differs.
    """
    wanted = {strip_prefix(name): name for name in current}
    missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing or extra:
        wrapped = any(name != strip_prefix(name) for name in extra)
        hint = "strip '_orig_mod.' and 'module.' from the file's names" if wrapped else "use the model of that run"
        raise CheckpointError(
            f"role '{role}' does not fit this model: missing {missing[:8]} ({len(missing)}), unexpected "
            f"{extra[:8]} ({len(extra)}); {hint}."
        )
    for name, live in wanted.items():
        if stored[name].shape != current[live].shape:
            raise CheckpointError(
                f"role '{role}': '{name}' has shape {tuple(stored[name].shape)} in the checkpoint and "
                f"{tuple(current[live].shape)} in the model; use the model of that run."
            )
    return {live: stored[name] for name, live in wanted.items()}


def encode(state: TrainState) -> dict[str, bytes]:
    """Return the files of a checkpoint (without the manifest) by name."""
    contents: dict[str, bytes] = {}
    aliases: dict[str, dict[str, str]] = {}
    for role, tensors in state.roles.items():
        contents[f"role_{role}.safetensors"], aliases[role] = _pack(clean_names(tensors, role))
    moments = {f"{name}|{key}": value for name, entry in state.optimizer.items() for key, value in entry.items()}
    contents["optimizer.safetensors"], _ = _pack(moments)
    tree, tensors = split_tensors(state.algorithm)
    contents["algorithm.safetensors"], shared = _pack(tensors)
    contents["algorithm.json"] = json.dumps({"tree": tree, "aliases": shared}, indent=1).encode()
    meta = {"format": FORMAT, "step": state.step, "roles": sorted(state.roles), "aliases": aliases, **state.meta}
    contents["state.json"] = json.dumps(meta, indent=1).encode()
    return contents


def decode(contents: Mapping[str, bytes]) -> TrainState:
    """Undo `encode`."""
    meta = json.loads(contents["state.json"])
    roles = {}
    for role in meta["roles"]:
        tensors = safetensors.torch.load(contents[f"role_{role}.safetensors"])
        roles[role] = tensors | {name: tensors[stored] for name, stored in meta["aliases"].get(role, {}).items()}
    optimizer: dict[str, dict[str, Tensor]] = {}
    for key, value in safetensors.torch.load(contents["optimizer.safetensors"]).items():
        name, _, entry = key.rpartition("|")
        optimizer.setdefault(name, {})[entry] = value
    packed = json.loads(contents["algorithm.json"])
    tensors = safetensors.torch.load(contents["algorithm.safetensors"])
    tensors |= {name: tensors[stored] for name, stored in packed["aliases"].items()}
    return TrainState(meta["step"], roles, optimizer, join_tensors(packed["tree"], tensors), meta)


def read_verified(folder: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint folder after checking each against the manifest.

    Raises:
        Damaged: a file is missing, a link, or of another size or hash; the message names it.
    """
    for path in (folder, *folder.iterdir()):
        if path.is_symlink():
            raise Damaged(f"'{path}' is a symbolic link")
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        table = manifest["files"]
        entries = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in table.items()}
        if manifest.get("digest", digest(table)) != digest(table):
            raise ValueError("its own digest differs")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"'{folder / 'manifest.json'}' is missing or unreadable") from error
    contents: dict[str, bytes] = {}
    for name, (size, expected) in entries.items():
        path = folder / name
        if "/" in name or "\\" in name or name.startswith("."):
            raise Damaged(f"'{folder / 'manifest.json'}' lists the path '{name}'")
        if not path.is_file():
            raise Damaged(f"'{path}' is missing")
        if path.stat().st_size != size:
            raise Damaged(f"'{path}' has {path.stat().st_size} bytes instead of {size}")
        contents[name] = path.read_bytes()
        if hashlib.sha256(contents[name]).hexdigest() != expected:
            raise Damaged(f"'{path}' has another sha256 than its manifest says")
    return contents


class Checkpoints:
    """The checkpoints of one run folder; only one process may write at a time (see `run_folder.Lock`)."""

    def __init__(self, folder: Path, keep: int, files: FileLayer | None = None) -> None:
        self.folder, self.keep = folder, keep
        self.files = files or FileLayer()
        self.loaded_step: int | None = None

    def steps(self) -> list[int]:
        """Steps that have a folder, damaged or not, in ascending order."""
        names = [_STEP.fullmatch(path.name) for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(match.group(1)) for match in names if match)

    def path(self, step: int) -> Path:
        """Folder of a step."""
        return self.folder / f"step_{step:08d}"

    def clean(self) -> None:
        """Delete what an interrupted save or prune left; other names are never touched."""
        if self.folder.is_dir():
            for path in sorted(self.folder.iterdir()):
                if _LEFTOVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                    self.files.remove_tree(path)

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint atomically, verify it, then prune; returns its folder.

        Raises:
            DiskError: no space, or not writable; the staging folder is removed and older checkpoints stay.
        """
        target = self.path(state.step)
        staged = self.folder / f".tmp_{target.name}_{os.getpid()}"
        contents = encode(state)
        try:
            self.files.make_folder(self.folder)
            needed = sum(map(len, contents.values())) + (1 << 20)
            free = self.files.free_bytes(self.folder)
            if free < needed:
                raise DiskError(
                    f"a checkpoint needs {needed / 1e6:.0f} MB and '{self.folder}' has {free / 1e6:.0f} MB free; older "
                    "checkpoints are intact. Free some space and run the same command to resume."
                )
            self._write(staged, contents)
            self.files.replace_folder(staged, target)
        except OSError as error:
            self._drop(staged)
            raise disk_error(error, f"checkpoint {target.name}", self.folder) from error
        except BaseException:
            self._drop(staged)
            raise
        self._verify_and_prune(target)
        return target

    def _write(self, staged: Path, contents: Mapping[str, bytes]) -> None:
        self.files.make_folder(staged)
        manifest = {}
        for name, data in contents.items():
            manifest[name] = {"size": len(data), "sha256": self.files.write(staged / name, data)}
        table = {"format": FORMAT, "files": manifest, "digest": digest(manifest)}
        self.files.write(staged / "manifest.json", json.dumps(table, indent=1).encode())

    def _drop(self, staged: Path) -> None:
        if staged.is_dir():
            FileLayer().remove_tree(staged)

    def _verify_and_prune(self, target: Path) -> None:
        try:
            read_verified(target)
        except Damaged as error:
            raise DiskError(f"the checkpoint just written reads back wrong: {error}; check the disk.") from error
        steps = self.steps()
        for step in steps[: -self.keep]:
            if step != self.loaded_step:
                try:
                    self.files.discard(self.path(step))
                except OSError as error:
                    print(f"warning: old checkpoint {self.path(step)} was not deleted: {error}", file=sys.stderr)

    def load_newest(self) -> TrainState | None:
        """Return the newest intact checkpoint, or None where there has never been one.

        Raises:
            CheckpointError: checkpoints exist and none is intact, or one is of a newer format.
        """
        problems = []
        for step in reversed(self.steps()):
            try:
                state = decode_known(read_verified(self.path(step)), self.path(step))
            except Damaged as error:
                problems.append(str(error))
                print(f"WARNING: checkpoint {self.path(step).name} is damaged: {error}.", file=sys.stderr)
                continue
            if problems:
                print(f"WARNING: going back to {self.path(step).name}.", file=sys.stderr)
            self.loaded_step = step
            return state
        if problems:
            raise CheckpointError(
                f"none of the {len(problems)} checkpoints in '{self.folder}' is intact: {'; '.join(problems)}. Nothing "
                "was changed; restore one from a backup, or start again in another --output folder."
            )
        return None


def decode_known(contents: Mapping[str, bytes], folder: Path) -> TrainState:
    """Decode verified files; unreadable content is `Damaged`, another format version a CheckpointError."""
    try:
        version = json.loads(contents["state.json"])["format"]
        if version != FORMAT:
            raise CheckpointError(
                f"'{folder}' has checkpoint format {version}; this version of gencontrol reads format {FORMAT}. "
                "Resume with the version that wrote it."
            )
        return decode(contents)
    except (KeyError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise Damaged(f"'{folder}' does not decode ({error})") from error
