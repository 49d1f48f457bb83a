"""The part of a pipeline that has nothing to do with sound: components, devices, loading and saving, progress.

The surface is diffusers' (names, order and meaning); the differences are stated where they are: unknown files and
keys are errors, nothing is unpickled, and no code named in a folder is imported.
"""

from __future__ import annotations

import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import nn

from gencontrol.errors import EnvironmentMissing, UsageError, nearest
from gencontrol.pipelines.hub.hub import LoadOptions, locate, pick_dtype

T = TypeVar("T")


class WithProgress:
    """A progress bar that the user configures once."""

    def __init__(self) -> None:
        self._progress: dict[str, Any] = {}

    def set_progress_bar_config(self, *, disable: bool | None = None, desc: str | None = None) -> None:
        """Choose whether the progress bar shows (None: on a terminal only) and what stands before it."""
        self._progress = {"disable": disable, "desc": desc}

    def progress_bar(self, iterable: Iterable[T] | None = None, total: int | None = None) -> Any:
        """Return a tqdm bar over an iterable or for a total; silent when stderr is not a terminal.

        Raises:
            UsageError: neither or both are given.
        """
        from tqdm.auto import tqdm

        if (iterable is None) == (total is None):
            raise UsageError("progress_bar takes either an iterable or a total.")
        config = {"disable": None, **self._progress}
        if config["disable"] is None:
            config["disable"] = not sys.stderr.isatty()
        return tqdm(iterable, total=total, **config)


class Pipeline(WithProgress, ABC):
    """Base of all pipelines; a subclass gives `bundled`, `network_name`, `__call__` and the abstract methods."""

    #: name of the folder under gencontrol/bundled that `from_pretrained("bundled")` loads
    bundled: ClassVar[str]
    #: components that stay in float32 whatever the networks' dtype is
    fixed_precision: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, components: Mapping[str, Any], network_name: str) -> None:
        super().__init__()
        self._components = dict(components)
        self.network_name = network_name
        self._interrupt = False
        self._hooks: list[Any] = []
        self._execution_device: torch.device | None = None

    def __getattr__(self, name: str) -> Any:
        """Return a component by its name: `pipe.transformer`."""
        components = self.__dict__.get("_components", {})
        if name in components:
            return components[name]
        raise AttributeError(f"{type(self).__name__} has no '{name}'.{nearest(name, components)}")

    # ---- loading and saving -------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        variant: str | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | None = None,
    ) -> Self:
        """Load a pipeline from a folder, a hub id or "bundled"; only safetensors and JSON are read.

        Args:
            pretrained_model_name_or_path: a folder written by `save_pretrained` (ours or diffusers'), a hub id
                `owner/name`, or "bundled" for the weights that come with the package.
            revision: branch, tag or commit of a hub repository.
            variant: file variant of a diffusers folder, e.g. "fp16".
            dtype: of the networks' weights, a torch dtype or "fp32", "bf16", "fp16"; float32 if not given.
            torch_dtype: the older name of `dtype`.
            cache_dir: folder for downloads.
            local_files_only: never ask the hub.
            token: for private repositories; the logged-in one by default.

        Raises:
            UsageError: both dtypes, or a source that is not a pipeline this class loads (named, with the remedy).
            EnvironmentMissing: a package that the model needs, or the bundled weights, are not installed.
        """
        options = LoadOptions(revision, variant, pick_dtype(dtype, torch_dtype), cache_dir, local_files_only, token)
        new = cls.__new__(cls)
        index, where = locate(pretrained_model_name_or_path, options, cls.bundled)
        new._load(index, where, options)
        return new

    @abstractmethod
    def _load(self, index: Mapping[str, Any], where: str | Path, options: LoadOptions) -> None:
        """Fill this empty pipeline from a folder or repository, whose model_index.json is `index`."""

    @classmethod
    def from_pipe(cls, pipeline: Any) -> Self:
        """Return a new pipeline that shares the components (weights are never copied) of another one.

        Args:
            pipeline: one of this class, or of a library's class that it can wrap.

        Raises:
            UsageError: the other pipeline is of a kind that this class cannot take, or it is offloaded.
        """
        new = cls.__new__(cls)
        new._share(pipeline)
        return new

    @abstractmethod
    def _share(self, pipeline: Any) -> None:
        """Fill this empty pipeline with the components of another one."""

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write a folder that `from_pretrained` loads; active LoRA adapters are merged into the saved weights.

        Raises:
            UsageError: the path is a file.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise UsageError(f"'{folder}' is a file; save_pretrained writes a folder: give another path.")
        folder.mkdir(parents=True, exist_ok=True)
        self._save(folder)

    @abstractmethod
    def _save(self, folder: Path) -> None:
        """Write into a folder that exists what `_load` reads."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str = "Upload pipeline",
        revision: str | None = None,
        token: str | None = None,
    ) -> str:
        """Write the folder of `save_pretrained` to a hub repository (created if need be); returns the commit's address.

        Args:
            private: of a repository that is made now; None is the owner's default.
            token: by default the logged-in one or that of the environment.

        Raises:
            EnvironmentMissing: huggingface_hub is not installed, or offline mode is on.
        """
        import tempfile

        try:
            from huggingface_hub import HfApi, constants
        except ImportError as error:
            raise EnvironmentMissing("push_to_hub needs huggingface_hub: pip install huggingface_hub") from error
        if constants.HF_HUB_OFFLINE:
            raise EnvironmentMissing("push_to_hub needs the network; unset HF_HUB_OFFLINE.")
        api = HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            card = Path(folder, "README.md")
            if not card.exists():
                card.write_text(
                    f"---\nlibrary_name: gencontrol\n---\n\n# {repo_id}\n\n```python\nfrom gencontrol.pipelines import "
                    f'{type(self).__name__}\n\npipe = {type(self).__name__}.from_pretrained("{repository}")\n```\n',
                    encoding="utf-8",
                )
            done = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=commit_message, revision=revision
            )
        return str(done.commit_url)

    # ---- components and devices -----------------------------------------------------------------------------------

    @property
    def components(self) -> dict[str, Any]:
        """A fresh dictionary of the components; the objects are the pipeline's own."""
        return dict(self._components)

    def register_modules(self, **components: Any) -> None:  # the component names are the public contract
        """Replace components by their names.

        Raises:
            UsageError: a name that this pipeline does not have.
        """
        for name in components:
            if name not in self._components:
                raise UsageError(
                    f"no component '{name}'.{nearest(name, self._components)} Known: {', '.join(self._components)}."
                )
        self._rebuild({**self._components, **components})

    @abstractmethod
    def _rebuild(self, components: Mapping[str, Any]) -> None:
        """Take other components under the same names."""

    @property
    def network(self) -> nn.Module:
        """The denoising network, the component that training changes."""
        module: nn.Module = self._components[self.network_name]
        return module

    def modules(self) -> dict[str, nn.Module]:
        """The components that hold tensors."""
        return {name: part for name, part in self._components.items() if isinstance(part, nn.Module)}

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs: the execution device under offloading, else the network's device."""
        return self._execution_device or next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network's weights."""
        return next(self.network.parameters()).dtype

    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | str | None = None
    ) -> Self:
        """Move all components, and cast the networks; `to(dtype)` alone is understood. Returns the pipeline.

        Raises:
            UsageError: two dtypes, or the pipeline is offloaded.
        """
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise UsageError(f"to() got two dtypes, {device} and {dtype}; give one.")
            device, dtype = None, device
        target = None if dtype is None else pick_dtype(dtype, None)
        if self._hooks and device is not None:
            raise UsageError(
                "this pipeline is offloaded, its components move by themselves; call remove_all_hooks() before to()."
            )
        for name, module in self.modules().items():
            if device is not None:
                module.to(device)
            if target is not None and name not in self.fixed_precision:
                module.to(target)
        self._moved()
        return self

    @abstractmethod
    def _moved(self) -> None:
        """Forget what was computed on the old device or in the old precision."""

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keep the networks on the CPU and bring each to the accelerator only while it runs.

        On a machine without an accelerator there is nothing to save: a warning says so and nothing changes.

        Args:
            gpu_id: index of the accelerator; 0 if not given.
            device: the accelerator; the one torch finds if not given.

        Raises:
            UsageError: two indices.
            EnvironmentMissing: accelerate is not installed.
        """
        target = _accelerator(gpu_id, device)
        if target is None:
            warnings.warn(
                "no accelerator on this machine: the pipeline stays on the CPU, nothing is offloaded", stacklevel=2
            )
            return
        try:
            from accelerate import cpu_offload_with_hook
        except ImportError as error:
            raise EnvironmentMissing("enable_model_cpu_offload needs accelerate; pip install accelerate.") from error
        self.remove_all_hooks()
        order = self._offload_order()
        moving = {id(module) for module in order}
        for module in self.modules().values():
            # a component with a part that is offloaded stays on the CPU as a whole
            module.to("cpu" if any(id(part) in moving for part in module.modules()) else target)
        hook = None
        for module in order:
            _, hook = cpu_offload_with_hook(module, target, prev_module_hook=hook)
            self._hooks.append(hook)
        self._execution_device = target
        self._moved()

    @abstractmethod
    def _offload_order(self) -> list[nn.Module]:
        """Modules to offload, in the order in which they run; the others stay on the accelerator."""

    def maybe_free_model_hooks(self) -> None:
        """Send the component that ran last back to the CPU, if the pipeline is offloaded."""
        for hook in self._hooks:
            hook.offload()

    def remove_all_hooks(self) -> None:
        """End offloading; all components are on the CPU then."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._execution_device = None
        self.to("cpu")

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}: {type(part).__name__}" for name, part in self._components.items())
        return f"{type(self).__name__}({parts})"

    def __iter__(self) -> Iterator[str]:
        raise TypeError(f"{type(self).__name__} is not iterable; see .components")


def _accelerator(gpu_id: int | None, device: torch.device | str | None) -> torch.device | None:
    """The device to run on under offloading, or None where there is no accelerator."""
    if device is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        if found is None:
            return None
        return torch.device(found.type, gpu_id or 0)
    target = torch.device(device)
    if gpu_id is not None and target.index is not None:
        raise UsageError(f"gpu_id={gpu_id} and device='{device}' both give an index; give one of them.")
    return target if gpu_id is None else torch.device(target.type, gpu_id)
